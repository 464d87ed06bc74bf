"""The one place where services become Ray actors.

Each actor gets a *factory* with ``start``: a small record that builds the service in the actor's process. What the
constructor raises then reaches the driver as it is, instead of as a dead actor, and processes can start before it is
known what to build in them.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import ray
from ray.actor import ActorHandle

from steadyhelm.data.types import Prompt, PromptId, ShardRecord, WeightsRecord
from steadyhelm.errors import EngineLostError
from steadyhelm.services import PromptSource, Reference, Reward, Rollout, Served, ShardOrder

S = TypeVar("S")
Factory = Callable[..., Any]
"""Builds a service in the process that will run it; picklable, cheap to send."""


@runtime_checkable
class Closing(Protocol):
    """A service with something to end."""

    def close(self) -> Awaitable[None] | None:
        """Ends it."""


class _Host(Generic[S]):
    """What every actor has: the service, built on ``start``."""

    def __init__(self) -> None:
        self._built: S | None = None

    async def start(self, factory: Callable[[], S]) -> str:
        """Builds the service, once; returns the id of the node that it is on."""
        if self._built is None:
            self._built = factory()
        node: str = ray.get_runtime_context().get_node_id()
        return node

    async def close(self) -> None:
        """Ends what the service started: processes, an engine's server."""
        if isinstance(self._built, Closing):
            ended = self._built.close()
            if inspect.isawaitable(ended):
                await ended

    @property
    def _service(self) -> S:
        if self._built is None:
            raise EngineLostError("the actor was called before its start")
        return self._built


class PromptsActor(_Host[PromptSource]):
    """Hosts a PromptSource."""

    async def prompts(self, iteration: int) -> Served[tuple[Prompt, ...]]:
        """See ``services.PromptSource``."""
        return await self._service.prompts(iteration)

    async def replacement(self, prompt_id: PromptId) -> Served[Prompt]:
        """See ``services.PromptSource``."""
        return await self._service.replacement(prompt_id)

    async def held_out(self, limit: int) -> Served[tuple[Prompt, ...]]:
        """See ``services.PromptSource``."""
        return await self._service.held_out(limit)


class RolloutActor(_Host[Rollout]):
    """Hosts a rollout worker with its engine."""

    async def rollout(self, order: ShardOrder) -> Served[Any]:
        """See ``services.Rollout``."""
        return await self._service.rollout(order)

    async def apply_weights(self, weights: WeightsRecord) -> Served[None]:
        """See ``services.Rollout``."""
        return await self._service.apply_weights(weights)


class ScorerActor(_Host[Reward | Reference]):
    """Hosts a Reward or a Reference."""

    async def score(self, shard: ShardRecord) -> Served[Any]:
        """See ``services.Reward`` and ``services.Reference``."""
        return await self._service.score(shard)


def spawn(
    kind: type[_Host[Any]], name: str, *, cpus: float, gpus: float, resources: Mapping[str, float] | None = None
) -> ActorHandle:
    """An actor of ``kind`` in a process of its own; it does no work before ``start``.

    Args:
        kind: one of this module's classes.
        name: for Ray's logs.
        cpus: CPUs that it reserves.
        gpus: GPUs that it reserves.
        resources: what else it reserves, by Ray's names.
    """
    reserved = {"num_cpus": cpus, "num_gpus": gpus, "resources": dict(resources or {})}
    remote = ray.remote(**reserved, max_concurrency=64, max_restarts=0)(kind)
    return remote.options(name=name).remote()
