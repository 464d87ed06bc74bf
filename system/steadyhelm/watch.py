"""What a run does, seen from anywhere: out of its store alone, the commit log and the metrics' segments.

The driver puts a segment behind each iteration, so what is shown is at most one iteration old.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from steadyhelm.display import Display, Progress, evaluation_line, iteration_line
from steadyhelm.store import ObjectStore, run_uri
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.lease import RENEW_S
from steadyhelm.store.liveness import DriverWatch, Pulse
from steadyhelm.store.log import LogView
from steadyhelm.telemetry import (
    EvalDone,
    Event,
    IterationDone,
    MetricsLine,
    Notice,
    RunStarted,
    ServiceState,
    join_segments,
)
from steadyhelm.telemetry import metrics as names

NOTES_SHOWN = 10
EVALUATION = "eval/"
SHOWN = (
    (names.STALENESS_MEAN, "staleness", "{:.2f}"),
    (names.LEARNER_WAIT, "learner waited", "{:.0%}"),
    (names.SATURATION, "engines saturated", "{:.0%}"),
)
"""Metrics of a status, besides those of an iteration's line: label and form."""
SURE_S = 1.5 * RENEW_S
"""How long a single look waits for a lease to be renewed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Where a run stands. ``metrics`` and ``time`` are of the newest iteration with a line, ``metrics_of``.

    ``evaluation`` is the newest one, behind ``evaluated``; ``notes`` the newest things said, each with its iteration.

    Example: ``Status(run="digits", place="file:///runs/digits", iterations=60, committed=13, attempt=1, finished=False,
    driver=Pulse(alive=True, holder="pid 71 on node-3"), metrics_of=12, metrics={"reward/mean": 1.25})``
    """

    run: str
    place: str
    iterations: int
    committed: int
    attempt: int
    finished: bool
    driver: Pulse
    time: str = ""
    metrics_of: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated: int = 0
    evaluation: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[tuple[int, str], ...] = ()

    @property
    def engines(self) -> str:
        """How many engines serve, and how many should; empty where the run has not said."""
        serving, desired = (self.metrics.get(name) for name in (names.ENGINES_SERVING, names.ENGINES_DESIRED))
        if serving is None or desired is None:
            return ""
        return f"{serving:.0f} serve" if serving == desired else f"{serving:.0f} serve, {desired:.0f} wanted"

    @property
    def drive(self) -> str:
        """Whether somebody drives the run, in words."""
        holder = self.driver.holder
        if self.finished:
            return "finished"
        if self.driver.alive:
            return f"driven by {holder}"
        if self.driver.alive is None:
            return f"perhaps driven by {holder}" if holder else "driven by nobody that can be seen from here"
        return f"driven by nobody, last by {holder}" if holder else "driven by nobody"

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's words; a value that is not finite becomes null."""
        return asdict(self) | {
            "metrics": _finite(self.metrics),
            "evaluation": _finite(self.evaluation),
            "notes": [{"iteration": iteration, "text": text} for iteration, text in self.notes],
        }

    def lines(self) -> list[str]:
        """The same for people."""
        progress = Progress()
        progress.take(RunStarted(run=self.run, iterations=self.iterations))
        found = [
            f"run {self.run} in {self.place}: {self.committed} of {self.iterations} iterations committed, "
            f"attempt {self.attempt}, {self.drive}"
        ]
        if self.metrics:
            progress.take(IterationDone(iteration=self.metrics_of, metrics=self.metrics))
            more = [f"{label} {form.format(self.metrics[name])}" for name, label, form in SHOWN if name in self.metrics]
            engines = [f"engines: {self.engines}"] if self.engines else []
            found.append("  ".join([iteration_line(progress), *more, *engines, f"at {self.time}"]))
        if self.evaluation:
            found.append(f"evaluation after iteration {self.evaluated}: {evaluation_line(self.evaluation)}")
        return found + [f"iteration {iteration}: {note}" for iteration, note in self.notes]


