"""What loop and driver tell the person who watches: small events for the terminal display.

A sink is any ``Callable[[Event], None]``; ``display.Display.update`` is one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """A run begins or goes on.

    Example: ``RunStarted(run="digits-transformers-0007", iterations=60, first_iteration=1, place="runs/digits-…")``
    """

    run: str
    iterations: int
    first_iteration: int = 1
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """What a service is doing or waiting for; an empty ``state``: it is gone.

    ``since_s`` is ``time.monotonic()`` at the change. ``lacks`` says which room in the cluster it does not find.

    Example: ``ServiceState(service="learner", state="waits for the batch of iteration 12", since_s=2211.5,
    waiting=True)``
    """

    service: str
    state: str
    since_s: float
    waiting: bool = False
    lacks: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationDone:
    """An iteration is committed; ``metrics`` by the names of ``telemetry.metrics``. ``replayed``: stepped again.

    Example: ``IterationDone(iteration=12, metrics={"reward/mean": 1.25})``
    """

    iteration: int
    metrics: Mapping[str, float]
    replayed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalDone:
    """The policy after ``iteration`` was evaluated; ``metrics`` are the ``eval/…`` ones.

    Example: ``EvalDone(iteration=0, metrics={"eval/accuracy": 0.72, "eval/accuracy_low": 0.69})``
    """

    iteration: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A line for the person who watches: a restart, a replay, a checkpoint. ``loss``: something was lost, and replaced.

    Example: ``Notice(text="rollout 1 is lost; another one takes its place", level="warning", loss=True)``
    """

    text: str
    level: Literal["info", "warning", "error"] = "info"
    loss: bool = False


Event = RunStarted | ServiceState | IterationDone | EvalDone | Notice
EventSink = Callable[[Event], None]

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


_KINDS = {kind.__name__: kind for kind in (RunStarted, ServiceState, IterationDone, EvalDone)}


def event_of(line: Mapping[str, Any]) -> Event | None:
    """The event that ``log_event`` wrote as ``line`` of a JSON log; None for another line."""
    if line.get("event") == "Notice":
        level = line.get("level")
        told = Notice(text=str(line.get("message")), loss=line.get("loss") is True)
        return replace(told, level=level) if level in _LEVELS else told
    kind = _KINDS.get(str(line.get("event")))
    if kind is None:
        return None
    names = {field.name: "run_id" if field.name == "run" else field.name for field in fields(kind)}
    return kind(**{name: line[key] for name, key in names.items() if key in line})


def log_event(event: Event) -> None:
    """Logs ``event`` with its fields as the line's extra fields: the sink where a machine reads the log."""
    fields = {("run_id" if name == "run" else name): value for name, value in asdict(event).items()}
    text, level = str(fields.pop("text", type(event).__name__)), _LEVELS[fields.pop("level", "info")]
    logging.getLogger("steadyhelm.run").log(level, text, extra={"event": type(event).__name__, **fields})
