"""The loop around ``reconcile``: looks at a TrainingRun, decides, writes the status down, acts. No decision is here."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from steadyhelm.errors import RequestRefusedError, SteadyhelmError
from steadyhelm.jobs import doubling

from steadyhelm_operator import resources
from steadyhelm_operator.api import FINALIZER, Status
from steadyhelm_operator.client import ConflictError, Heads, Kubernetes, MissingError
from steadyhelm_operator.metrics import Metrics
from steadyhelm_operator.queue import WorkQueue
from steadyhelm_operator.reconcile import reconcile
from steadyhelm_operator.state import (
    Action,
    ClusterView,
    CreateCluster,
    Decision,
    DeleteCluster,
    Desired,
    ForgetJob,
    HeadView,
    Hold,
    Notice,
    Observed,
    Problem,
    Release,
    StopJob,
    Submit,
    SuspendCluster,
)

Name = tuple[str, str]
"""Namespace and name."""
PROGRESS = frozenset(
    {
        "iteration", "progress", "policyVersion", "reward", "accuracy", "staleness", "rollouts", "engines",
        "checkpoint", "waiting", "message",
    }
)  # fmt: skip
"""Fields of the status that change all the time."""
PROGRESS_S = 30.0
"""How often a status is written of which nothing else has changed."""
FRESH_S, PODS_S = 20.0, 15.0
"""How old a cluster is when its pods are first looked at, where they are not all ready, and how often from then on."""
PODLESS_S = 30.0
"""How long KubeRay may take to make a cluster's first pod, before it is taken to refuse the cluster."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Bounds of the pause behind an error."""
WAITING = frozenset({"Provisioning", "Starting", "Recovering"})
"""Phases of runs that wait for a cluster or a driver."""
SPREAD = 0.1
"""Share by which the time of the next look is spread, so that runs do not come all at once."""

log = logging.getLogger("steadyhelm.operator")