class Watcher:
    """Follows ``run`` in ``store``. Raises ConfigError where there is no such run."""

    def __init__(self, store: ObjectStore, run: str) -> None:
        self._store = store
        self._layout = RunLayout(run)
        self._log = LogView(store, run)
        self._log.run_record()
        self._driver = DriverWatch(store, run)
        self._segments: dict[str, bytes] = {}
        self._lines: list[MetricsLine] = []

    def sure(self) -> Status:
        """The same as ``look``, without events, once it is clear whether the run is driven, or after ``SURE_S``."""
        ends = time.monotonic() + SURE_S
        while True:
            status, _ = self.look()
            if status.finished or status.driver.alive is not None or time.monotonic() >= ends:
                return status
            time.sleep(0.5)

    def look(self) -> tuple[Status, list[Event]]:
        """Where the run stands now, and what happened since the last look, as its terminal was told it."""
        self._log.refresh()
        known = len(self._segments)
        fresh = {}
        for key in self._store.list(self._layout.metrics_prefix):
            if key not in self._segments:
                fresh[key] = bytes(self._store.get(key))
        self._segments |= fresh
        if fresh:
            self._lines = join_segments(self._segments)
        events = [event for line in (self._lines if not known else join_segments(fresh)) for event in _events(line)]
        return self._status(), events

    def _status(self) -> Status:
        stepped = [line for line in self._lines if any(not name.startswith(EVALUATION) for name in line.metrics)]
        newest = stepped[-1] if stepped else None
        evaluated = [line for line in self._lines if names.EVAL_ACCURACY in line.metrics]
        asked = evaluated[-1] if evaluated else None
        return Status(
            run=self._log.run,
            place=run_uri(self._store, self._log.run),
            iterations=int(self._log.run_record()["run"]["schedule"]["iterations"]),
            committed=self._log.last_iteration,
            attempt=self._log.attempt,
            finished=self._log.finished() is not None,
            driver=self._driver.look(),
            time=newest.time if newest else "",
            metrics_of=newest.iteration if newest else 0,
            metrics=newest.metrics if newest else {},
            evaluated=asked.iteration if asked else 0,
            evaluation=_evaluation(asked) if asked else {},
            notes=tuple((line.iteration, note) for line in self._lines for note in line.notes)[-NOTES_SHOWN:],
        )


def _evaluation(line: MetricsLine) -> dict[str, float]:
    return {name: value for name, value in line.metrics.items() if name.startswith(EVALUATION)}


def _events(line: MetricsLine) -> Iterator[Event]:
    """The line as the events that it was made of."""
    for note in line.notes:
        yield Notice(text=note)
    evaluation = _evaluation(line)
    stepped = {name: value for name, value in line.metrics.items() if name not in evaluation}
    if stepped:
        yield IterationDone(iteration=line.iteration, metrics=stepped, replayed=line.replayed)
    if evaluation:
        yield EvalDone(iteration=line.iteration, metrics=evaluation)


def follow(watcher: Watcher, display: Display, every_s: float) -> None:
    """Shows the run until it is finished, looking every ``every_s`` seconds: its past in a picture only."""
    before: Status | None = None
    while True:
        status, events = watcher.look()
        if before is None:
            display.update(RunStarted(run=status.run, iterations=status.iterations, place=status.place))
            if not display.is_live:
                events = [Notice(text=line) for line in status.lines()]
        elif status.drive != before.drive:
            display.update(Notice(text=f"run {status.run} is {status.drive}"))
        for event in events:
            display.update(event)
        for service, state in (("driver", status.drive), ("engines", status.engines)):
            if before is None or state != getattr(before, "drive" if service == "driver" else service):
                display.update(ServiceState(service=service, state=state, since_s=time.monotonic()))
        if status.finished:
            return
        before = status
        time.sleep(every_s)


def follow_json(watcher: Watcher, write: Callable[[str], None], every_s: float) -> None:
    """Writes the status as a JSON object on a line, whenever it has changed, until the run is finished."""
    before = ""
    while True:
        status, _ = watcher.look()
        line = json.dumps(status.to_json())
        if line != before:
            write(line)
        if status.finished:
            return
        before = line
        time.sleep(every_s)


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
