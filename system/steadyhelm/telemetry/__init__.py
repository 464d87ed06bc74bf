"""Spans, metric names, events, logs and exporters: what everything above may use to say what it does.

Imports only the OpenTelemetry API besides the standard library; Prometheus comes when it is asked for.
"""

from steadyhelm.telemetry import metrics
from steadyhelm.telemetry.events import EvalDone, Event, EventSink, IterationDone, Notice, RunStarted, ServiceState
from steadyhelm.telemetry.spans import Span, collect, covered_s, overhead, phase_seconds, span

__all__ = [
    "EvalDone",
    "Event",
    "EventSink",
    "IterationDone",
    "Notice",
    "RunStarted",
    "ServiceState",
    "Span",
    "collect",
    "covered_s",
    "metrics",
    "overhead",
    "phase_seconds",
    "span",
]
