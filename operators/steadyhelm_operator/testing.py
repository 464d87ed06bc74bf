"""Stand-ins for tests and benchmarks: heads of Ray clusters over HTTP, and a Kubernetes API in memory."""

from __future__ import annotations

import copy
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from steadyhelm.telemetry.status import Checkpoint, RunStatus, Version
from steadyhelm.telemetry.status import Rollouts as Engines

from steadyhelm_operator.client import ConflictError, MissingError
from steadyhelm_operator.state import ClusterView

Name = tuple[str, str]


@dataclass(slots=True, kw_only=True)
class FakeJob:
    """A job of a fake head; ``seconds`` after its start it has reached its last iteration."""

    metadata: Mapping[str, str]
    entrypoint: str
    working_dir: str
    iterations: int
    began: float
    status: str = "RUNNING"
    message: str = ""
    exit_code: int | None = None


@dataclass(slots=True, kw_only=True)
class FakeHead:
    """What one head knows."""

    jobs: dict[str, FakeJob] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    up: bool = True
    iteration: int = 0


class FakeHeads:
    """The Jobs API and the status of any number of heads, at ``http://host:port/<namespace>/<cluster>``.

    Drivers commit an iteration every ``pace_s`` seconds, and end well behind the last.

    Args:
        pace_s: seconds of an iteration; 0 lets tests move the drivers themselves.
        iterations: of every run.
        token: what requests have to bear; empty asks for none.
    """

    def __init__(self, pace_s: float = 0.0, iterations: int = 60, token: str = "") -> None:
        self.pace_s, self.iterations, self.token = pace_s, iterations, token
        self.heads: dict[Name, FakeHead] = {}
        self.lock = threading.Lock()
        self.url = ""
        self.requests = 0

    @contextmanager
    def served(self) -> Iterator[str]:
        """Serves; yields the form of the URL with ``{namespace}`` and ``{name}`` in it."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}/{{namespace}}/{{name}}"
        try:
            yield self.url
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def head(self, namespace: str, name: str) -> FakeHead:
        """A cluster's head."""
        return self.heads.setdefault((namespace, name), FakeHead())

    def live(self, namespace: str, name: str) -> list[str]:
        """Ids of the jobs whose drivers live."""
        with self.lock:
            return [found for found, job in self.head(namespace, name).jobs.items() if job.status == "RUNNING"]

    def end(self, namespace: str, name: str, status: str, exit_code: int | None = None, message: str = "") -> None:
        """Ends the drivers of a head."""
        with self.lock:
            for job in self.head(namespace, name).jobs.values():
                if job.status == "RUNNING":
                    job.status, job.exit_code, job.message = status, exit_code, message

    def lose(self, namespace: str, name: str) -> None:
        """A head's pod dies, with its drivers and what it knew."""
        with self.lock:
            iteration = self.head(namespace, name).iteration
            self.heads[namespace, name] = FakeHead(iteration=iteration)

    def move(self, head: FakeHead) -> None:
        """Lets drivers get on; the lock is the caller's."""
        for job in head.jobs.values():
            if job.status == "RUNNING" and self.pace_s:
                head.iteration = min(self.iterations, int((time.monotonic() - job.began) / self.pace_s))
            if job.status == "RUNNING" and head.iteration >= self.iterations:
                job.status, job.exit_code = "SUCCEEDED", 0

    def document(self, head: FakeHead) -> RunStatus | None:
        """What the driver says; None where none lives. The lock is the caller's."""
        for name, job in head.jobs.items():
            if job.status == "RUNNING":
                return RunStatus(
                    run=job.metadata["run"],
                    submission_id=name,
                    attempt=int(job.metadata["attempt"]),
                    phase="running",
                    iteration=head.iteration,
                    iterations=self.iterations,
                    version=Version(iteration=head.iteration, attempt=1),
                    reward=0.5,
                    staleness=0.0,
                    rollouts=Engines(ready=1, desired=1),
                    checkpoint=Checkpoint(iteration=head.iteration - head.iteration % 10, key="run/checkpoints/0.1"),
                )
        return None

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Status and body of the answer to a request."""
        self.requests += 1
        if self.token and token != f"Bearer {self.token}":
            return (403 if token else 401), "token"
        _, namespace, name, *rest = path.split("/")
        with self.lock:
            head = self.head(namespace, name)
            if not head.up:
                return 503, "no head"
            self.move(head)
            if rest == ["status"]:
                document = self.document(head)
                return (503, "no driver") if document is None else (200, document.model_dump(mode="json"))
            if rest[:2] == ["api", "packages"]:
                return self._package(head, method, rest[-1], body)
            return self._jobs(head, method, rest[2:], body)

    def _package(self, head: FakeHead, method: str, name: str, body: bytes) -> tuple[int, Any]:
        if method == "PUT":
            head.packages[name] = body
        return (200, {}) if name in head.packages else (404, "no such package")

    def _jobs(self, head: FakeHead, method: str, place: list[str], body: bytes) -> tuple[int, Any]:
        match method, place:
            case "POST", [""]:
                asked = json.loads(body)
                if asked["submission_id"] in head.jobs:
                    return 500, "a job of that id is there"  # as Ray answers
                head.jobs[asked["submission_id"]] = FakeJob(
                    metadata=asked["metadata"],
                    entrypoint=asked["entrypoint"],
                    working_dir=asked["runtime_env"].get("working_dir", ""),
                    iterations=self.iterations,
                    began=time.monotonic() - head.iteration * self.pace_s,
                )
                return 200, {"submission_id": asked["submission_id"]}
            case "GET", [name] if name in head.jobs:
                job = head.jobs[name]
                return 200, {
                    "submission_id": name,
                    "status": job.status,
                    "message": job.message,
                    "metadata": dict(job.metadata),
                    "driver_exit_code": job.exit_code,
                }
            case "POST", [name, "stop"] if name in head.jobs:
                found = head.jobs[name].status == "RUNNING"
                if found:
                    head.jobs[name].status = "STOPPED"
                return 200, {"stopped": found}
            case "DELETE", [name] if name in head.jobs:
                del head.jobs[name]
                return 200, {"deleted": True}
        return 404, "no such job"


def _handler(heads: FakeHeads) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, found = heads.answer(self.command, self.path, body, self.headers.get("Authorization", ""))
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    return Handler


class MemoryKubernetes:
    """The part of the Kubernetes API that the operator uses, in memory: versions grow, writes are under conditions."""

    def __init__(self) -> None:
        self.runs: dict[Name, dict[str, Any]] = {}
        self.clusters: dict[Name, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.secrets: dict[tuple[str, str, str], str] = {}
        self.pod_list: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.watchers: list[Callable[[str, str, dict[str, Any]], None]] = []
        self._versions = itertools.count(1)
        self._lock = threading.RLock()

    def put(self, kind: str, body: Mapping[str, Any], verb: str = "MODIFIED") -> dict[str, Any]:
        """Keeps a ``run`` or a ``cluster`` as a user or KubeRay would write it; watchers are told."""
        with self._lock:
            made = copy.deepcopy(dict(body))
            metadata = made["metadata"]
            metadata["resourceVersion"] = str(next(self._versions))
            name = metadata["namespace"], metadata["name"]
            table = self.runs if kind == "run" else self.clusters
            gone = "deletionTimestamp" in metadata and not metadata.get("finalizers")
            if gone:
                table.pop(name, None)
            else:
                table[name] = made
            for tell in self.watchers:
                tell(kind, "DELETED" if gone else verb, copy.deepcopy(made))
            if gone and kind == "run":
                self._collect(metadata["uid"])
            return copy.deepcopy(made)

    def _collect(self, uid: str) -> None:
        for body in list(self.clusters.values()):
            if any(owner["uid"] == uid for owner in body["metadata"].get("ownerReferences", ())):
                self.put("cluster", {**body, "metadata": {**body["metadata"], "deletionTimestamp": "now"}})

    def run(self, namespace: str, name: str) -> dict[str, Any]:
        """As the real one."""
        self.calls.append("GET run")
        return self._found(self.runs, namespace, name)

    def write_status(self, namespace: str, name: str, version: str, patch: Mapping[str, Any]) -> dict[str, Any]:
        """As the real one."""
        self.calls.append("PATCH status")
        with self._lock:
            body = self._found(self.runs, namespace, name, version)
            return self.put("run", {**body, "status": _merged(body.get("status") or {}, patch)})

    def write_finalizers(self, namespace: str, name: str, version: str, finalizers: list[str]) -> dict[str, Any]:
        """As the real one."""
        self.calls.append("PATCH run")
        with self._lock:
            body = self._found(self.runs, namespace, name, version)
            return self.put("run", {**body, "metadata": {**body["metadata"], "finalizers": finalizers}})

    def cluster(self, namespace: str, name: str) -> dict[str, Any] | None:
        """As the real one."""
        self.calls.append("GET cluster")
        with self._lock:
            return copy.deepcopy(self.clusters.get((namespace, name)))

    def create_cluster(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """As the real one."""
        self.calls.append("POST cluster")
        with self._lock:
            metadata = manifest["metadata"]
            if (metadata["namespace"], metadata["name"]) in self.clusters:
                raise ConflictError("a RayCluster of that name is there")
            uid = f"cluster-{next(self._versions)}"
            return self.put("cluster", {**manifest, "metadata": {**metadata, "uid": uid}}, "ADDED")

    def patch_cluster(self, cluster: ClusterView, patch: list[dict[str, Any]]) -> dict[str, Any]:
        """As the real one, for the patches that the operator makes."""
        self.calls.append("PATCH cluster")
        with self._lock:
            body = self._found(self.clusters, cluster.namespace, cluster.name)
            held = {"/metadata/uid": "uid", "/metadata/resourceVersion": "resourceVersion"}
            *tests, change = patch
            for test in tests:
                if body["metadata"][held[test["path"]]] != test["value"]:
                    raise ConflictError("a test of the patch does not hold")
            return self.put("cluster", {**body, "spec": {**body["spec"], "suspend": change["value"]}})

    def delete_cluster(self, cluster: ClusterView) -> None:
        """As the real one."""
        self.calls.append("DELETE cluster")
        with self._lock:
            body = self.clusters.get((cluster.namespace, cluster.name))
            if body is not None and body["metadata"]["uid"] == cluster.uid:
                self.put("cluster", {**body, "metadata": {**body["metadata"], "deletionTimestamp": "now"}})

    def pods(self, cluster: ClusterView) -> list[dict[str, Any]]:
        """As the real one."""
        self.calls.append("GET pods")
        return self.pod_list

    def secret(self, namespace: str, name: str, key: str) -> str:
        """As the real one."""
        self.calls.append("GET secret")
        if (namespace, name, key) not in self.secrets:
            raise MissingError(f"Secret {name!r} in {namespace} has no {key!r}")
        return self.secrets[namespace, name, key]

    def post_event(self, event: Mapping[str, Any]) -> None:
        """As the real one."""
        self.calls.append("POST event")
        self.events.append(dict(event))

    def _found(
        self, table: Mapping[Name, dict[str, Any]], namespace: str, name: str, version: str = ""
    ) -> dict[str, Any]:
        with self._lock:
            body = table.get((namespace, name))
            if body is None:
                raise MissingError(f"there is no {name!r} in {namespace}")
            if version and body["metadata"]["resourceVersion"] != version:
                raise ConflictError("it was written in between")
            return copy.deepcopy(body)


def _merged(old: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """``old`` with a JSON merge patch."""
    made = dict(old)
    for name, value in patch.items():
        if value is None:
            made.pop(name, None)
        else:
            made[name] = _merged(made.get(name) or {}, value) if isinstance(value, dict) else value
    return made


READY = {
    "state": "ready",
    "conditions": [{"type": "HeadPodReady", "status": "True"}, {"type": "RayClusterProvisioned", "status": "True"}],
}
"""Status of a RayCluster whose pods are all ready."""
SUSPENDED = {
    "state": "suspended",
    "conditions": [{"type": "HeadPodReady", "status": "False"}, {"type": "RayClusterSuspended", "status": "True"}],
}
"""Status of a RayCluster that has given its nodes back."""
