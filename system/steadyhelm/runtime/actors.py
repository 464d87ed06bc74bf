"""The one place where services become Ray actors.

Each actor is made from a *factory*: a small record that builds the service in the actor's process on ``start``. What
the constructor raises then reaches the driver as it is, instead of as a dead actor.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle

from steadyhelm.data.types import Prompt, PromptId, ShardRecord, WeightsRecord
from steadyhelm.services import Served, ShardOrder


class Factory(Protocol):
    """Builds a service in the process that will run it; picklable, cheap to send."""

    def __call__(self) -> Any:
        """The service."""


class _Host:
    """What every actor has: the service, built on ``start``."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self._factory = factory
        self._service: Any = None

    async def start(self) -> int:
        """Builds the service, once; returns the process id."""
        if self._service is None:
            self._service = self._factory()
            started = getattr(self._service, "start", None)
            if started is not None:
                result = started()
                if inspect.isawaitable(result):
                    await result
        return os.getpid()


class PromptsActor(_Host):
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


class RolloutActor(_Host):
    """Hosts a rollout worker with its engine."""

    async def rollout(self, order: ShardOrder) -> Served[Any]:
        """See ``services.Rollout``."""
        return await self._service.rollout(order)

    async def apply_weights(self, weights: WeightsRecord) -> Served[None]:
        """See ``services.Rollout``."""
        return await self._service.apply_weights(weights)


class ScorerActor(_Host):
    """Hosts a Reward or a Reference."""

    async def score(self, shard: ShardRecord) -> Served[Any]:
        """See ``services.Reward`` and ``services.Reference``."""
        return await self._service.score(shard)

    async def close(self) -> None:
        """Ends what the service started."""
        closing = getattr(self._service, "close", None)
        if closing is not None:
            result = closing()
            if inspect.isawaitable(result):
                await result


def spawn(kind: type[_Host], factory: Factory, name: str, *, cpus: float, gpus: float) -> ActorHandle:
    """An actor of ``kind`` in a process of its own; it does no work before ``start``.

    Args:
        kind: one of this module's classes.
        factory: builds the service there.
        name: for Ray's logs.
        cpus: CPUs that it reserves.
        gpus: GPUs that it reserves.
    """
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_concurrency=64, max_restarts=0)(kind)
    return remote.options(name=name).remote(factory)
