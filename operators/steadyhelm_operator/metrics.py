"""What the operator counts about itself, for Prometheus."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The operator's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "steadyhelm_operator_requests",
            "Requests to the Kubernetes API and to heads; code 0 stands for no answer, of heads 400 for a refusal.",
            ("verb", "resource", "code"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "steadyhelm_operator_request_seconds",
            "Seconds until such a request was answered.",
            ("verb", "resource"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.reconciles = Histogram(
            "steadyhelm_operator_reconcile_seconds",
            "Seconds of one look at a TrainingRun, with everything that it asked and did.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.errors = Counter(
            "steadyhelm_operator_reconcile_errors",
            "Looks that an error ended; they are repeated.",
            ("error",),
            registry=self.registry,
        )
        self.submissions = Counter(
            "steadyhelm_operator_submissions", "Drivers that were submitted.", registry=self.registry
        )
        self.runs = Gauge("steadyhelm_operator_runs", "TrainingRuns by phase.", ("phase",), registry=self.registry)
        self.longest_wait = Gauge(
            "steadyhelm_operator_longest_wait_seconds",
            "How long the one TrainingRun has been Provisioning, Starting or Recovering that has been so longest.",
            registry=self.registry,
        )
        self.queued = Gauge(
            "steadyhelm_operator_queued", "TrainingRuns that wait for a look, now or later.", registry=self.registry
        )

    def count(self, verb: str, resource: str, code: int, seconds: float) -> None:
        """Takes a request down."""
        self.requests.labels(verb=verb, resource=resource, code=str(code)).inc()
        self.seconds.labels(verb=verb, resource=resource).observe(seconds)

    def phases(self, phases: Iterable[str]) -> None:
        """Takes down how many runs are in which phase."""
        self.runs.clear()
        for phase, number in Tally(phases).items():
            self.runs.labels(phase=phase).set(number)
