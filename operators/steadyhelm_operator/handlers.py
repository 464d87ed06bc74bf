"""What kopf does for the operator: it logs in, watches, answers the liveness probe. Handlers pass on what they hear.

They are plain event handlers: kopf writes nothing to the objects, neither annotations nor a finalizer of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import kopf

from steadyhelm_operator.api import GROUP, PLURAL, VERSION
from steadyhelm_operator.client import login
from steadyhelm_operator.controller import Controller

WATCH_S = 300
"""How long a watch lasts before it is made anew, where it was left off: no list is read again for it.

The API server takes whole seconds only."""

log = logging.getLogger("steadyhelm.operator")


def registry(controller: Controller, unwatched: str = "") -> kopf.OperatorRegistry:
    """The handlers that feed ``controller``.

    Args:
        controller: what does the work.
        unwatched: a namespace, where RayClusters came too late to be watched; then the probe fails once they are there.
    """
    made = kopf.OperatorRegistry()

    @kopf.on.login(registry=made, retries=5, backoff=2.0)
    def signs_in(**_: Any) -> kopf.ConnectionInfo:
        return login()

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=made)
    async def run_changed(event: kopf.RawEvent, **_: Any) -> None:
        controller.run_changed(event["type"], event["object"])

    @kopf.on.event("ray.io", "v1", "rayclusters", registry=made)
    async def cluster_changed(event: kopf.RawEvent, **_: Any) -> None:
        controller.cluster_changed(event["type"], event["object"])

    @kopf.on.probe(registry=made, id="reconciles")
    def alive(**_: Any) -> str:
        if not controller.healthy():
            raise kopf.PermanentError("the threads that look after runs do not get on")
        if unwatched and controller.knows_clusters(unwatched):
            raise kopf.PermanentError("KubeRay was installed after the start: the next process watches its RayClusters")
        return "yes"

    return made


def settings(namespaces: Sequence[str]) -> kopf.OperatorSettings:
    """Settings of kopf: one replica without peers, events of our own, no look at other namespaces than those named."""
    made = kopf.OperatorSettings()
    made.peering.standalone = True
    made.posting.enabled = False
    made.scanning.disabled = bool(namespaces)
    made.watching.server_timeout = WATCH_S
    made.watching.client_timeout = WATCH_S + 60
    made.networking.request_timeout = 30.0
    return made


async def serve(
    controller: Controller,
    namespaces: Sequence[str] = (),
    workers: int = 16,
    health_port: int = 0,
    stop: asyncio.Event | None = None,
    tick: Callable[[], None] = lambda: None,
    ready: asyncio.Event | None = None,
) -> None:
    """Works until ``stop`` is set, or the process gets SIGTERM or SIGINT.

    Args:
        controller: what does the work.
        namespaces: those that are looked after; none means all.
        workers: threads.
        health_port: where the liveness probe is answered, at ``/healthz``; 0 answers none.
        stop: ends it.
        tick: called each second.
        ready: set once it watches.
    """

    async def ticking() -> None:
        while True:
            tick()
            await asyncio.sleep(1.0)

    unwatched = ""
    if namespaces and not await asyncio.to_thread(controller.knows_clusters, namespaces[0]):
        unwatched = namespaces[0]  # without rights on the whole cluster kopf does not hear of new kinds of objects
    controller.start(workers)
    ticker = asyncio.create_task(ticking())
    try:
        await kopf.operator(
            registry=registry(controller, unwatched),
            settings=settings(namespaces),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=list(namespaces),
            liveness_endpoint=f"http://0.0.0.0:{health_port}/healthz" if health_port else None,
            stop_flag=stop,
            ready_flag=ready,
        )
    finally:
        ticker.cancel()
        await asyncio.to_thread(controller.stop)