class Controller:
    """Looks after all TrainingRuns that it is told of.

    Args:
        kubernetes, heads: the servers.
        metrics: what is counted.
        clock: the time.
        chance: a number from [0, 1), to spread waits.
    """

    def __init__(
        self,
        kubernetes: Kubernetes,
        heads: Heads,
        metrics: Metrics | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.queue: WorkQueue[Name] = WorkQueue()
        self.metrics = metrics or Metrics()
        self._kubernetes, self._heads, self._clock, self._chance = kubernetes, heads, clock, chance
        self._lock = threading.Lock()
        self._runs: dict[Name, dict[str, Any]] = {}
        self._clusters: dict[Name, ClusterView] = {}
        self._on: dict[Name, set[Name]] = defaultdict(set)
        self._where: dict[Name, Name] = {}
        self._written: dict[Name, float] = {}
        self._pods: dict[Name, tuple[float, tuple[Problem, ...]]] = {}
        self._unready: dict[Name, datetime] = {}
        self._refused: dict[Name, Problem] = {}
        self._waiting: dict[Name, datetime] = {}
        self._pauses: dict[Name, Iterator[float]] = {}
        self._told: dict[Name, str] = {}
        self._threads: list[threading.Thread] = []
        self.beat = time.monotonic()

    # ---- what is told from outside ----

    def run_changed(self, kind: str | None, body: Mapping[str, Any]) -> None:
        """A TrainingRun is there, has changed or is gone (``DELETED``), as a watch tells it."""
        name = _name(body)
        with self._lock:
            if kind == "DELETED":
                self._forget(name)
                return
            self._keep(name, body)
        self.queue.add(name)

    def cluster_changed(self, kind: str | None, body: Mapping[str, Any]) -> None:
        """A RayCluster is there, has changed or is gone."""
        name = _name(body)
        view = resources.cluster_view(body)
        with self._lock:
            before = self._clusters.get(name)
            if before is not None and _earlier(view.uid, view.version, before.uid, before.version):
                return
            if kind == "DELETED":
                self._clusters.pop(name, None)
            else:
                self._clusters[name] = view
            concerned = list(self._on.get(name, ()))
        if kind == "DELETED" or before is None or _bare(before) != _bare(view):
            for run in concerned:
                self.queue.add(run)

    def phases(self) -> list[str]:
        """The phases of all runs."""
        with self._lock:
            return [_phase(body) for body in self._runs.values()]

    def longest_wait_s(self) -> float:
        """Seconds for which the one run has waited for its cluster or driver that has waited longest.

        A wait begins where this process first sees it, so ask often.
        """
        now = self._clock()
        with self._lock:
            names = [name for name, body in self._runs.items() if _phase(body) in WAITING]
        self._waiting = {name: self._waiting.get(name, now) for name in names}
        return max(((now - since).total_seconds() for since in self._waiting.values()), default=0.0)

    # ---- threads ----

    def start(self, workers: int) -> None:
        """Begins to work, in that many threads."""
        for number in range(workers):
            thread = threading.Thread(target=self._work, name=f"reconcile-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the threads, each behind the look that it is at."""
        self.queue.close()
        ends = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        self._threads.clear()

    def knows_clusters(self, namespace: str) -> bool:
        """Whether Kubernetes is known to know RayClusters."""
        try:
            return self._kubernetes.knows_clusters(namespace)
        except SteadyhelmError as error:
            log.warning("whether there are RayClusters in %s is not known: %s", namespace, error)
            return False

    def healthy(self) -> bool:
        """Whether its threads live and get on."""
        return all(thread.is_alive() for thread in self._threads) and time.monotonic() - self.beat < 120

    def _work(self) -> None:
        while True:
            name = self.queue.get(timeout_s=5.0)
            self.beat = time.monotonic()
            if name is None:
                if self.queue.closed:
                    return
                continue
            try:
                self.look(name)
            finally:
                self.queue.done(name)

    # ---- one look ----

    def look(self, name: Name) -> None:
        """Looks at a TrainingRun once, and does what is to be done; whatever goes wrong is tried again later."""
        with self._lock:
            body = self._runs.get(name)
        if body is None:
            return
        began = time.perf_counter()
        try:
            again_s = self._look(name, body)
        except ConflictError:
            self._refresh(name)  # somebody wrote in between: what was decided does not count
            again_s = 0.0
        except Exception as error:  # one run's error must not end the others': it is counted, told, and tried again
            again_s = self._failed(name, error)
        else:
            self._pauses.pop(name, None)
        self.metrics.reconciles.observe(time.perf_counter() - began)
        if again_s is not None:
            self.queue.add(name, again_s * (1 + SPREAD * self._chance()))

    def _look(self, name: Name, body: dict[str, Any]) -> float | None:
        run = resources.desired(body)
        raw = body.get("spec") or {}
        observed = self._observe(name, run)
        decision = reconcile(run, raw, observed, self._clock(), self._chance())
        self._write(name, body, run, decision)
        for notice in decision.notices:
            self._tell(run, notice)
        for action in decision.actions:
            self._act(name, action, observed)
        return decision.again_s

    def _failed(self, name: Name, error: Exception) -> float:
        kind = type(error).__name__
        self.metrics.errors.labels(error=kind).inc()
        pause = next(self._pauses.setdefault(name, doubling(FIRST_PAUSE_S, LONGEST_PAUSE_S)))
        ours = isinstance(error, SteadyhelmError)
        log.log(logging.WARNING if ours else logging.ERROR, "%s/%s: %s", *name, error, exc_info=None if ours else error)
        with self._lock:
            body = self._runs.get(name)
        if body is not None and ours and self._told.get(name) != str(error):
            self._told[name] = str(error)
            notice = Notice(warning=True, reason=getattr(error, "reason", "Failed"), message=f"{error}")
            self._tell(resources.desired(body), notice)
        return pause

    def _observe(self, name: Name, run: Desired) -> Observed:
        if not run.held:
            return Observed()  # the finalizer comes first, whatever there is
        status = run.status
        given = run.frame.cluster if run.frame else None
        called = resources.cluster_name(run, given) if given else status.cluster
        makes = given is not None and given.template is not None and run.deleting_since is None
        asks = bool(status.cluster_uid) or not makes
        cluster = self._cluster(name, (run.namespace, called), asks=asks) if called else None
        if cluster is None:
            self._pods.pop(name, None)  # the next one's are others
            self._unready.pop(name, None)
            refused = self._refused.get(name)
            return Observed(problems=(refused,) if refused is not None else ())
        last, head = status.last, None
        asks = last is not None and (last.alive or run.deleting_since is not None)
        if asks and last is not None and cluster.head_ready:
            head = self._heads.view(cluster, last, resources.run_id(run))
        return Observed(cluster=cluster, head=head, problems=self._problems(name, cluster, run, head))

    def _cluster(self, run: Name, name: Name, *, asks: bool) -> ClusterView | None:
        """The cluster as last told; with ``asks``, that there is none is believed of the API server alone.

        A run that has none yet makes one, and hears then that there is one of that name.
        """
        with self._lock:
            self._on[name].add(run)
            self._where[run] = name
            known = self._clusters.get(name)
        if known is not None or not asks:
            return known
        body = self._kubernetes.cluster(*name)
        if body is None:
            return None
        view = resources.cluster_view(body)
        with self._lock:
            return self._clusters.setdefault(name, view)

    def _problems(self, name: Name, cluster: ClusterView, run: Desired, head: HeadView | None) -> tuple[Problem, ...]:
        """What is wrong with the cluster's pods, where something seems to be."""
        up = cluster.head_ready and (cluster.provisioned or cluster.owner != run.uid)
        document = head.document if head is not None else None
        waits = document is not None and bool(document.waiting or document.reason)
        mute = head is not None and document is None and (not head.reachable or run.status.phase == "Starting")
        if (up and not waits and not mute) or run.deleting_since is not None or cluster.suspend:
            self._pods.pop(name, None)
            self._unready.pop(name, None)
            return ()
        since = self._unready.setdefault(name, self._clock())
        when, found = self._pods.get(name, (float("-inf"), ()))
        fresh = cluster.created is not None and 0 <= (self._clock() - cluster.created).total_seconds() < FRESH_S
        if not fresh and time.monotonic() - when > PODS_S:
            pods = self._kubernetes.pods(cluster)
            late = (self._clock() - since).total_seconds() > PODLESS_S
            found = resources.problems(pods) if pods or not late else (resources.podless(cluster),)
            self._pods[name] = (time.monotonic(), found)
        return found

    # ---- what is written and done ----

    def _write(self, name: Name, body: dict[str, Any], run: Desired, decision: Decision) -> None:
        """Writes the status where it has changed; figures alone not each time. Raises ConflictError."""
        if decision.status == run.status:
            return
        old = body.get("status") or {}
        patch = resources.merge_patch(old, _written(decision.status))
        if not patch:
            return
        recent = time.monotonic() - self._written.get(name, float("-inf")) < PROGRESS_S
        if recent and patch.keys() <= PROGRESS:
            return
        fresh = self._kubernetes.write_status(run.namespace, run.name, body["metadata"]["resourceVersion"], patch)
        self._written[name] = time.monotonic()
        with self._lock:
            self._keep(name, fresh)

    def _tell(self, run: Desired, notice: Notice) -> None:
        """Posts an event; one that cannot be posted is not worth another look."""
        try:
            self._kubernetes.post_event(resources.event(run, notice, self._clock()))
        except SteadyhelmError as error:
            log.warning("%s/%s: the event %s was not posted: %s", run.namespace, run.name, notice.reason, error)

    def _act(self, name: Name, action: Action, observed: Observed) -> None:
        cluster = observed.cluster
        match action:
            case Hold() | Release():
                self._finalize(name, hold=isinstance(action, Hold))
            case CreateCluster(manifest=manifest):
                self._create(name, manifest)
            case SuspendCluster(cluster=own, suspend=suspend):
                try:
                    self._see(self._kubernetes.patch_cluster(own, resources.suspend_patch(own, suspend=suspend)))
                except ConflictError:
                    self._drop(own)
            case DeleteCluster(cluster=own):
                self._kubernetes.delete_cluster(own)
                self._drop(own)
            case Submit() if cluster is not None:
                self._heads.submit(cluster, action)
                self.metrics.submissions.inc()
            case StopJob(submission_id=job) if cluster is not None:
                self._heads.stop(cluster, job)
            case ForgetJob(submission_id=job) if cluster is not None:
                try:
                    self._heads.forget(cluster, job)
                except SteadyhelmError as error:
                    log.warning("%s/%s: the record of job %s stays: %s", *name, job, error)

    def _create(self, name: Name, manifest: Mapping[str, Any]) -> None:
        """Makes a cluster; that it is refused is seen by the next look, for the status to say it."""
        found: Mapping[str, Any] | None = None
        refused: Problem | None = None
        try:
            found = self._kubernetes.create_cluster(manifest)
        except ConflictError:  # there is one, of which the watch has not told yet
            found = self._kubernetes.cluster(name[0], manifest["metadata"]["name"])
        except MissingError:
            refused = Problem(reason="NoKubeRay", message="Kubernetes knows no RayClusters: install KubeRay")
        except RequestRefusedError as error:
            remedy = "correct spec.cluster.template, or what else it names"
            refused = Problem(reason="ClusterRefused", message=f"the RayCluster is refused: {error} ({remedy})"[:2000])
        if refused is None:
            self._refused.pop(name, None)
        else:
            self._refused[name] = refused
            log.warning("%s/%s: %s", *name, refused.message)
        if found is not None:
            self._see(found)

    def _finalize(self, name: Name, *, hold: bool) -> None:
        with self._lock:
            body = self._runs.get(name)
        if body is None:
            return
        metadata = body["metadata"]
        others = [found for found in metadata.get("finalizers") or () if found != FINALIZER]
        try:
            fresh = self._kubernetes.write_finalizers(
                *name, metadata["resourceVersion"], [*others, FINALIZER] if hold else others
            )
        except MissingError:
            return  # it is gone already
        with self._lock:
            if hold or others:
                self._keep(name, fresh)
            else:
                self._forget(name)

    def _refresh(self, name: Name) -> None:
        try:
            fresh = self._kubernetes.run(*name)
        except MissingError:
            with self._lock:
                self._forget(name)
        except SteadyhelmError as error:
            log.warning("%s/%s: %s", *name, error)
        else:
            with self._lock:
                self._keep(name, fresh)

    # ---- what is remembered; the lock is the caller's ----

    def _keep(self, name: Name, body: Mapping[str, Any]) -> None:
        known = self._runs.get(name)
        if known is not None and _older(body, known):
            return  # a watch tells late what was read or written since
        metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
        self._runs[name] = {**body, "metadata": metadata}

    def _forget(self, name: Name) -> None:
        self._runs.pop(name, None)
        where = self._where.pop(name, None)
        if where is not None:
            self._on[where].discard(name)
            if not self._on[where]:
                del self._on[where]
        for kept in (self._written, self._pods, self._unready, self._refused, self._pauses, self._told):
            kept.pop(name, None)

    def _see(self, body: Mapping[str, Any]) -> None:
        self.cluster_changed("MODIFIED", body)

    def _drop(self, cluster: ClusterView) -> None:
        with self._lock:
            self._clusters.pop((cluster.namespace, cluster.name), None)


def _name(body: Mapping[str, Any]) -> Name:
    return body["metadata"]["namespace"], body["metadata"]["name"]


def _phase(body: Mapping[str, Any]) -> str:
    return str((body.get("status") or {}).get("phase", "Pending"))


def _older(body: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
    first, second = body["metadata"], than["metadata"]
    versions = first.get("resourceVersion", ""), second.get("resourceVersion", "")
    return _earlier(first.get("uid", ""), versions[0], second.get("uid", ""), versions[1])


def _earlier(uid: str, version: str, than_uid: str, than_version: str) -> bool:
    """Whether a version of an object is an earlier one of the same object; versions are numbers that grow."""
    numbers = version.isdigit() and than_version.isdigit()
    return uid == than_uid and numbers and int(version) < int(than_version)


def _bare(cluster: ClusterView) -> ClusterView:
    """The cluster without its version, which changes with every heartbeat."""
    return replace(cluster, version="")


def _written(status: Status) -> dict[str, Any]:
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)
