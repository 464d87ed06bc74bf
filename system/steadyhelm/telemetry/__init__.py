"""Spans, metric names, events, logs and exporters: what everything above may use to say what it does.

Imports only the OpenTelemetry API besides the standard library; ``prometheus`` is a module of its own.
"""

from steadyhelm.telemetry import metrics
from steadyhelm.telemetry.events import (
    EvalDone,
    Event,
    EventSink,
    IterationDone,
    Notice,
    RunStarted,
    ServiceState,
    event_of,
    log_event,
)
from steadyhelm.telemetry.logs import configure
from steadyhelm.telemetry.metrics_log import MetricsLine, MetricsLog, join_segments
from steadyhelm.telemetry.spans import Span, collect, covered_s, overhead, phase_seconds, span

__all__ = [
    "EvalDone",
    "Event",
    "EventSink",
    "IterationDone",
    "MetricsLine",
    "MetricsLog",
    "Notice",
    "RunStarted",
    "ServiceState",
    "Span",
    "collect",
    "configure",
    "covered_s",
    "event_of",
    "join_segments",
    "log_event",
    "metrics",
    "overhead",
    "phase_seconds",
    "span",
]
