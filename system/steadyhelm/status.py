"""The driver's side of a run's status: what events say of it, where it is served, and what is left at the end."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from steadyhelm.errors import FencedError, RetryableError, reason_of
from steadyhelm.jobs.token import api_token
from steadyhelm.store import ObjectStore
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.log import CommitLog
from steadyhelm.telemetry import EvalDone, Event, EventSink, IterationDone, Notice, RunStarted, ServiceState
from steadyhelm.telemetry import metrics as names
from steadyhelm.telemetry.logs import redact, secret_values
from steadyhelm.telemetry.status import RunStatus, now, serve_status

ADDRESS = "STEADYHELM_STATUS_ADDRESS"
"""Environment variable: ``host:port`` where a driver serves its status; none is served where it is not set."""
NO_CAPACITY = "NoCapacity"
"""The reason where an actor finds no place in the cluster."""
AGAIN_S = 10.0
"""Seconds to the next try where somebody else has the port."""
LOST_CHARACTERS = 300
"""Most of a loss that the document tells: Ray's words about it may fill a page."""
LONG_S = 30.0
"""What a service has been doing for longer than this is waited for, as the document says."""


class StatusBoard:
    """A run's status, put together from events; may be asked from any thread.

    Args:
        clock: seconds, as ``ServiceState.since_s``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._secrets = secret_values(os.environ)
        self._services: dict[str, ServiceState] = {}
        self._kept = RunStatus(started_at=now(), updated_at=now(), submission_id=_submission_id(os.environ))

    def note(self, **known: Any) -> None:
        """Puts fields of the document in."""
        with self._lock:
            self._kept = self._kept.model_copy(update={**known, "updated_at": now()})

    def take(self, event: Event) -> None:
        """Takes one event in."""
        known: dict[str, Any] = {}
        if isinstance(event, ServiceState):
            with self._lock:
                self._services.pop(event.service, None)
                if event.state:
                    self._services[event.service] = event
            return
        if isinstance(event, RunStarted):
            known = {"run": event.run, "iterations": event.iterations, "iteration": event.first_iteration - 1}
        elif isinstance(event, IterationDone):
            found = {"reward": names.REWARD_MEAN, "staleness": names.STALENESS_MEAN}
            known = {field: event.metrics[name] for field, name in found.items() if name in event.metrics}
            known["message"] = ""  # what was wrong before it
        elif isinstance(event, EvalDone):
            known = {"accuracy": event.metrics.get(names.EVAL_ACCURACY)}
        elif isinstance(event, Notice) and event.level != "info":
            known = {"message": redact(event.text, self._secrets)}
            if event.loss:
                known |= {"losses": self._kept.losses + 1, "lost": known["message"][:LOST_CHARACTERS]}
        self.note(**known)

    def ended(self, code: int) -> None:
        """The driver returns ``code``: it is finished, or a signal stopped it."""
        self.note(phase="stopped" if code else "finished", reason="Stopped" if code else "")
        with self._lock:
            self._services.clear()

    def failed(self, error: BaseException) -> None:
        """The driver raises ``error``; a failure before that stays what ended the run."""
        if self._kept.phase == "failed":
            return
        reason, lacking = reason_of(error), self.document().reason
        if isinstance(error, RetryableError) and lacking:
            reason = lacking
        with self._lock:
            self._services.clear()
        self.note(phase="failed", reason=reason, message=redact(str(error), self._secrets))

    def document(self) -> RunStatus:
        """The status now."""
        with self._lock:
            services, kept = list(self._services.values()), self._kept
        lacks = [f"{service.service}: {service.lacks}" for service in services if service.lacks]
        waits = [
            f"{service.service}: {service.state}, for {self._clock() - service.since_s:.0f} s"
            for service in services
            if not service.waiting and not service.lacks and self._clock() - service.since_s > LONG_S
        ]
        waiting = tuple(redact(text, self._secrets) for text in lacks + waits)
        lacking = {"reason": NO_CAPACITY, "message": waiting[0]} if lacks and not kept.reason else {}
        return kept.model_copy(update={"waiting": waiting, **lacking})


@contextmanager
def served(board: StatusBoard, tell: EventSink, again_s: float = AGAIN_S) -> Iterator[EventSink]:
    """Yields ``tell`` with ``board`` behind it, served at the address that the environment names.

    A port that is taken is a notice, and is tried again every ``again_s`` seconds: several runs share a head.
    """
    stop = _serve(board, tell, again_s)

    def told(event: Event) -> None:
        board.take(event)
        tell(event)

    try:
        yield told
    except BaseException as error:
        board.failed(error)
        raise
    finally:
        stop()


def _serve(board: StatusBoard, tell: EventSink, again_s: float) -> Callable[[], None]:
    host, _, port = os.environ.get(ADDRESS, "").rpartition(":")
    if not port:
        return lambda: None
    stops: list[Callable[[], None]] = []

    def begin() -> Exception | None:
        try:
            stops.append(serve_status(board.document, host.strip("[]"), int(port), api_token(os.environ))[1])
        except (OSError, OverflowError, ValueError) as error:
            return error
        return None

    def try_again() -> None:
        while not over.wait(again_s):
            if begin() is None:
                tell(Notice(text=f"This run's status is served at {host}:{port} now."))
                return

    over, waiting = threading.Event(), threading.Thread(target=try_again, name="status", daemon=True)
    if (error := begin()) is not None:
        text = f"Nobody can ask for this run's status: {ADDRESS} {host}:{port} cannot be opened ({error})."
        if isinstance(error, OSError):
            text += f" It is tried again every {again_s:g} s."
            waiting.start()
        tell(Notice(text=text, level="warning"))

    def stop() -> None:
        over.set()
        if waiting.is_alive():
            waiting.join()
        for each in stops:
            each()

    return stop


@contextmanager
def kept(board: StatusBoard, store: ObjectStore, layout: RunLayout, log: CommitLog) -> Iterator[None]:
    """Puts the status beside the run's other objects when the context ends, unless another attempt has taken over."""
    try:
        yield
    except BaseException as error:
        board.failed(error)
        raise
    finally:
        try:
            log.check_fence()
            store.put(layout.status, board.document().line().encode())
        except FencedError:
            pass  # it is the other attempt's now
        except Exception as error:  # what ended the run is what the user has to read, and a store may be that
            text = f"{board.document().message} (This status could not be stored: {type(error).__name__}.)"
            board.note(message=text.strip())


@contextmanager
def told_at_the_end(board: StatusBoard, echo: Callable[[str], None]) -> Iterator[None]:
    """Hands the status, as one line, to ``echo`` when the context ends, however it does."""
    try:
        yield
    except BaseException as error:
        board.failed(error)
        raise
    finally:
        echo(board.document().line())


def _submission_id(environment: Mapping[str, str]) -> str:
    """The id of the job that this process is the driver of, which Ray tells it; empty where it is none."""
    try:
        told = json.loads(environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return str(told.get("metadata", {}).get("job_submission_id", ""))
    except (ValueError, AttributeError):
        return ""
