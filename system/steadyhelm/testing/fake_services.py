"""Services without models: exact arithmetic that shows which batches a policy was trained on, and in which order.

The fake policy's weights are one number and the list of the prompt ids that were applied to it. What a rollout
"samples" depends on the prompt's seed and on that number, so any difference in history shows in everything after it.
Shards are real ones: a completion's text is the number, and its reward too; an evaluation's is an answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import xxhash

from steadyhelm.config import RunFile
from steadyhelm.data.types import (
    BatchManifest,
    CheckpointRecord,
    FinishReason,
    ObjectRef,
    PolicyVersion,
    Prompt,
    PromptId,
    Rewards,
    ShardRecord,
    Trajectory,
    WeightsRecord,
)
from steadyhelm.errors import LearnerLostError, RetryableError
from steadyhelm.services import Coming, Served, ShardOrder
from steadyhelm.services.rollout.shards import put_shard
from steadyhelm.store import ObjectStore
from steadyhelm.store.codec import decode_rewards, decode_rollout, encode_rewards
from steadyhelm.telemetry.metrics import REWARD_MEAN, STALENESS_MAX, STALENESS_MEAN


@dataclass(kw_only=True)
class FakePrompts:
    """A PromptSource over ``"0:<n>"``, endless; ``pairs`` are held out."""

    run: RunFile
    pairs: int = 0

    async def prompts(self, iteration: int) -> Served[tuple[Prompt, ...]]:
        """The next ``prompts_per_iteration`` ids."""
        count = self.run.schedule.prompts_per_iteration
        start = (iteration - 1) * count
        return Served(value=tuple(self._prompt(f"0:{n}") for n in range(start, start + count)))

    async def replacement(self, prompt_id: PromptId) -> Served[Prompt]:
        """The id with its retry counted up."""
        stem, _, retry = prompt_id.partition("r")
        return Served(value=self._prompt(f"{stem}r{int(retry or 0) + 1}"))

    async def held_out(self, limit: int) -> Served[tuple[Prompt, ...]]:
        """Both orders of ``"eval-<n>"``."""
        pairs = range(min(limit or self.pairs, self.pairs))
        return Served(value=tuple(self._prompt(f"eval-{n}", swapped) for n in pairs for swapped in (False, True)))

    def _prompt(self, name: str, swapped: bool = False) -> Prompt:
        seed = xxhash.xxh3_64_intdigest(f"{self.run.seed}/{name}".encode()) >> 1
        return Prompt(
            prompt_id=PromptId(f"{name}/swapped" if swapped else name),
            group_id=name,
            text=name,
            images=(),
            label=2 if swapped else 1,
            swapped=swapped,
            seed=seed,
            pair_id=name,
        )


@dataclass(kw_only=True)
class FakeRollout:
    """A Rollout whose completions are numbers; ``slow_s`` seconds per shard."""

    store: ObjectStore
    slow_s: float = 0.0
    weights: WeightsRecord | None = None
    number: float = 0.0

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        """Puts one number per prompt. Raises RetryableError below ``min_version``."""
        if self.weights is None or self.weights.version.iteration < order.min_version:
            raise RetryableError(f"the fake engine has {self.weights}, the order wants {order.min_version}")
        await asyncio.sleep(self.slow_s)
        trajectories = [self._sample(prompt, self.weights.version, order.sampling.greedy) for prompt in order.prompts]
        put = put_shard(self.store, order, trajectories)
        return Served(value=put.record, metrics=put.metrics)

    def _sample(self, prompt: Prompt, version: PolicyVersion, greedy: bool) -> Trajectory:
        number = (prompt.seed % 1000) / 1000 + self.number
        return Trajectory(
            prompt=prompt,
            prompt_tokens=np.zeros(1, np.int32),
            tokens=np.zeros(1 + prompt.seed % 3, np.int32),
            logprobs=np.zeros(1 + prompt.seed % 3, np.float32),
            versions=np.full(1 + prompt.seed % 3, version.iteration, np.int32),
            attempt=version.attempt,
            finish=FinishReason.STOP,
            completion_text=f"<think></think><answer>{1 + round(number) % 2}</answer>" if greedy else repr(number),
        )

    async def apply_weights(self, weights: WeightsRecord) -> Served[None]:
        """Reads and serves the number."""
        self.number = json.loads(bytes(self.store.read(weights.objects[0])))["number"]
        self.weights = weights
        return Served(value=None)


@dataclass(kw_only=True)
class FakeReward:
    """A Reward that cannot score the ids in ``unscorable``."""

    store: ObjectStore
    unscorable: set[str] = field(default_factory=set)

    async def score(self, shard: ShardRecord) -> Served[tuple[ObjectRef, tuple[bool, ...]]]:
        """Puts each prompt's number as its reward."""
        sampled = decode_rollout(self.store.read(shard.rollout))
        valid = np.array([prompt_id not in self.unscorable for prompt_id in shard.prompt_ids], np.bool_)
        total = np.array([float(item.completion_text) for item in sampled], np.float32)
        total[~valid] = np.nan
        rewards = Rewards(total=total, valid=valid, components={"number": total}, detail=({},) * len(sampled))
        ref = self.store.put(shard.rollout.key.removesuffix("rollout") + "reward", encode_rewards(rewards))
        metrics = {REWARD_MEAN: float(total[valid].mean(dtype=np.float64))} if valid.any() else {}
        return Served(value=(ref, tuple(valid.tolist())), metrics=metrics)


