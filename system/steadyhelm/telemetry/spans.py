"""Spans: stretches of time that services spend on something, timed at the call site by one ``with``.

::

    with telemetry.collect() as spans:
        with telemetry.span("learner", "backward", computes=True):
            loss.backward()
    return Served(value=..., spans=tuple(spans))

Times are ``time.monotonic()``: CLOCK_MONOTONIC is one clock for all processes of a machine, so spans of different
services can be laid side by side. Every span goes to the OpenTelemetry API as well; without an SDK that costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from opentelemetry import trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of time that a service spent on something, on the machine's monotonic clock.

    ``computes`` is True only for forward passes of generation and for forward, backward and optimiser work; what is
    not covered by such a span of any service is the system's overhead.

    Example: ``Span(service="learner", name="backward", start_s=1021.25, end_s=1021.75, computes=True)``
    """

    service: str
    name: str
    start_s: float
    end_s: float
    computes: bool = False


_collector: ContextVar[list[Span] | None] = ContextVar("steadyhelm_spans", default=None)
_tracer = trace.get_tracer("steadyhelm")


@contextmanager
def collect() -> Iterator[list[Span]]:
    """Gathers the spans that end inside the block, in the order they end; the innermost ``collect`` takes them.

    Tasks and threads that carry the block's context (``asyncio.to_thread``, ``asyncio.create_task``) add to the same
    list; an append is atomic.
    """
    spans: list[Span] = []
    outer = _collector.get()
    _collector.set(spans)
    try:
        yield spans
    finally:
        # Not Token.reset: an async generator may be closed in another context, where reset raises.
        _collector.set(outer)


@contextmanager
def span(service: str, name: str, computes: bool = False) -> Iterator[None]:
    """Times the block as a ``Span`` for the enclosing ``collect`` and as an OpenTelemetry span, errors included.

    Args:
        service: ``rollout``, ``reward``, ``reference``, ``learner``, ``prompts`` or ``driver``.
        name: what it does, one or two words.
        computes: True only for forward passes of generation and forward, backward and optimiser work.
    """
    start = time.monotonic()
    try:
        attributes: dict[str, str | bool] = {"steadyhelm.service": service, "steadyhelm.computes": computes}
        with _tracer.start_as_current_span(f"{service}.{name}", attributes=attributes):
            yield
    finally:
        spans = _collector.get()
        if spans is not None:
            end = time.monotonic()
            spans.append(Span(service=service, name=name, start_s=start, end_s=end, computes=computes))


def covered_s(intervals: Iterable[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Length in seconds of the union of ``intervals`` inside [``start_s``, ``end_s``]; overlaps count once."""
    total, reached = 0.0, start_s
    for low, high in sorted(intervals):
        low, high = max(low, reached), min(high, end_s)
        if high > low:
            total += high - low
            reached = high
    return total


def overhead(spans: Iterable[Span], start_s: float, end_s: float) -> float:
    """Share of [``start_s``, ``end_s``] in which no span with ``computes`` runs, of any service.

    overhead = 1 − |∪ computes-spans ∩ [start, end]| / (end − start). Raises ValueError where end ≤ start.
    """
    if end_s <= start_s:
        raise ValueError(f"an interval from {start_s} to {end_s} has no length: end must be after start")
    computing = covered_s(((s.start_s, s.end_s) for s in spans if s.computes), start_s, end_s)
    return 1.0 - computing / (end_s - start_s)


def phase_seconds(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds that each ``"seconds/<service>.<name>"`` was under way; where workers overlap, time counts once."""
    phases: dict[str, list[tuple[float, float]]] = {}
    for item in spans:
        phases.setdefault(f"seconds/{item.service}.{item.name}", []).append((item.start_s, item.end_s))
    return {
        name: covered_s(intervals, min(low for low, _ in intervals), max(high for _, high in intervals))
        for name, intervals in sorted(phases.items())
    }
