"""Heads of Ray clusters as a server of HTTP: the Jobs API, and the status of the run that a driver there drives."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from steadyhelm.telemetry.status import Checkpoint, RunStatus, Version
from steadyhelm.telemetry.status import Rollouts as Engines

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
        server = _Server(("127.0.0.1", 0), _handler(self))
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    """One server is a thousand heads here: whom a short queue turned away would try again a second later."""


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
