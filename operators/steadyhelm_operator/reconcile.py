"""The decision: what a TrainingRun is to be, what there is → what to write down and to do. No clock, no network.

It looks at the whole state each time and at no event (*level-triggered*), so whatever was missed, repeated or cut off
in the middle is made good by the next look. Three rules keep it right:

1. The status is written before actions are taken, under the condition that nobody wrote in between. An attempt is
   thereby recorded before its driver can exist, and its id follows from the record: to submit again is harmless.
2. A new attempt begins only when the last one has *ended*: its job says so, its head answers and knows no such job, or
   its cluster is another one. A head that does not answer proves nothing, and is waited for.
3. Should all this err, the store's commit log fences: a resubmission takes the run over, an older driver stops.

::

    Pending → [Queued] → Provisioning → Starting → Running → Succeeded
                              ↑            ↑          ↓
                              └──────── Recovering ←──┴─→ Failed          Suspending → Suspended
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Literal

from steadyhelm.telemetry.status import RunStatus

from steadyhelm_operator.api import (
    Attempt,
    Checkpoint,
    Cleanup,
    Condition,
    Frame,
    Outcome,
    Phase,
    Rollouts,
    Spec,
    Status,
)
from steadyhelm_operator.resources import (
    EXIT_WRONG_INPUT,
    ray_cluster,
    run_id,
    submission,
    submission_id,
    template_checksum,
)
from steadyhelm_operator.state import (
    Action,
    ClusterView,
    CreateCluster,
    Decision,
    DeleteCluster,
    Desired,
    ForgetJob,
    Hold,
    JobView,
    Notice,
    Observed,
    Release,
    StopJob,
    SuspendCluster,
    instant,
    stamp,
)

HISTORY = 10
"""Attempts that the status remembers."""
SOON_S, POLL_S, WATCHED_S = 3.0, 15.0, 20.0
"""Seconds to the next look: at what is about to change; at a driver that works; at what a watch tells of anyway."""
SPEECHLESS_S = 120.0
"""Seconds after which a driver that serves no status is taken to be at work: another run may have the port."""
ENDING_S = 600.0
"""Seconds past its driver's grace after which a deleted run no longer waits for its cluster's pods: those on a node
that is lost end when it comes back, or is taken out of Kubernetes."""
FATAL = frozenset({"BadRunFile", "BadData", "BadModel", "TakenOver"})
"""Reasons that another attempt would meet again. A run that somebody else took over is theirs: the predecessors of an
attempt have all ended, so it was none of them, and to take it back would go to and fro for ever."""
HELD = "RunHeld"
"""Reason of an attempt that found the driver of somebody else at the run and left it alone; the next one does too."""
INFRASTRUCTURE = frozenset({"NoCapacity", "ClusterUnreachable", "StoreUnreachable", "Stopped"})
"""Reasons that are none of the run's doing; such an attempt is lost and does not count."""
STOPPED = {
    "Suspended": "the run was suspended",
    "RunFileChanged": "the run file has changed",
    "Deleted": "the TrainingRun was deleted",
}
"""Why the operator stops a driver, in words."""


def reconcile(desired: Desired, raw: Mapping[str, Any], seen: Observed, now: datetime, jitter: float) -> Decision:
    """What is to be done about a TrainingRun.

    Args:
        desired: the TrainingRun.
        raw: its spec as written, which is what the cluster gets.
        seen: what there is.
        now: the time.
        jitter: from [0, 1), of which a wait between attempts is spread.
    """
    look = _Look(desired, raw, seen, now, jitter)
    if desired.deleting_since is not None:
        look.terminate()
    elif not desired.held:
        look.act(Hold(), again_s=0.0)
    elif desired.spec is None:
        look.refuse()
    else:
        look.absorb()
        look.advance(desired.spec)
    return look.decision()


class _Look:
    """One look at one TrainingRun; ``status`` and ``actions`` grow as it goes on."""

    def __init__(self, desired: Desired, raw: Mapping[str, Any], seen: Observed, now: datetime, jitter: float) -> None:
        self.desired, self.raw, self.seen, self.now, self.jitter = desired, raw, seen, now, jitter
        self.status = desired.status
        self.actions: list[Action] = []
        self.again_s: float | None = None

    # ---- what the status says ----

    def set(self, **changes: Any) -> None:
        """Changes fields of the status."""
        self.status = self.status.model_copy(update=changes)

    def say(self, phase: Phase, reason: str, message: str = "", again_s: float | None = None) -> None:
        """Where the run stands and why, and when to look again."""
        self.set(phase=phase, reason=reason, message=message, observed_generation=self.desired.generation)
        self.again_s = again_s

    def act(self, *actions: Action, again_s: float = SOON_S) -> None:
        """Has something done, and the result looked at."""
        self.actions += actions
        self.again_s = again_s

    def condition(
        self, kind: Literal["Accepted", "ClusterReady", "Progressing", "Complete"], holds: bool, reason: str, text: str
    ) -> None:
        """States a condition; its time changes with its status only."""
        found = {condition.type: condition for condition in self.status.conditions}
        status: Literal["True", "False"] = "True" if holds else "False"
        before = found.get(kind)
        since = before.last_transition_time if before is not None and before.status == status else stamp(self.now)
        found[kind] = Condition(
            type=kind,
            status=status,
            reason=reason,
            message=text,
            last_transition_time=since,
            observed_generation=self.desired.generation,
        )
        self.set(conditions=tuple(found.values()))

    def attempt(self, **changes: Any) -> None:
        """Changes the newest attempt's record."""
        *before, last = self.status.attempts
        self.set(attempts=(*before, last.model_copy(update=changes)))

    def decision(self) -> Decision:
        """The outcome."""
        notices = changes(self.desired.status, self.status)
        return Decision(status=self.status, actions=tuple(self.actions), notices=notices, again_s=self.again_s)

    # ---- what there is ----

    @property
    def alive(self) -> Attempt | None:
        """The attempt whose driver may live."""
        last = self.status.last
        return last if last is not None and last.alive else None

    @property
    def own(self) -> ClusterView | None:
        """The run's own cluster."""
        cluster = self.seen.cluster
        return cluster if cluster is not None and cluster.owner == self.desired.uid else None

    def past(self, text: str) -> datetime | None:
        """The time that was written down; None where it is yet to come, as the clock was put back."""
        found = instant(text)
        return found if found is not None and found <= self.now else None

    def absorb(self) -> None:
        """Takes over what cluster and head say about the attempt that may live."""
        last = self.alive
        if last is None:
            return
        cluster, head = self.seen.cluster, self.seen.head
        if cluster is None:
            self.end("Lost", "ClusterLost", "the RayCluster is gone")
        elif cluster.uid != self.status.cluster_uid:
            self.end("Lost", "ClusterReplaced", "there is another RayCluster of that name")
        elif cluster.suspended:
            self.end("Lost", "ClusterSuspended", "the RayCluster was suspended")
        elif head is not None and head.reachable:
            if head.job is None and last.submitted:
                self.end("Lost", "HeadReplaced", "the head knows no job of that id any more: it was replaced")
            elif head.job is not None:
                self.absorb_job(head.job, head.document)

    def absorb_job(self, job: JobView, document: RunStatus | None) -> None:
        """Takes over what job and driver say."""
        self.attempt(submitted=True)
        if document is not None:
            self.progress(document)
        if not job.ended:
            return
        said = document if document is not None and document.reason else None
        killed = _signal(job.exit_code)
        lines = [f"the driver ended with exit code {job.exit_code}", *job.message.strip().splitlines()]
        text = (said.message if said else f"the driver was killed ({killed})" if killed else lines[-1])[:500]
        if job.status == "SUCCEEDED":
            spec = self.desired.spec
            if spec is not None and self.status.attempts[-1].payload == self.desired.payload:
                self.set(iteration=spec.run.schedule.iterations)  # the last look at its driver may be long ago
            self.end("Succeeded", "Finished", "the run reached its last iteration")
        elif job.status == "STOPPED":
            self.end("Lost", "Interrupted", "somebody stopped the job")
        elif job.exit_code is None:
            self.end("Lost", "DriverLost", text)
        elif killed == "SIGTERM":
            self.end("Lost", "Interrupted", "the driver was told to end by somebody else (SIGTERM)")
        else:
            wrong = job.exit_code == EXIT_WRONG_INPUT
            reason = said.reason if said else "BadRunFile" if wrong else "DriverKilled" if killed else "DriverFailed"
            self.end("Lost" if reason in INFRASTRUCTURE else "Failed", reason, text)

    def progress(self, document: RunStatus) -> None:
        """Takes the driver's figures over."""
        version, checkpoint, rollouts = document.version, document.checkpoint, document.rollouts
        self.attempt(losses=document.losses, lost=document.lost)
        self.set(
            iteration=document.iteration,
            iterations=document.iterations or self.status.iterations,
            progress=f"{document.iteration}/{document.iterations or self.status.iterations}",
            policy_version=self.status.policy_version if version is None else f"{version.iteration}.{version.attempt}",
            reward=document.reward if document.reward is not None else self.status.reward,
            accuracy=document.accuracy if document.accuracy is not None else self.status.accuracy,
            staleness=document.staleness if document.staleness is not None else self.status.staleness,
            rollouts=Rollouts(ready=rollouts.ready, desired=rollouts.desired),
            engines=f"{rollouts.ready}/{rollouts.desired}",
            checkpoint=(
                self.status.checkpoint
                if checkpoint is None
                else Checkpoint(iteration=checkpoint.iteration, key=checkpoint.key)
            ),
            waiting=tuple(document.waiting[:5]),
        )

    def end(self, outcome: Outcome, reason: str, message: str) -> None:
        """Writes down that the newest attempt has ended, and when the next may begin."""
        last = self.status.attempts[-1]
        if last.stopping and outcome != "Succeeded":
            message = STOPPED.get(last.stopping, message) if reason == "Interrupted" else message
            outcome, reason = "Stopped", last.stopping
        self.attempt(ended_at=stamp(self.now), outcome=outcome, reason=reason, message=message)
        went_on = self.status.iteration > last.from_iteration
        failures = (0 if went_on else self.status.failures) + (outcome == "Failed")
        restarts = (0 if went_on else self.status.restarts) + 1
        if outcome in ("Succeeded", "Stopped"):
            failures, restarts = (0 if outcome == "Succeeded" else failures), 0
        policy = self.desired.frame.failure_policy if self.desired.frame else None
        wait_s = 0.0
        if policy is not None and restarts:
            longest = min(policy.backoff_seconds * 2.0 ** min(restarts - 1, 30), policy.max_backoff_seconds)
            wait_s = longest * (0.5 + 0.5 * self.jitter)
        self.set(
            failures=failures,
            restarts=restarts,
            retry_at=stamp(self.now + timedelta(seconds=wait_s)) if wait_s else "",
            rollouts=Rollouts(desired=self.status.rollouts.desired),
            engines=f"0/{self.status.rollouts.desired}" if self.status.engines else "",
            waiting=(),
            gave_up=outcome == "Failed"
            and (reason in FATAL or (policy is not None and failures >= policy.max_attempts)),
        )

    # ---- what is to be done ----

    def refuse(self) -> None:
        """The spec describes no run. A driver that works goes on under the spec that it began with; no other begins.

        Suspending and cleaning up hold all the same.
        """
        self.absorb()
        problem, frame, head = self.desired.problem, self.desired.frame, self.seen.head
        self.condition("Accepted", False, "BadRunFile", problem)
        if self.alive is not None and not self.alive.submitted and head is not None and head.reachable:
            self.end("Stopped", "BadRunFile", "its driver had not begun")
        if frame is not None and frame.suspend:
            return self.suspend(frame)
        if self.alive is not None and self.alive.stopping:
            self.stop(self.alive, self.alive.stopping)
        if self.alive is not None and self.alive.stopping:
            return self.say("Running", "BadRunFile", f"the driver saves a checkpoint and ends: {problem}", POLL_S)
        if self.alive is not None:
            begun = self.alive.submitted
            text = "goes on under the spec before this one" if begun else self.silence()
            return self.say("Running" if begun else "Starting", "BadRunFile", f"{text}: {problem}", POLL_S)
        self.condition("Progressing", False, "BadRunFile", problem)
        self.say("Failed", "BadRunFile", problem)
        if frame is not None:
            last = self.status.last
            self.clean_up(frame.cleanup, succeeded=last is not None and last.outcome == "Succeeded")
        return None

    def advance(self, spec: Spec) -> None:
        """Brings the run closer to its spec."""
        self.condition("Accepted", True, "Valid", "")
        self.set(iterations=spec.run.schedule.iterations)
        self.set(progress=f"{self.status.iteration}/{self.status.iterations}")
        last = self.status.last
        changed = last is not None and last.payload != self.desired.payload
        finished = last is not None and last.outcome == "Succeeded" and not changed
        if last is not None and (finished or (self.status.gave_up and not changed and not spec.suspend)):
            self.finish(spec, last, succeeded=finished)
        elif spec.suspend:
            self.suspend(spec)
        elif self.alive is not None:
            self.follow(spec, self.alive, changed)
        else:
            self.prepare(spec)
        if not finished:
            self.condition("Complete", False, "NotYet", "")

    def finish(self, spec: Spec, last: Attempt, *, succeeded: bool) -> None:
        """The run is over: says so, and cleans up in time."""
        reason, text = ("Finished", "") if succeeded else (last.reason, last.message)
        if not succeeded and self.status.failures > 1:
            text = f"given up after {self.status.failures} failed attempts: {text}"
        if succeeded:
            self.condition("Complete", True, reason, "")
        self.condition("Progressing", False, reason, text)
        self.say("Succeeded" if succeeded else "Failed", reason, text)
        self.clean_up(spec.cleanup, succeeded=succeeded)

    def clean_up(self, policy: Cleanup, *, succeeded: bool) -> None:
        """Deletes the run's own cluster a while after the end, where it is to go."""
        if self.past(self.status.finished_at) is None:
            self.set(finished_at=stamp(self.now))
        goes = policy.cluster == "Delete" or (policy.cluster == "DeleteOnSuccess" and succeeded)
        if self.own is None or not goes or self.own.deleting:
            return
        since = instant(self.status.finished_at) or self.now
        left = policy.after_seconds - (self.now - since).total_seconds()
        if left > 0:
            self.again_s = left
        else:
            self.set(cluster_deleted=True)
            self.condition("ClusterReady", False, "CleanedUp", "the run is over")
            self.act(DeleteCluster(cluster=self.own))

    def stop(self, attempt: Attempt, why: str) -> None:
        """Has an attempt's driver save a checkpoint and end; asks as often as it is looked at."""
        if not attempt.stopping or self.past(attempt.stopping_since) is None:
            self.attempt(stopping=attempt.stopping or why, stopping_since=stamp(self.now))
        head = self.seen.head
        if head is None or not head.reachable:
            return
        if head.job is not None:
            self.act(StopJob(submission_id=attempt.submission_id))
        else:
            self.end("Stopped", why, "its driver had not begun")  # the head answers and knows no such job

    def suspend(self, frame: Frame) -> None:
        """Driver first, then the nodes."""
        if self.alive is not None:
            self.stop(self.alive, "Suspended")
        attempt = self.alive
        if attempt is not None:
            since = instant(attempt.stopping_since) or self.now
            patient = (self.now - since).total_seconds() < frame.cleanup.stop_grace_seconds
            answers = self.seen.head is not None and self.seen.head.reachable
            if answers or patient or self.own is None:
                text = "the driver saves a checkpoint and ends" if answers else self.silence()
                self.condition("Progressing", False, "Suspending", text)
                return self.say("Suspending", "Stopping", text, SOON_S)
        cluster = self.own
        if cluster is not None and not self.gives_back(cluster):
            self.condition("Progressing", False, "Suspending", "")
            return self.say("Suspending", "ReleasingNodes", "the RayCluster's pods end", SOON_S)
        if self.alive is not None:
            return self.say("Suspending", "Stopping", self.silence(), SOON_S)
        self.set(failures=0, restarts=0, retry_at="", gave_up=False, finished_at="")
        self.condition("Progressing", False, "Suspended", "")
        self.condition("ClusterReady", False, "Suspended", "")
        return self.say("Suspended", "Suspended", f"resumes behind iteration {self.status.iteration}")

    def gives_back(self, cluster: ClusterView) -> bool:
        """Whether the run's own cluster has given its nodes back; if not, sees to it."""
        if cluster.queue:  # spec.suspend is Kueue's there
            if not cluster.deleting:
                self.act(DeleteCluster(cluster=cluster))
            return False
        if not cluster.suspend:
            self.act(SuspendCluster(cluster=cluster, suspend=True))
        return cluster.suspend and cluster.suspended

    def follow(self, spec: Spec, attempt: Attempt, changed: bool) -> None:
        """A driver may live: submits it where it does not yet, tells how it goes, stops it for another run file."""
        head, cluster = self.seen.head, self.seen.cluster
        if changed or attempt.stopping:
            why = attempt.stopping or "RunFileChanged"
            self.stop(attempt, why)
            if self.alive is None:
                return self.prepare(spec)
            text = "the driver saves a checkpoint and ends, then the next one goes on"
            self.condition("Progressing", True, why, "")
            return self.say("Recovering", why, text, SOON_S)
        if head is None or not head.reachable:
            text = self.silence()
            self.condition("ClusterReady", False, "HeadUnreachable", text)
            phase: Phase = "Recovering" if attempt.submitted else "Starting"
            return self.say(phase, *self.worst("HeadUnreachable", text), self.patience())
        self.condition("ClusterReady", True, "HeadReady", "")
        if head.job is None:
            drove = any(past.reason != HELD for past in self.status.attempts[:-1])
            changes = self.status.changes > 0
            self.act(submission(self.desired, attempt.number, self.raw, take_over=drove, changed=changes))
            self.condition("Progressing", True, "Submitting", "")
            return self.say("Starting", "Submitting", f"attempt {attempt.number} is submitted", SOON_S)
        document = head.document
        since = self.past(attempt.started_at)
        old = since is None or (self.now - since).total_seconds() > SPEECHLESS_S
        works = old if document is None else document.phase != "starting"
        running = head.job.status == "RUNNING" and works
        waits = "; ".join(self.status.waiting)
        reason, text = ("Training", waits) if running else ("Starting", waits or "the driver and its services start")
        if document is not None and document.reason:
            reason, text = document.reason, document.message or waits
        elif (self.seen.problems and waits) or (self.seen.problems and not running):
            reason, text = self.worst(reason, text)
        if cluster is not None and self.own is not None and cluster.template != template_checksum(spec.cluster):
            text = f"{text} (the cluster's template has changed: suspend and resume to use it)".strip()
        self.condition("Progressing", True, reason, "" if running else text)
        return self.say("Running" if running else "Starting", reason, text, POLL_S if running else SOON_S)

    def silence(self) -> str:
        """What an unreachable head means, and what to do."""
        head = self.seen.head
        if head is None or not head.problem:
            return "the head's pod is not ready; KubeRay replaces a lost head, then the run goes on"
        if head.refused:
            remedy = "the operator has to be allowed to read that Secret (rbac.tokenSecrets), and it to be the head's"
            secret = self.seen.cluster.secret if self.seen.cluster is not None else ""
            return f"the head takes no token of Secret {secret!r} ({head.problem}): {remedy}"
        remedy = "networkPolicy.apiFrom of the cluster's chart has to name the operator's namespace"
        return f"the head does not answer, though its pod is ready ({head.problem}): see its log; {remedy}"

    def patience(self) -> float:
        """Seconds to the next look at a silent head: the longer it is silent, the more, as each look waits for it."""
        (since,) = (c.last_transition_time for c in self.status.conditions if c.type == "ClusterReady")
        silent_s = (self.now - (instant(since) or self.now)).total_seconds()
        return min(max(SOON_S, silent_s), POLL_S)

    def worst(self, reason: str, text: str) -> tuple[str, str]:
        """What is wrong with pods, if anything is; else what is given."""
        if not self.seen.problems:
            return reason, text
        return self.seen.problems[0].reason, "; ".join(problem.message for problem in self.seen.problems[:3])

    def prepare(self, spec: Spec) -> None:
        """No driver lives: sees to a cluster, waits its turn, and writes the next attempt down."""
        waiting: Phase = "Recovering" if self.status.attempts else "Pending"
        cluster = self.seen.cluster
        if self.status.finished_at or self.status.gave_up:  # another run file, or another try
            self.set(finished_at="", gave_up=False, failures=0, restarts=0, retry_at="", cluster_deleted=False)
        if cluster is None:
            if spec.cluster.template is None:
                text = f"there is no RayCluster {spec.cluster.name!r} in {self.desired.namespace}: install one"
                self.condition("ClusterReady", False, "ClusterMissing", text)
                return self.say(waiting, "ClusterMissing", text, WATCHED_S)
            self.act(CreateCluster(manifest=ray_cluster(self.desired, spec.cluster)))
            reason, text = self.worst("CreatingCluster", "asks Kubernetes for its RayCluster")
            self.condition("ClusterReady", False, reason, text)
            phase: Phase = waiting if self.status.attempts else "Provisioning"
            return self.say(phase, reason, text, WATCHED_S if self.seen.problems else SOON_S)
        if not self.usable(spec, cluster):
            return None
        retry_at = instant(self.status.retry_at)
        last = self.status.last
        longest = timedelta(seconds=spec.failure_policy.max_backoff_seconds)
        if retry_at is not None and self.now < retry_at <= self.now + longest:  # later ones are another clock's
            why = f"{last.message}; " if last is not None else ""
            self.condition("Progressing", True, "Waiting", "")
            reason = last.reason if last is not None else "Waiting"
            left = (retry_at - self.now).total_seconds()
            return self.say("Recovering", reason, f"{why}the next attempt begins at {self.status.retry_at}", left)
        return self.begin(cluster)

    def usable(self, spec: Spec, cluster: ClusterView) -> bool:
        """Whether the cluster takes a driver; if not, sees to it and says why."""
        waiting: Phase = "Recovering" if self.status.attempts else "Provisioning"
        self.set(cluster=cluster.name)
        own = self.own
        if cluster.deleting:
            self.condition("ClusterReady", False, "ClusterEnding", "")
            self.say(waiting, "ClusterEnding", "the RayCluster is being deleted", SOON_S)
        elif spec.cluster.template is not None and own is None:
            text = f"a RayCluster {cluster.name!r} of somebody else is in the way: rename the TrainingRun"
            self.condition("ClusterReady", False, "NameTaken", text)
            self.say("Pending", "NameTaken", text, WATCHED_S)
        elif own is not None and own.suspend and own.queue:
            text = f"Kueue's queue {own.queue!r} has not admitted the cluster"
            self.condition("ClusterReady", False, "Queued", text)
            self.say("Queued", "Queued", text, WATCHED_S)
        elif own is not None and own.suspend and own.template != template_checksum(spec.cluster):
            self.act(DeleteCluster(cluster=own))
            self.condition("ClusterReady", False, "TemplateChanged", "")
            self.say(waiting, "TemplateChanged", "the cluster is made anew from its changed template", SOON_S)
        elif own is not None and own.suspend:
            self.act(SuspendCluster(cluster=own, suspend=False))
            self.condition("ClusterReady", False, "Resuming", "")
            self.say(waiting, "Resuming", "the RayCluster's pods come back", SOON_S)
        elif not cluster.head_ready or cluster.suspended or (own is not None and not own.provisioned):
            reason, text = self.worst("PodsNotReady", cluster.message or "the RayCluster's pods are not ready yet")
            self.condition("ClusterReady", False, reason, text)
            self.condition("Progressing", True, "Provisioning", "")
            self.say(waiting, reason, text, WATCHED_S)
        else:
            self.condition("ClusterReady", True, "HeadReady", "")
            return True
        return False

    def begin(self, cluster: ClusterView) -> None:
        """Writes the next attempt down; the next look submits it."""
        number, last = self.status.attempt + 1, self.status.last
        reached = max(self.status.iteration, last.from_iteration if last is not None else 0)
        fresh = Attempt(
            number=number,
            submission_id=submission_id(self.desired, number),
            payload=self.desired.payload,
            from_iteration=reached,
            started_at=stamp(self.now),
        )
        changed = last is not None and last.payload != self.desired.payload
        self.set(
            attempt=number,
            attempts=(*self.status.attempts, fresh)[-HISTORY:],
            cluster_uid=cluster.uid,
            changes=self.status.changes + changed,
            retry_at="",
            started_at=self.status.started_at or stamp(self.now),
        )
        self.condition("Progressing", True, "Submitting", "")
        self.say("Starting", "Submitting", f"attempt {number} of {run_id(self.desired)!r} begins", 0.0)

    def terminate(self) -> None:
        """The TrainingRun is being deleted: its driver ends, then its cluster goes, then nothing holds it."""
        if not self.desired.held:
            return None
        self.absorb()
        since = self.desired.deleting_since or self.now
        cleanup = self.desired.frame.cleanup if self.desired.frame else Cleanup()
        waited_s = (self.now - since).total_seconds()
        patient = waited_s < cleanup.stop_grace_seconds
        attempt = self.alive
        if attempt is not None:
            self.stop(attempt, "Deleted")
        answers = self.seen.head is not None and self.seen.head.reachable
        if self.alive is not None and patient and (answers or self.own is None):
            text = "the driver saves a checkpoint and ends" if answers else self.silence()
            return self.say("Terminating", "Stopping", text, SOON_S)
        own = self.own
        if own is not None and not (own.deleting and waited_s > cleanup.stop_grace_seconds + ENDING_S):
            if not own.deleting:
                self.act(DeleteCluster(cluster=own))
            return self.say("Terminating", "DeletingCluster", "the run's cluster goes, its pods first", SOON_S)
        if self.alive is not None:
            text = "the driver could not be stopped in time and may go on: stop its job, or its cluster"
            self.say("Terminating", "GaveUpStopping", text)
        elif answers:
            self.act(*(ForgetJob(submission_id=past.submission_id) for past in self.status.attempts if past.submitted))
        self.actions.append(Release())
        self.again_s = None
        return None


