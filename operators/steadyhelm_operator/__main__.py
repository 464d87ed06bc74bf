"""The operator's process: ``python -m steadyhelm_operator``. Without options it looks after all namespaces."""

from __future__ import annotations

import argparse
import asyncio
import logging

from prometheus_client import start_http_server
from steadyhelm import telemetry

from steadyhelm_operator.client import JOBS_URL, STATUS_URL, Heads, Kubernetes
from steadyhelm_operator.controller import Controller
from steadyhelm_operator.handlers import serve
from steadyhelm_operator.metrics import Metrics


def main(words: list[str] | None = None) -> None:
    """Parses the command line and works until it is told to end."""
    parser = argparse.ArgumentParser(prog="steadyhelm-operator", description="Looks after TrainingRuns.")
    parser.add_argument("--namespace", action="append", default=[], help="look after this one only; repeatable")
    parser.add_argument("--workers", type=int, default=16, help="TrainingRuns that are looked at side by side")
    parser.add_argument("--health-port", type=int, default=8080, help="port of /healthz; 0 opens none")
    parser.add_argument("--metrics-port", type=int, default=9464, help="port of Prometheus' metrics; 0 opens none")
    parser.add_argument("--jobs-url", default=JOBS_URL, help="where heads have the Ray Jobs API")
    parser.add_argument("--status-url", default=STATUS_URL, help="where heads have their run's status")
    parser.add_argument("--log-format", choices=("human", "json"), default="json", help="log lines on stderr")
    given = parser.parse_args(words)

    telemetry.configure(given.log_format, logging.INFO)
    logging.getLogger("kopf").setLevel(logging.WARNING)
    metrics = Metrics()
    kubernetes = Kubernetes(count=metrics.count, connections=given.workers + 4)
    heads = Heads(kubernetes, given.jobs_url, given.status_url, count=metrics.count)
    controller = Controller(kubernetes, heads, metrics)

    def tick() -> None:
        metrics.phases(controller.phases())
        metrics.longest_wait.set(controller.longest_wait_s())
        metrics.queued.set(len(controller.queue))

    if given.metrics_port:
        start_http_server(given.metrics_port, registry=metrics.registry)
    asyncio.run(serve(controller, given.namespace, given.workers, given.health_port, tick=tick))


if __name__ == "__main__":
    main()
