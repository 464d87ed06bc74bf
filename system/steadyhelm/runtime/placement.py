"""Where actors go: on a cluster with pools each service into its own, and what a pool lacks where one finds no place.

A node of the pool ``rollout`` offers the Ray resource ``pool_rollout``, as many as actors may be there; an actor takes
one. A cluster has pools where any of its nodes offers such a resource: the head always does, so a pool without nodes is
one too, which an autoscaler may fill. Elsewhere, and on a laptop, actors go wherever Ray puts them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray._private.state import state
from ray.actor import ActorHandle

from steadyhelm.errors import DeadlineError

PREFIX = "pool_"
"""Beginning of the names of pools' resources."""
HEAD = "head"
"""The pool of the services' small actors."""
SMALL = 0.001
"""A share of a pool for what comes and goes."""
LOOK_S = 10.0
"""Seconds between two looks at an actor that is not placed."""
SAID_AFTER_S = 30.0
"""How long an actor may wait for its place before that is said: a node takes a while to come."""
RANK = "RayTrainWorker"
"""How the class of Ray Train's ranks is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a living node offers in all, and what of it is free, by names of Ray's resources."""

    total: Mapping[str, float]
    free: Mapping[str, float]


def pooled(resources: Mapping[str, float]) -> bool:
    """Whether a cluster with these resources has pools."""
    return any(name.startswith(PREFIX) for name in resources)


def place(pool: str, amount: float = 1.0) -> dict[str, float]:
    """The custom resources that place an actor into ``pool`` of the cluster that this process has joined, if any."""
    return {PREFIX + pool: amount} if ray.is_initialized() and pooled(ray.cluster_resources()) else {}


def asked(cpus: float, gpus: float, resources: Mapping[str, float]) -> dict[str, float]:
    """All resources that an actor asks for, by Ray's names; none of amount 0."""
    return {name: amount for name, amount in {"CPU": cpus, "GPU": gpus, **resources}.items() if amount}


def lacking(asks: Mapping[str, float], nodes: Sequence[Node], count: int = 1) -> str:
    """What is not there, in words, for ``count`` actors that ask for ``asks`` each; empty where there is room for them.

    Example: ``"pool rollout lacks GPU: an actor asks for GPU 1, pool_rollout 1; on its 1 node are GPU 1 (0 free),
    pool_rollout 2 (1 free)"``
    """
    if not asks or sum(_room(asks, node.free) for node in nodes) >= count:
        return ""
    pool = next((name for name in asks if name.startswith(PREFIX)), "")
    where = f"pool {pool.removeprefix(PREFIX)}" if pool else "the cluster"
    within = [node for node in nodes if node.total.get(pool)] if pool else list(nodes)
    wants = f"{_actors(count)} for {_amounts(asks)}"
    if not within:
        return f"{where} has no node: {wants}"
    short = [name for name, amount in asks.items() if sum(_room({name: amount}, n.free) for n in within) < count]
    lacks = f"lacks {' and '.join(short)}" if short else "has no node with all of it at once"
    there = ", ".join(
        f"{name} {sum(n.total.get(name, 0) for n in within):g} ({sum(n.free.get(name, 0) for n in within):g} free)"
        for name in asks
    )
    return f"{where} {lacks}: {wants}; on its {len(within)} node{'s' * (len(within) > 1)} are {there}"


def _room(asks: Mapping[str, float], free: Mapping[str, float]) -> int:
    """How many actors fit into what is free."""
    return min(int(free.get(name, 0) / amount + 1e-6) for name, amount in asks.items())


def _actors(count: int) -> str:
    return "an actor asks" if count == 1 else f"{count} actors ask, each"


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


def actor_lacks(actor: ActorHandle, asks: Mapping[str, float]) -> str:
    """What the cluster lacks for an actor that has no place yet; empty for one that has, or that only just began."""
    info = state.actor_table(actor._actor_id.hex())
    if info.get("State") != "PENDING_CREATION" or info["Address"]["Port"]:  # the port is of a process on its node
        return ""
    return lacking(asks, nodes())


def ranks_lack(asks: Mapping[str, float], count: int) -> str:
    """What the cluster lacks for ``count`` ranks of this driver's learner; empty once one is there, as all are."""
    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    ranks = state.actor_table(None, job, "ALIVE").values()
    return "" if any(RANK in actor["ActorClassName"] for actor in ranks) else lacking(asks, nodes(), count)


def nodes() -> list[Node]:
    """The living nodes of the cluster that this process has joined."""
    free = state.available_resources_per_node()
    return [Node(total=node["Resources"], free=free.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]


@contextmanager
def placed(look: Callable[[], str], say: Callable[[str], None]) -> Iterator[None]:
    """While the body waits for a place, ``say`` is told what ``look`` finds lacking; so is its DeadlineError."""
    lacks = ""

    def heard(found: str) -> None:
        nonlocal lacks
        lacks = found
        say(found)

    looks = asyncio.create_task(watched(look, heard))
    try:
        yield
    except DeadlineError as error:
        if not lacks:
            raise
        raise DeadlineError(f"{error} It finds no room: {lacks}.") from error
    finally:
        looks.cancel()


async def watched(look: Callable[[], str], say: Callable[[str], None]) -> None:
    """Has ``say`` told what ``look`` finds lacking, from ``SAID_AFTER_S`` on at each change; runs until cancelled."""
    said = ""
    await asyncio.sleep(SAID_AFTER_S)
    while True:
        try:
            found = await asyncio.to_thread(look)
        except Exception:  # Ray raises anything while its head restarts; the wait itself has its own deadline
            found = said
        if found != said:
            said = found
            say(said)
        await asyncio.sleep(LOOK_S)
