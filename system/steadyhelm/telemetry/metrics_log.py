"""The metric log: one JSON object per iteration, put in segments that are never rewritten.

A line is ``{"iteration": 12, "attempt": 1, "time": "2026-03-01T12:00:00.000Z", "metrics": {"reward/mean": 1.25}}``,
with ``"notes": ["…"]`` where something was said meanwhile. Numbers keep all their bits; a value that is not finite
becomes null, since JSON has no word for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsLine:
    """One line of the log. ``replayed`` is True where the iteration was stepped again from its committed batch.

    ``notes`` is what the run's terminal was told since the line before: decisions with their reasons, what was lost.

    Example: ``MetricsLine(iteration=12, attempt=1, time="2026-03-01T12:00:00.000Z", metrics={"reward/mean": 1.25})``
    """

    iteration: int
    attempt: int
    time: str
    metrics: Mapping[str, float]
    replayed: bool = False
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The line, without its line feed."""
        values = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        head: dict[str, Any] = {"iteration": self.iteration, "attempt": self.attempt, "time": self.time}
        if self.replayed:
            head["replayed"] = True
        if self.notes:
            head["notes"] = list(self.notes)
        return json.dumps(head | {"metrics": values}, allow_nan=False)

    @classmethod
    def parse(cls, text: str) -> MetricsLine:
        """The line that ``to_json`` wrote; null becomes NaN. Raises ValueError or KeyError for any other text."""
        record = json.loads(text)
        return cls(
            iteration=int(record["iteration"]),
            attempt=int(record["attempt"]),
            time=str(record["time"]),
            metrics={k: math.nan if v is None else float(v) for k, v in record["metrics"].items()},
            replayed=bool(record.get("replayed", False)),
            notes=tuple(map(str, record.get("notes", ()))),
        )


class MetricsLog:
    """Buffers metric lines and puts them as ``<prefix>/<attempt>-<n>.jsonl``.

    Flush before each checkpoint commit: a resume steps everything behind the checkpoint again and writes it anew, so
    no iteration is ever without a line. An attempt begins with the evaluations that the commit log has.

    Args:
        put: stores bytes under a key, e.g. ``store.put``.
        prefix: ``"<run>/metrics"``.
        attempt: the writer's attempt; segments of different attempts never meet.
    """

    def __init__(self, put: Callable[[str, bytes], object], prefix: str, attempt: int) -> None:
        self._put, self._prefix, self._attempt = put, prefix.rstrip("/"), attempt
        self._lines: list[MetricsLine] = []
        self._segment = 0

    def append(
        self, iteration: int, metrics: Mapping[str, float], replayed: bool = False, notes: Sequence[str] = ()
    ) -> MetricsLine:
        """Adds the metrics of ``iteration`` (0: before the first) to the buffer. A later line of it wins over this."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = MetricsLine(
            iteration=iteration,
            attempt=self._attempt,
            time=now,
            metrics=dict(metrics),
            replayed=replayed,
            notes=tuple(notes),
        )
        self._lines.append(line)
        return line

    def flush(self) -> str | None:
        """Puts the buffered lines as the next segment; its key, or None where there was nothing to put.

        What ``put`` raises passes, and the lines stay in the buffer.
        """
        if not self._lines:
            return None
        key = f"{self._prefix}/{self._attempt}-{self._segment}.jsonl"
        self._put(key, "".join(line.to_json() + "\n" for line in self._lines).encode())
        self._segment += 1
        self._lines.clear()
        return key


def join_segments(segments: Mapping[str, bytes]) -> list[MetricsLine]:
    """One line per iteration out of all segments, by iteration: what the last attempt to step it says.

    An evaluation is written as a line of its own for its iteration and holds for all attempts. Lines of one attempt and
    iteration are merged, later values over earlier ones; damaged ones are left out. ``segments`` maps keys to bytes, in
    any order.
    """
    lines: list[tuple[int, int, MetricsLine]] = []
    for key, data in segments.items():
        _, segment = _order(key)
        lines += [(segment, place, line) for place, line in enumerate(_whole_lines(data))]
    lines.sort(key=lambda item: (item[2].iteration, item[2].attempt, item[0], item[1]))
    joined: dict[int, MetricsLine] = {}
    for _, _, line in lines:
        before = joined.get(line.iteration)
        joined[line.iteration] = line if before is None else _merged(before, line)
    return [joined[iteration] for iteration in sorted(joined)]


def last_value(keys: Iterable[str], get: Callable[[str], bytes], name: str) -> float | None:
    """The metric ``name`` as the newest line that has it says; None where there is no such line.

    Args:
        keys: of segments; as few as possible are read, from the newest on.
        get: reads one.
        name: a metric's name.
    """
    for key in sorted(keys, key=_order, reverse=True):
        for line in reversed(_whole_lines(get(key))):
            value = line.metrics.get(name)
            if value is not None and math.isfinite(value):
                return value
    return None


def _whole_lines(segment: bytes) -> list[MetricsLine]:
    """The segment's lines, but for such as were damaged: nothing depends on them that has to be right."""
    found = []
    for text in bytes(segment).decode(errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            found.append(MetricsLine.parse(text))
    return found


def _order(key: str) -> tuple[int, int]:
    """A segment's attempt and number."""
    attempt, _, number = key.rsplit("/", 1)[-1].removesuffix(".jsonl").partition("-")
    return int(attempt), int(number)


def _merged(before: MetricsLine, line: MetricsLine) -> MetricsLine:
    evaluated = {name: value for name, value in before.metrics.items() if _is_evaluation(name)}
    notes = (*before.notes, *line.notes)
    if all(map(_is_evaluation, line.metrics)):
        return replace(before, metrics={**before.metrics, **line.metrics}, notes=notes)
    if before.attempt != line.attempt:
        return replace(line, metrics={**evaluated, **line.metrics}, notes=notes)
    replayed = before.replayed or line.replayed
    return replace(line, metrics={**before.metrics, **line.metrics}, replayed=replayed, notes=notes)


def _is_evaluation(name: str) -> bool:
    return name.startswith("eval/")
