"""Where a run stands, as one document: the model of it, and its answer to ``GET /status``.

The driver serves it while it lives. For whoever asks later, it is the last line of JSON logs on stdout and
``status.json`` among the run's objects.
"""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import isfinite
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

Phase = Literal["starting", "running", "stopping", "finished", "failed", "stopped"]
"""``finished``, ``failed`` and ``stopped`` are how a driver ended."""
PATH = "/status"
ANSWER_S = 10.0
"""How long a client may take over its request."""


class Part(BaseModel):
    """A part of the document; what a newer driver adds is left out."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Rollouts(Part):
    """Rollout workers that take work, and how many are wanted."""

    ready: int = 0
    desired: int = 0


class Version(Part):
    """The newest policy version that is published."""

    iteration: int
    attempt: int


class Checkpoint(Part):
    """The checkpoint that a resume begins with; ``key`` names its folder in the store."""

    iteration: int
    key: str


Figure = Annotated[float | None, AfterValidator(lambda value: value if value is None or isfinite(value) else None)]
"""A number; what is none, such as the mean of nothing, is None, as JSON has no other word for it."""


class RunStatus(Part):
    """The document.

    ``iteration`` of ``iterations`` is committed. ``accuracy`` is the last evaluation's; ``staleness`` is in versions,
    over the last batch's tokens. ``waiting`` says in words what the run waits for. ``losses`` counts the actors and
    learner groups that this driver has lost and replaced, ``lost`` tells of the last. ``reason`` is the class of what
    is wrong (``errors.reason_of``; ``NoCapacity``: there is no room for an actor), empty where nothing is; ``message``
    is for people. Times are RFC 3339.

    Example: ``RunStatus(run="digits-transformers", store="s3://runs", attempt=1, phase="running", iteration=12)``
    """

    run: str = ""
    store: str = ""
    attempt: int = 0
    submission_id: str = ""
    phase: Phase = "starting"
    iteration: int = 0
    iterations: int = 0
    version: Version | None = None
    reward: Figure = None
    accuracy: Figure = None
    staleness: Figure = None
    rollouts: Rollouts = Rollouts()
    checkpoint: Checkpoint | None = None
    waiting: tuple[str, ...] = ()
    losses: int = 0
    lost: str = ""
    reason: str = ""
    message: str = ""
    started_at: str = ""
    updated_at: str = ""

    def line(self) -> str:
        """The document on one line."""
        return self.model_dump_json()

    @classmethod
    def from_log(cls, log: str) -> RunStatus | None:
        """The last document among the lines of a job's log; None where there is none."""
        for line in reversed(log.splitlines()):
            if line.startswith('{"run":') and '"phase":' in line:
                try:
                    return cls.model_validate_json(line)
                except ValidationError:
                    continue
        return None


def now() -> str:
    """This moment as the document writes it: ``2026-11-21T21:00:00Z``."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def serve_status(
    document: Callable[[], RunStatus], host: str, port: int, token: str = ""
) -> tuple[int, Callable[[], None]]:
    """Answers ``GET /status`` at ``host:port`` in daemon threads; the port (0 chose a free one) and a function to stop.

    With a ``token``, a request has to bear it as Ray's API wants it, in ``Authorization`` or, through proxies that take
    that away, ``X-Ray-Authorization``; else it is answered HTTP 401. Raises OSError where the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = ANSWER_S

        def do_GET(self) -> None:
            given = self.headers.get("Authorization") or self.headers.get("X-Ray-Authorization") or ""
            if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                self._answer(401, json.dumps({"error": "the Ray API's token is missing or wrong in Authorization"}))
            elif self.path.partition("?")[0] != PATH:
                self._answer(404, json.dumps({"error": f"there is {PATH} and nothing else"}))
            else:
                self._answer(200, document().line())

        def _answer(self, status: int, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Says nothing: who asks is not the run's business."""

    server = ThreadingHTTPServer((host, port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="status", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop
