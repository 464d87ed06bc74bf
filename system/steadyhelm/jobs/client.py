"""A client of Ray's Jobs API (REST and, for logs that grow, WebSocket)."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import re
import shlex
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from steadyhelm.errors import ConfigError, RequestRefusedError, TokenRefusedError, UnreachableError
from steadyhelm.jobs.head import API_PORT
from steadyhelm.jobs.token import bearer
from steadyhelm.jobs.wire import UpgradeRefusedError, WebSocket, exchange, server

T = TypeVar("T")
JobState = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]
"""What Ray says of a job."""
ENDED: frozenset[str] = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
"""States in which a job stays."""
QUIET_S = 15.0
"""A log that says nothing for so long has its job asked for, which may have ended."""
PATIENCE_S = 300.0
"""How long a log is followed without an answer of the cluster: a head that is lost comes back."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
"""Bounds of the pause before another try."""
LATEST_MS = 253_402_300_799_000
"""The end of the year 9999."""
SLOW_S = 120.0
"""Deadline of what the cluster works for: an upload, a whole log, a job's start, which waits for its agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the cluster knows it; times are Unix seconds.

    Example: ``Job(submission_id="digits-transformers.1", status="RUNNING", metadata={"run": "digits-transformers"})``
    """

    submission_id: str
    status: JobState
    message: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    start_time: float | None = None
    end_time: float | None = None
    driver_exit_code: int | None = None

    @property
    def ended(self) -> bool:
        """Whether it will change no more."""
        return self.status in ENDED

    @classmethod
    def of(cls, answer: Any) -> Job:
        """The job of an answer of the API. Raises ValueError where it is none."""
        found = _Answer.model_validate(answer)
        return cls(
            submission_id=found.submission_id or "",
            status=found.status,
            message=found.message or "",
            metadata=found.metadata or {},
            start_time=found.start_time / 1000 if found.start_time else None,
            end_time=found.end_time / 1000 if found.end_time else None,
            driver_exit_code=found.driver_exit_code,
        )


Milliseconds = Annotated[float, Field(ge=0, le=LATEST_MS)]


class _Answer(BaseModel):
    """A job as the API tells it."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    submission_id: str | None = None
    status: JobState
    message: str | None = None
    metadata: dict[str, str] | None = None
    start_time: Milliseconds | None = None
    end_time: Milliseconds | None = None
    driver_exit_code: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What a job is to be. ``working_dir`` is what ``Jobs.upload`` returned. Who may ask the API reads all of it.

    Example: ``JobRequest(submission_id="digits.1", entrypoint="exec steadyhelm run run.yaml --address auto")``
    """

    submission_id: str
    entrypoint: str
    working_dir: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The body of the request."""
        return {
            "submission_id": self.submission_id,
            "entrypoint": self.entrypoint,
            "runtime_env": {"working_dir": self.working_dir} if self.working_dir else {},
            "metadata": dict(self.metadata),
        }


def doubling(first_s: float, longest_s: float) -> Iterator[float]:
    """Pauses before one try after the other: each twice the one before it, up to a bound."""
    pause = first_s
    while True:
        yield pause
        pause = min(2 * pause, longest_s)


def patiently(call: Callable[[], T], say: Callable[[str], None], patience_s: float = SLOW_S) -> T:
    """What ``call`` returns, made again while it raises UnreachableError, for so long; ``say`` hears of it, once.

    A head that has just come takes no jobs yet.
    """
    ends, pauses, said = time.monotonic() + patience_s, doubling(FIRST_PAUSE_S, LONGEST_PAUSE_S), False
    while True:
        try:
            return call()
        except UnreachableError as error:
            if time.monotonic() > ends:
                raise
            if not said:
                say(f"{error} Tries again for {patience_s:g} s.")
            said = True
        time.sleep(next(pauses))


def submission_id(run: str, attempt: int) -> str:
    """The id of the ``attempt``-th job, from 1, of the run with that id: ``"digits-transformers.2"``."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', run)}.{attempt}"


def entrypoint(
    file: str, run: str, *, sets: Sequence[str] = (), take_over: bool = False, accept_changes: bool = False
) -> str:
    """The command of a job that drives the run with id ``run``, whose run file is ``file`` in the working directory."""
    command = ["steadyhelm", "run", file, "--id", run, "--address", "auto", "--log-format", "json"]
    command += [f"--set={item}" for item in sets]
    command += ["--take-over"] * take_over + ["--accept-changes"] * accept_changes
    return f"exec {shlex.join(command)}"  # Ray sends its signals to the shell that would else stand before it


class Jobs:
    """The Jobs API at ``address``. Every call may be repeated, and ends within its deadline.

    Args:
        address: ``http://host:port`` (https too).
        token: the API's token; empty sends none. It is in no message.
        timeout_s: deadline of a request.

    All methods raise UnreachableError where nobody answers or the cluster cannot now, TokenRefusedError, and
    RequestRefusedError. Raises ConfigError for an address that is none, TokenRefusedError for such a token.
    """

    def __init__(self, address: str, token: str = "", timeout_s: float = 10.0) -> None:
        self.address = address.rstrip("/")
        try:
            self._url = server(self.address)
        except ValueError:
            raise ConfigError(
                f"{address!r} is no address of a Ray API: give http://host:port, its port is mostly {API_PORT}"
            ) from None
        self._path = self._url.path.rstrip("/")
        self._headers = bearer(token)
        self._timeout_s = timeout_s

    def get(self, submission_id: str) -> Job | None:
        """The job of that id; None where there is none."""
        status, body = self._ask("GET", f"/api/jobs/{quote(submission_id, safe='')}", missing=True)
        return None if status == 404 else self._job(self._json(body, dict))

    def submit(self, request: JobRequest) -> Job:
        """The job of ``request``: the one that is there under its id, or a new one."""
        known = self.get(request.submission_id)
        if known is not None:
            return known
        try:
            self._ask("POST", "/api/jobs/", json.dumps(request.to_json()).encode(), deadline_s=SLOW_S)
        except (UnreachableError, RequestRefusedError):
            # Ray answers with an error to an id that somebody else was faster with, and an answer may be lost.
            known = self.get(request.submission_id)
            if known is None:
                raise
            return known
        return self.get(request.submission_id) or Job(submission_id=request.submission_id, status="PENDING")

    def stop(self, submission_id: str) -> bool:
        """Has the job's process told to end (SIGTERM); returns at once, and whether there was one to tell."""
        _, body = self._ask("POST", f"/api/jobs/{quote(submission_id, safe='')}/stop")
        return bool(self._json(body, dict).get("stopped"))

    def delete(self, submission_id: str) -> None:
        """Makes the cluster forget a job that has ended; one that is not there is forgotten already."""
        self._ask("DELETE", f"/api/jobs/{quote(submission_id, safe='')}", missing=True)

    def logs(self, submission_id: str) -> str:
        """What the job has written so far."""
        _, body = self._ask("GET", f"/api/jobs/{quote(submission_id, safe='')}/logs", deadline_s=SLOW_S)
        return str(self._json(body, dict).get("logs") or "")

    def follow(self, submission_id: str, patience_s: float = PATIENCE_S) -> Iterator[str]:
        """Yields what the job writes, from its beginning to its end; each character once, whatever breaks meanwhile.

        Raises UnreachableError where the cluster does not answer for ``patience_s``, RequestRefusedError where the job
        is gone.
        """
        seen, pauses, answered = 0, doubling(FIRST_PAUSE_S, LONGEST_PAUSE_S), time.monotonic()
        while True:
            behind, heard = seen, False
            broken: UnreachableError | None = None
            try:
                for text in self._tail(submission_id):
                    heard = True
                    fresh = text[behind:]
                    behind -= len(text) - len(fresh)
                    seen += len(fresh)
                    if fresh or not text:
                        answered, pauses = time.monotonic(), doubling(FIRST_PAUSE_S, LONGEST_PAUSE_S)
                    if fresh:
                        yield fresh
            except UnreachableError as error:  # the job may have ended all the same
                broken = error
            try:
                job = self.get(submission_id)
                rest = self.logs(submission_id)[seen:] if job is not None and job.ended else ""
            except UnreachableError as error:
                broken = error
            else:
                if heard or broken is None:
                    answered = time.monotonic()
                if job is None:
                    raise RequestRefusedError(f"There is no job {submission_id!r} at {self.address}.")
                if job.ended:
                    if rest:
                        yield rest
                    return
            if broken is not None and time.monotonic() - answered > patience_s:
                raise broken
            time.sleep(next(pauses))

    def _tail(self, submission_id: str) -> Iterator[str]:
        """What the job writes, from its beginning, until the connection or the job ends; an empty text now and then
        where it writes nothing, yet lives. Raises UnreachableError.
        """
        path = f"{self._path}/api/jobs/{quote(submission_id, safe='')}/logs/tail"
        try:
            listening = WebSocket(self._url, path, self._headers, self._timeout_s)
        except UpgradeRefusedError as error:
            if error.status == 404:
                return  # there is no such job, as the next question shows
            self._check(error.status, error.text.encode(), "GET", path)
            raise UnreachableError(f"{self.address} follows no logs (HTTP {error.status}).") from error
        except OSError as error:
            raise self._silent(error) from error
        try:
            while True:
                try:
                    text = listening.receive(QUIET_S)
                except TimeoutError:
                    job = self.get(submission_id)
                    if job is None or job.ended:
                        return
                    text = ""
                if text is None:
                    return
                yield text
        except OSError as error:
            raise self._silent(error) from error
        finally:
            listening.close()

    def upload(self, files: Mapping[str, bytes]) -> str:
        """Puts ``files`` (by paths with slashes) where jobs can have them as their working directory; returns its URI.

        The same files have the same URI, and are sent once.
        """
        data = _zipped(files)
        name = f"_ray_pkg_{hashlib.sha256(data).hexdigest()[:32]}.zip"
        path = f"/api/packages/gcs/{name}"
        status, _ = self._ask("GET", path, missing=True)
        if status == 404:
            self._ask("PUT", path, data, deadline_s=SLOW_S)
        return f"gcs://{name}"

    def list(self) -> Sequence[Job]:
        """All jobs that were submitted by this API, oldest first."""
        _, body = self._ask("GET", "/api/jobs/")
        all_jobs = self._json(body, list)
        found = [self._job(job) for job in all_jobs if not isinstance(job, dict) or job.get("submission_id")]
        return sorted(found, key=lambda job: job.start_time or 0.0)

    def _ask(
        self, method: str, path: str, body: bytes | None = None, *, missing: bool = False, deadline_s: float = 0.0
    ) -> tuple[int, bytes]:
        """Status and body of an answer that is none of an error's; 404 too where ``missing`` is a good answer."""
        headers = dict(self._headers)
        if body is not None:
            headers["Content-Type"] = "application/json" if method == "POST" else "application/octet-stream"
        try:
            status, found = exchange(self._url, method, self._path + path, body, headers, deadline_s or self._timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error
        if not (missing and status == 404):
            self._check(status, found, method, path)
        return status, found

    def _silent(self, error: Exception) -> UnreachableError:
        text = f"The Ray API at {self.address} does not answer ({_words(error)}): see whether the cluster is up"
        return UnreachableError(f"{text}, and whether this machine reaches it.", FIRST_PAUSE_S)

    def _check(self, status: int, body: bytes, method: str, path: str) -> None:
        """Raises the error that ``status`` means, if it means one."""
        if status < 400:
            return
        if status == 401:
            raise TokenRefusedError(f"{self.address} asks for a token: set RAY_AUTH_TOKEN, or give --token-file.")
        if status == 403:
            raise TokenRefusedError(f"{self.address} refuses the token: it is another cluster's, or an old one.")
        lines = body.decode("utf-8", "replace").strip().splitlines() or ["no more is known"]
        text = f"{self.address} answers HTTP {status} to {method} {path}: {lines[-1][:300]}"
        if status >= 500:
            raise UnreachableError(text, FIRST_PAUSE_S)
        raise RequestRefusedError(text)

    def _json(self, body: bytes, kind: type[T]) -> T:
        try:
            found = json.loads(body)
        except ValueError as error:
            raise self._strange() from error
        if not isinstance(found, kind):
            raise self._strange()
        return found

    def _job(self, answer: Any) -> Job:
        try:
            return Job.of(answer)
        except ValueError as error:
            raise self._strange() from error

    def _strange(self) -> RequestRefusedError:
        return RequestRefusedError(f"{self.address} does not answer as a Ray API: give the dashboard's.")


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip of ``files`` that depends on nothing else."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return packed.getvalue()
