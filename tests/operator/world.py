"""A small world in which an operator works: an API server, a stand-in for KubeRay, a Ray head, drivers.

Time is a number.

It takes the operator's actions as the real ones are taken: a status is written under a condition, a job's id is taken
once, a driver dies with its head and lives on behind a broken network.
"""

import copy
from datetime import UTC, datetime, timedelta
from typing import Any

from steadyhelm.telemetry.status import RunStatus
from steadyhelm_operator import resources
from steadyhelm_operator.api import FINALIZER, Status
from steadyhelm_operator.reconcile import reconcile
from steadyhelm_operator.state import (
    Action,
    ClusterView,
    CreateCluster,
    Decision,
    DeleteCluster,
    ForgetJob,
    HeadView,
    Hold,
    JobView,
    Observed,
    Problem,
    Release,
    StopJob,
    Submit,
    SuspendCluster,
)

from tests.operator.objects import training_run

START = datetime(2026, 1, 1, tzinfo=UTC)
TEMPLATE = {"template": {"spec": {"headGroupSpec": {}}}}


class World:
    """One TrainingRun, its cluster, and whatever drives it."""

    def __init__(self, **spec: Any) -> None:
        self.run: dict[str, Any] | None = training_run(**spec)
        self.now = START
        self.cluster: dict[str, Any] | None = None
        self.jobs: dict[str, JobView] = {}
        self.submitted: list[str] = []
        self.heads = 1
        self.submitted_to: list[tuple[int, str]] = []
        self.reachable = True
        self.refuses = False
        self.committed = 0
        self.document: RunStatus | None = None
        self.problems: tuple[Problem, ...] = ()
        self.events: list[tuple[str, str]] = []
        self.decisions: list[Decision] = []
        self._uids = 0

    # ---- what tests ask ----

    @property
    def status(self) -> Status:
        assert self.run is not None
        return Status.model_validate(self.run.get("status") or {})

    @property
    def live(self) -> list[str]:
        """Ids of the jobs whose drivers live."""
        return [name for name, job in self.jobs.items() if not job.ended]

    @property
    def iterations(self) -> int:
        assert self.run is not None
        return int(self.run["spec"]["run"]["schedule"]["iterations"])

    # ---- the operator ----

    def observe(self) -> Observed:
        assert self.run is not None
        cluster = None if self.cluster is None else self.view()
        last, head = self.status.last, None
        if cluster is not None and cluster.head_ready and last is not None:
            if not self.reachable:
                head = HeadView(reachable=False, refused=self.refuses, problem="timed out")
            else:
                head = HeadView(reachable=True, job=self.jobs.get(last.submission_id), document=self.document)
        return Observed(cluster=cluster, head=head, problems=self.problems)

    def view(self) -> ClusterView:
        assert self.cluster is not None
        fields = {key: value for key, value in self.cluster.items() if key != "ticks"}
        return ClusterView(namespace="ns", host="rl-head-svc.ns.svc", **fields)

    def decide(self) -> Decision:
        assert self.run is not None
        return reconcile(resources.desired(self.run), self.run["spec"], self.observe(), self.now, 0.5)

    def look(self, crash_after: int = 99) -> Decision | None:
        """One look of the operator, which dies after that many writes: the status is the first, each action one."""
        if self.run is None:
            return None
        decision = self.decide()
        self.decisions.append(decision)
        if crash_after > 0:
            self.run["status"] = decision.status.model_dump(mode="json", by_alias=True, exclude_none=True)
            self.events += [(notice.reason, notice.message) for notice in decision.notices]
        for action in decision.actions[: max(0, crash_after - 1)]:
            self.take(action)
        return decision

    def take(self, action: Action) -> None:
        assert self.run is not None
        match action:
            case Hold():
                self.run["metadata"]["finalizers"] = [FINALIZER]
            case Release():
                self.run = None
                if self.cluster is not None and self.cluster["owner"]:
                    self.lose_cluster()  # by the garbage collector
            case CreateCluster(manifest=manifest):
                if self.cluster is None:
                    self.make_cluster(manifest)
            case SuspendCluster(cluster=cluster, suspend=suspend):
                if self.cluster is not None and self.cluster["uid"] == cluster.uid:
                    assert not self.cluster["queue"], "spec.suspend is Kueue's"
                    self.cluster["suspend"] = suspend
            case DeleteCluster(cluster=cluster):
                if self.cluster is not None and self.cluster["uid"] == cluster.uid:
                    assert self.cluster["owner"], "not ours to delete"
                    self.lose_cluster()
            case Submit():
                self.submit(action)
            case StopJob(submission_id=name):
                if self.answers and name in self.live:
                    self.jobs[name] = JobView(status="STOPPED")
            case ForgetJob(submission_id=name):
                if self.answers and name not in self.live:
                    self.jobs.pop(name, None)

    # ---- the cluster ----

    @property
    def answers(self) -> bool:
        return self.reachable and self.cluster is not None and self.cluster["head_ready"]

    def make_cluster(self, manifest: dict[str, Any] | None = None, queue: str = "") -> None:
        self._uids += 1
        metadata = (manifest or {}).get("metadata", {})
        self.cluster = {
            "name": metadata.get("name", "rl"),
            "uid": f"cluster-{self._uids}",
            "owner": metadata["ownerReferences"][0]["uid"] if metadata else "",
            "template": metadata.get("annotations", {}).get("steadyhelm.dev/template", ""),
            "queue": metadata.get("labels", {}).get("kueue.x-k8s.io/queue-name", queue),
            "suspend": False,
            "suspended": False,
            "provisioned": not metadata,
            "head_ready": not metadata,
        }

    def kuberay(self) -> None:
        """What KubeRay does in a while: pods come up, or go where the cluster is suspended."""
        if self.cluster is None:
            return
        if self.cluster["suspend"]:
            self.lose_head()
            self.cluster["suspended"] = True
        else:
            self.cluster |= {"suspended": False, "provisioned": True, "head_ready": True}

    def lose_head(self) -> None:
        """The head's pod dies, and with it drivers and the Jobs API's memory."""
        self.jobs.clear()
        self.heads += 1
        if self.cluster is not None:
            self.cluster["head_ready"] = False

    def lose_cluster(self) -> None:
        self.lose_head()
        self.cluster = None

    # ---- drivers ----

    def submit(self, request: Submit) -> None:
        if self.answers and request.submission_id not in self.jobs:
            self.jobs[request.submission_id] = JobView(status="RUNNING")
            self.submitted.append(request.submission_id)
            self.submitted_to.append((self.heads, request.submission_id))
            self.document = None

    def driver_works(self, iterations: int = 1) -> None:
        for _ in self.live:
            self.committed = min(self.committed + iterations, self.iterations)
            self.say("running")

    def driver_ends(self, status: str, exit_code: int | None = None, message: str = "") -> None:
        for name in self.live:
            self.jobs[name] = JobView(status=status, exit_code=exit_code, message=message)

    def say(self, phase: str, **said: Any) -> None:
        """The driver's document."""
        self.document = RunStatus(
            run="digits", phase=phase, iteration=self.committed, iterations=self.iterations, **said
        )

    # ---- people ----

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def change(self, **spec: Any) -> None:
        if self.run is not None:
            self.run = copy.deepcopy(self.run)
            self.run["spec"] |= spec
            self.run["metadata"]["generation"] += 1

    def delete(self) -> None:
        if self.run is not None:
            self.run["metadata"].setdefault("deletionTimestamp", resources_stamp(self.now))
            if not self.run["metadata"].get("finalizers"):
                self.take(Release())

    def settle(self, looks: int = 30, *, work: int = 0) -> None:
        """Looks, with KubeRay and drivers at work in between, until nothing changes any more."""
        for _ in range(looks):
            before = copy.deepcopy((self.run, self.cluster, self.jobs, self.committed))
            self.look()
            self.kuberay()
            if work:
                self.driver_works(work)
                if self.live and self.committed >= self.iterations:
                    self.driver_ends("SUCCEEDED", 0)
            if (self.run, self.cluster, self.jobs, self.committed) == before and not work:
                return
            self.wait(5 if not work else 60)


def resources_stamp(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