def _signal(code: int | None) -> str:
    """Name of the signal that an exit code tells of, as shells write it or as Python does; empty where of none."""
    number = 0 if code is None else -code if code < 0 else code - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""


def changes(old: Status, new: Status) -> tuple[Notice, ...]:
    """The events that tell of what changed: attempts that began or ended, where the run stands, what is in its way."""
    found: list[Notice] = []
    known = {attempt.number: attempt for attempt in old.attempts}
    for attempt in new.attempts:
        before = known.get(attempt.number)
        if before is None:
            where = f"from iteration {attempt.from_iteration} on {new.cluster}"
            found.append(Notice(warning=False, reason="AttemptBegins", message=f"Attempt {attempt.number} {where}."))
        if before is not None and attempt.losses > before.losses:
            text = f"Attempt {attempt.number} at iteration {new.iteration}, loss {attempt.losses}: {attempt.lost}"
            found.append(Notice(warning=True, reason="ServiceLost", message=text))
        if attempt.ended_at and (before is None or not before.ended_at):
            text = f"Attempt {attempt.number} ended at iteration {new.iteration}: {attempt.message}."
            counted = attempt.outcome in ("Failed", "Lost")
            then = f" Next attempt at {new.retry_at}." if counted and new.retry_at and not new.gave_up else ""
            if attempt.outcome == "Failed":  # the head is there, and has its log
                then += f" `steadyhelm logs {attempt.submission_id}` has its log."
            if new.gave_up:
                then += " The run is given up: correct it, or suspend and resume it, for another try."
            found.append(Notice(warning=counted, reason=attempt.reason or attempt.outcome, message=text + then))
    if new.phase != old.phase or (new.reason != old.reason and new.phase in _TELLING):
        text = f"{new.phase}: {new.message}" if new.message else f"{new.phase}."
        warning = new.phase == "Failed" or new.reason in _IN_THE_WAY
        told = {notice.reason for notice in found}
        if new.reason not in told and not ("AttemptBegins" in told and new.phase == "Starting"):
            found.append(Notice(warning=warning, reason=new.reason or new.phase, message=text))
    return tuple(found)


_TELLING = ("Pending", "Queued", "Provisioning", "Starting", "Running", "Recovering", "Failed", "Terminating")
_IN_THE_WAY = frozenset(
    {
        "BadRunFile", "ClusterMissing", "ClusterRefused", "NoKubeRay", "NoPods", "NameTaken", "NoCapacity", "ImagePull",
        "PodConfig", "PodCrash", "OutOfMemory", "DiskFull", "HeadUnreachable", "GaveUpStopping",
    }
)  # fmt: skip