@dataclass(kw_only=True)
class FakeLearner:
    """A Learner on one number; ``lose_at`` are steps (counted from 1) in which it loses a rank, once each."""

    store: ObjectStore
    number: float = 0.0
    applied: list[str] = field(default_factory=list)
    steps: int = 0
    lose_at: set[int] = field(default_factory=set)
    lost: bool = False
    expected: list[Coming] = field(default_factory=list)

    def expect(self, coming: Coming) -> None:
        """Remembers what it was told."""
        self.expected.append(coming)

    async def restore(self, checkpoint: CheckpointRecord | None) -> Served[None]:
        """Takes number and history of the checkpoint."""
        self.lost = False
        self.number, self.applied = 0.0, []
        if checkpoint is not None:
            self._load(self.store.read(checkpoint.objects[0]))
        return Served(value=None)

    async def step(self, manifest: BatchManifest) -> Served[None]:
        """Moves the number by the mean of the valid samples. Raises LearnerLostError."""
        self._require_alive()
        self.steps += 1
        if self.steps in self.lose_at:
            self.lost = True
            raise LearnerLostError("A fake rank was lost.")
        samples: list[tuple[str, float]] = []
        for shard in manifest.shards:
            assert shard.reward is not None
            rewards = decode_rewards(self.store.read(shard.reward)).total.tolist()
            scored = zip(shard.prompt_ids, rewards, shard.valid, strict=True)
            samples += [(prompt_id, reward) for prompt_id, reward, valid in scored if valid]
        gain = sum(value for _, value in samples) / len(samples)
        self.number = self.number * 0.75 + gain / 8
        self.applied += [pid for pid, _ in samples]
        ages = [manifest.iteration - 1 - oldest for shard in manifest.shards for oldest in shard.oldest_versions]
        staleness = {STALENESS_MEAN: sum(ages) / len(ages), STALENESS_MAX: float(max(ages))}
        return Served(value=None, metrics={"learner/loss": -gain, **staleness})

    async def publish(
        self, version: PolicyVersion, key: str, known: WeightsRecord | None = None
    ) -> Served[WeightsRecord]:
        """Puts number and history."""
        self._require_alive()
        data = self._bytes()
        checksum = xxhash.xxh3_128_hexdigest(data)
        if known is not None and known.checksum == checksum:
            return Served(value=known)
        ref = self.store.put(f"{key}/weights", data)
        return Served(value=WeightsRecord(version=version, objects=(ref,), checksum=checksum))

    async def save(self, version: PolicyVersion, key: str) -> Served[CheckpointRecord]:
        """Puts number and history."""
        self._require_alive()
        return Served(value=CheckpointRecord(version=version, objects=(self.store.put(f"{key}/state", self._bytes()),)))

    async def export(self, key: str) -> Served[tuple[ObjectRef, ...]]:
        """Puts number and history."""
        return Served(value=(self.store.put(f"{key}/model", self._bytes()),))

    def _require_alive(self) -> None:
        if self.lost:
            raise LearnerLostError("A fake rank is lost and nothing was restored.")

    def _bytes(self) -> bytes:
        return json.dumps({"number": self.number, "applied": self.applied}).encode()

    def _load(self, data: Iterable[int]) -> None:
        state = json.loads(bytes(data))
        self.number, self.applied = state["number"], list(state["applied"])
