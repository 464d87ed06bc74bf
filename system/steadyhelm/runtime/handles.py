"""The services' Protocols over pools of actors: what the loop holds in its hands."""

from __future__ import annotations

from functools import partial
from typing import Any

from steadyhelm.config import RunFile
from steadyhelm.data.types import ObjectRef, Prompt, PromptId, ShardRecord, WeightsRecord
from steadyhelm.errors import LearnerLostError, ObjectMissingError
from steadyhelm.runtime.actors import PromptsActor, RolloutActor, ScorerActor, spawn
from steadyhelm.runtime.load import Load
from steadyhelm.runtime.nodes import leaving_nodes
from steadyhelm.runtime.placement import HEAD, actor_lacks, asked, place
from steadyhelm.runtime.pool import Member, Pool
from steadyhelm.runtime.routing import Work, marks
from steadyhelm.services import EngineLoad, Served, ShardOrder
from steadyhelm.telemetry import EventSink

LEARNED = 0.2
"""How much the last answer counts in the mean completion length that outstanding tokens are estimated by."""


def _pool(run: RunFile, service: str, kind: Any, size: int, deadline_s: float, gpus: float, tell: EventSink) -> Pool:
    """A pool with the run file's deadlines, in the cluster's pool of that name where it has pools."""
    cpus = run.runtime.cpus_per_actor
    resources = place(HEAD if service == "prompts" else service)
    asks = asked(cpus, gpus, resources)

    def make(number: int) -> Any:
        return spawn(kind, f"{service}-{number}", cpus=cpus, gpus=gpus, resources=resources)

    return Pool(
        service=service,
        spawn=make,
        size=size,
        start_deadline_s=run.runtime.start_deadline_s,
        call_deadline_s=deadline_s,
        drain_deadline_s=run.rollout.drain_deadline_s,
        notice_s=run.runtime.wait_notice_s,
        tell=tell,
        needs=f"{cpus:g} CPUs and {gpus:g} GPUs",
        lacks=partial(actor_lacks, asks=asks),
        leaving=leaving_nodes,
    )


class PromptsHandle:
    """The PromptSource in its actor."""

    def __init__(self, run: RunFile, tell: EventSink) -> None:
        self.pool = _pool(run, "prompts", PromptsActor, 1, run.runtime.step_deadline_s, 0.0, tell)

    async def prompts(self, iteration: int) -> Served[tuple[Prompt, ...]]:
        """See ``services.PromptSource``."""
        return await self.pool.call(lambda actor: actor.prompts.remote(iteration), f"prompts of iteration {iteration}")

    async def replacement(self, prompt_id: PromptId) -> Served[Prompt]:
        """See ``services.PromptSource``."""
        return await self.pool.call(lambda actor: actor.replacement.remote(prompt_id), f"replacement of {prompt_id}")

    async def held_out(self, limit: int) -> Served[tuple[Prompt, ...]]:
        """See ``services.PromptSource``."""
        return await self.pool.call(lambda actor: actor.held_out.remote(limit), "held-out prompts")


class RolloutHandle:
    """The rollout workers; every one that serves has the weights that were applied last."""

    def __init__(self, run: RunFile, tell: EventSink) -> None:
        self.pool = _pool(
            run, "rollout", RolloutActor, run.engines, run.rollout.deadline_s, run.runtime.gpus_per_engine, tell
        )
        self.pool.prepare = self._catch_up
        self.pool.by_slot = run.rollout.engine.type == "external"
        self._weights: WeightsRecord | None = None
        self._deadline_s = run.runtime.step_deadline_s
        self._length = float(run.rollout.max_new_tokens)

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        """See ``services.Rollout``."""
        samples = len(order.prompts)
        work = Work(samples=samples, tokens=samples * self._length, marks=marks(order.prompts))
        served: Served[ShardRecord] = await self.pool.call(
            lambda actor: actor.rollout.remote(order), f"rolls out {order.key}", work
        )
        if served.value.prompt_ids:
            self._length += (served.value.num_tokens / len(served.value.prompt_ids) - self._length) * LEARNED
        return served

    def load(self) -> EngineLoad:
        """See ``services.Elastic``."""
        return self._engine_load(self.pool.meter.read())

    def glance(self) -> EngineLoad:
        """See ``services.Elastic``."""
        return self._engine_load(self.pool.meter.glance())

    def _engine_load(self, load: Load) -> EngineLoad:
        serving = len(self.pool.serving)
        return EngineLoad(
            serving=serving,
            desired=self.pool.size,
            saturation=load.saturation,
            in_flight_tokens=load.in_flight_tokens,
            queue=load.at_hand / max(1, serving),
            room=self.pool.room,
        )

    def scale(self, desired: int) -> None:
        """See ``services.Elastic``."""
        self.pool.resize(desired)

    async def apply_weights(self, weights: WeightsRecord) -> Served[None]:
        """See ``services.Rollout``."""
        self._weights = weights
        answers = await self.pool.everywhere(self._apply)
        metrics = {name: max(a.metrics[name] for a in answers) for name in (answers[0].metrics if answers else ())}
        return Served(value=None, spans=tuple(s for answer in answers for s in answer.spans), metrics=metrics)

    async def _apply(self, member: Member) -> Served[None]:
        assert self._weights is not None
        call = member.actor.apply_weights.remote(self._weights)
        return await self.pool.ask(member, call, f"takes weights {self._weights.version}", self._deadline_s)

    async def _catch_up(self, member: Member) -> None:
        """Brings a new worker to the version that the others serve, also where that moves on meanwhile."""
        seen: WeightsRecord | None = None
        while self._weights is not seen:
            seen = self._weights
            try:
                await self._apply(member)
            except (ObjectMissingError, LearnerLostError):
                if self._weights is seen:  # else they were given up for later ones meanwhile
                    raise


class RewardHandle:
    """The reward actors."""

    def __init__(self, run: RunFile, tell: EventSink) -> None:
        deadline_s = run.runtime.step_deadline_s
        self.pool = _pool(run, "reward", ScorerActor, run.reward.replicas, deadline_s, 0.0, tell)

    async def score(self, shard: ShardRecord) -> Served[tuple[ObjectRef, tuple[bool, ...]]]:
        """See ``services.Reward``."""
        return await self.pool.call(lambda actor: actor.score.remote(shard), f"scores {shard.rollout.key}")


class ReferenceHandle:
    """The reference actors."""

    def __init__(self, run: RunFile, tell: EventSink) -> None:
        gpus, deadline_s = run.runtime.gpus_per_engine, run.runtime.step_deadline_s
        self.pool = _pool(run, "reference", ScorerActor, run.reference.replicas, deadline_s, gpus, tell)

    async def score(self, shard: ShardRecord) -> Served[ObjectRef]:
        """See ``services.Reference``."""
        return await self.pool.call(lambda actor: actor.score.remote(shard), f"scores {shard.rollout.key}")
