"""The latest metrics in Prometheus' text format, on request at a port."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from steadyhelm.telemetry.metrics import FAMILIES, METRICS, Metric, describe, prometheus_name

if TYPE_CHECKING:
    from prometheus_client import Metric as PrometheusMetric


class LatestMetrics(Collector):
    """The newest value of each metric, as Prometheus metrics with the label ``run``."""

    def __init__(self, run: str) -> None:
        self._run, self._lock = run, threading.Lock()
        self._values: dict[str, float] = {}

    def update(self, metrics: Mapping[str, float]) -> None:
        """Takes the values of ``metrics``, those of other names stay. Raises KeyError for a name of no group."""
        for name in metrics:
            describe(name)
        with self._lock:
            self._values.update(metrics)

    def collect(self) -> Iterator[PrometheusMetric]:
        """What ``prometheus_client`` asks for at each scrape."""
        with self._lock:
            values = dict(self._values)
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for name, value in sorted(values.items()):
            exposed, labels = prometheus_name(name)
            if exposed not in families:
                families[exposed] = _family(exposed, _declared(name), ("run", *labels))
            families[exposed].add_metric([self._run, *labels.values()], value)
        yield from families.values()


def _declared(name: str) -> Metric:
    return METRICS[name] if name in METRICS else FAMILIES[name.partition("/")[0]].metric


def _family(exposed: str, metric: Metric, labels: tuple[str, ...]) -> CounterMetricFamily | GaugeMetricFamily:
    if metric.kind == "counter":
        return CounterMetricFamily(exposed, metric.help, labels=labels)
    return GaugeMetricFamily(exposed, metric.help, labels=labels)


def prometheus_registry(latest: LatestMetrics) -> CollectorRegistry:
    """A registry of its own that exposes ``latest`` and nothing else."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(latest)
    return registry


def exposition(latest: LatestMetrics) -> str:
    """The text that a scrape answers."""
    return generate_latest(prometheus_registry(latest)).decode()


def serve_prometheus(latest: LatestMetrics, port: int, address: str = "127.0.0.1") -> tuple[int, Callable[[], None]]:
    """Answers scrapes at ``address:port`` from a daemon thread; the port (0 chose a free one) and a function to stop.

    Raises OSError where the port is taken.
    """
    server, thread = start_http_server(port, addr=address, registry=prometheus_registry(latest))

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop
