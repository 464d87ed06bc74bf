"""Making the batch of an iteration: rollout, then reference and reward, shard by shard."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from steadyhelm.config import RunFile
from steadyhelm.data.types import BatchManifest, PolicyVersion, Prompt, PromptId, Sampling, ShardRecord, Span
from steadyhelm.errors import DataError, FatalError, UnscoredError
from steadyhelm.services import Coming, Learner, PromptSource, Reference, Reward, Rollout, Served, ShardOrder
from steadyhelm.services.concurrency import together
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.ledger import OUTCOMES, TRAINED
from steadyhelm.store.log import LogView
from steadyhelm.telemetry import metrics as names
from steadyhelm.telemetry import phase_seconds

RESAMPLE_ROUNDS = 3
"""How often a prompt whose sample cannot be scored is sampled again before it counts as unscored: a judge that is
down for good must not turn into an endless loop of rollouts."""

OVERLONG, STALE = "dropped:overlong", "dropped:stale"
"""Ends of prompts that are not trained on: too long; sampled by too old a policy."""

SUMMED = (names.ROLLOUT_TOKENS, names.ROLLOUT_SAMPLES)
"""Metrics of a shard that add up; those that end in ``_max`` take the largest, all others are means."""
SPEEDS = (
    ("rollout.generate", names.ROLLOUT_TOKENS_PER_S, names.ROLLOUT_TOKENS),
    ("reference.forward", names.REFERENCE_TOKENS_PER_S, names.ROLLOUT_TOKENS),
    ("reward.score", names.REWARD_SAMPLES_PER_S, names.ROLLOUT_SAMPLES),
)
"""Phases, the metric of their speed, and what of it they work on; where workers overlap, time counts once."""

T = TypeVar("T")


class BatchServices(Protocol):
    """The services that a batch passes through."""

    @property
    def prompts(self) -> PromptSource:
        """Where prompts come from."""

    @property
    def rollout(self) -> Rollout:
        """Who samples completions."""

    @property
    def learner(self) -> Learner:
        """Who is told what the batch will need."""

    @property
    def reward(self) -> Reward | None:
        """Who scores them; None in supervised fine-tuning."""

    @property
    def reference(self) -> Reference | None:
        """Who adds reference log-probs; None where β is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The batch of an iteration, not yet committed."""

    manifest: BatchManifest
    spans: tuple[Span, ...]


class BatchMaker:
    """Makes batches ahead of the learner, ``schedule.max_staleness`` of them at most."""

    def __init__(self, services: BatchServices, layout: RunLayout, log: LogView, run: RunFile) -> None:
        self._services = services
        self._layout = layout
        self._log = log
        self._run = run
        self._making: dict[int, asyncio.Task[Batch]] = {}

    async def take(self, iteration: int, *, unless: asyncio.Event) -> Batch | None:
        """The batch of ``iteration``; None where ``unless`` is set before it is made. Raises the services' errors."""
        last = min(iteration + self._run.schedule.max_staleness, self._run.schedule.iterations)
        for ahead in range(iteration, last + 1):
            if ahead not in self._making and not unless.is_set():
                self._making[ahead] = asyncio.create_task(self._make(ahead), name=f"batch {ahead}")
        if iteration not in self._making:
            return None
        stopped = asyncio.create_task(unless.wait())
        try:
            await asyncio.wait({self._making[iteration], stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        if not self._making[iteration].done():
            return None
        return await self._making.pop(iteration)

    async def close(self) -> None:
        """Abandons the batches in the making."""
        tasks = list(self._making.values())
        self._making.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _make(self, iteration: int) -> Batch:
        prompts = await self._services.prompts.prompts(iteration)
        issued: list[Prompt] = list(prompts.value)
        images = tuple(dict.fromkeys(image for prompt in issued for image in prompt.images))
        self._services.learner.expect(Coming(iteration=iteration, images=images))
        groups = {prompt.prompt_id: prompt.group_id for prompt in issued}
        outcomes: dict[PromptId, str] = {}
        served: list[Served[ShardRecord]] = []
        todo = issued
        for round_ in range(RESAMPLE_ROUNDS + 1):
            served += await self._shards(iteration, len(served), todo)
            outcomes.update(self._outcomes([entry.value for entry in served], todo))
            unscored = [p for p in todo if outcomes[p.prompt_id].startswith("unscored")]
            if not unscored or self._run.reward.on_unscored != "resample" or round_ == RESAMPLE_ROUNDS:
                break
            again = await together([self._services.prompts.replacement(p.prompt_id) for p in unscored])
            todo = [answer.value for answer in again]
            groups |= {prompt.prompt_id: prompt.group_id for prompt in todo}
            for old, new in zip(unscored, todo, strict=True):
                outcomes[old.prompt_id] = f"replaced:{new.prompt_id}"
        spans = (*prompts.spans, *(span for entry in served for span in entry.spans))
        manifest = self._manifest(iteration, served, outcomes, spans)
        if self._run.schedule.drop_staler_than is not None:
            manifest = drop_stale(manifest, self._run.schedule.drop_staler_than, groups)
        self._refuse_untrainable(iteration, manifest.outcomes)
        return Batch(manifest=manifest, spans=spans)

    def _manifest(
        self,
        iteration: int,
        served: Sequence[Served[ShardRecord]],
        outcomes: Mapping[PromptId, str],
        spans: Sequence[Span],
    ) -> BatchManifest:
        """The manifest of scored shards, with the metrics of their making."""
        shards = tuple(entry.value for entry in served)
        metrics = merge(
            [entry.metrics for entry in served],
            samples=[len(shard.prompt_ids) for shard in shards],
            scored=[sum(shard.valid) for shard in shards],
        )
        seconds = phase_seconds(spans)
        for phase, speed, amount in SPEEDS:
            if spent := seconds.get(names.seconds(phase), 0.0):
                metrics[speed] = metrics[amount] / spent
        metrics |= _counts(outcomes)
        policy = self._policy(iteration, shards)
        return BatchManifest(iteration=iteration, policy=policy, shards=shards, outcomes=outcomes, metrics=metrics)

    def _policy(self, iteration: int, shards: Sequence[ShardRecord]) -> PolicyVersion:
        """The oldest policy version that sampled a token.

        Raises FatalError for one that was never published, and where a token is older than ``max_staleness`` allows or
        newer than the policy that the batch is trained from.
        """
        known = [shard for shard in shards if shard.prompt_ids]
        versions = [PolicyVersion(iteration=shard.min_version, attempt=shard.attempt) for shard in known]
        if self._run.is_sft or not known:
            return min(versions, default=PolicyVersion(iteration=0, attempt=self._log.attempt))
        policy, newest = min(versions), max(shard.max_version for shard in known)
        if not self._log.published(policy):
            raise FatalError(
                f"iteration {iteration}: an engine says that policy {policy} sampled its completions, but the log has "
                "no such version: the engine names another version than the one it was given, report it"
            )
        if not self._oldest_allowed(iteration) <= policy.iteration <= newest < iteration:
            raise FatalError(
                f"iteration {iteration}: engines say that policies {policy.iteration} to {newest} sampled its "
                f"completions, but schedule.max_staleness {self._run.schedule.max_staleness} allows "
                f"{self._oldest_allowed(iteration)} to {iteration - 1} only: report it"
            )
        return policy

    def _oldest_allowed(self, iteration: int) -> int:
        return max(0, iteration - 1 - self._run.schedule.max_staleness)

    async def _shards(self, iteration: int, first: int, prompts: Sequence[Prompt]) -> list[Served[ShardRecord]]:
        size, attempt = self._run.rollouts_per_shard, self._log.attempt
        sampling = Sampling(max_new_tokens=self._run.rollout.max_new_tokens, temperature=self._run.rollout.temperature)
        orders = [
            ShardOrder(
                key=self._layout.shard(iteration, attempt, first + n, "rollout"),
                shard=first + n,
                prompts=tuple(prompts[start : start + size]),
                sampling=sampling,
                min_version=0 if self._run.is_sft else self._oldest_allowed(iteration),
            )
            for n, start in enumerate(range(0, len(prompts), size))
        ]
        return await together([self._shard(iteration, order) for order in orders])

    async def _shard(self, iteration: int, order: ShardOrder) -> Served[ShardRecord]:
        """Rolls one shard out and has it scored, reference and reward at the same time."""
        rolled = await self._services.rollout.rollout(order)
        record, spans, metrics = rolled.value, [*rolled.spans], dict(rolled.metrics)
        self._services.learner.expect(Coming(iteration=iteration, objects=(record.rollout,)))
        calls: list[Coroutine[Any, Any, Served[Any]]] = []
        if self._services.reward is not None:
            calls.append(self._services.reward.score(record))
        if self._services.reference is not None:
            calls.append(self._services.reference.score(record))
        answers = await together(calls)
        for answer in answers:
            spans += answer.spans
            metrics.update(answer.metrics)
        if self._services.reward is not None:
            reward, valid = answers[0].value
            record = replace(record, reward=reward, valid=valid)
        else:
            record = replace(record, valid=(True,) * len(record.prompt_ids))
        if self._services.reference is not None:
            record = replace(record, reference=answers[-1].value)
        scores = tuple(ref for ref in (record.reward, record.reference) if ref is not None)
        if scores:
            self._services.learner.expect(Coming(iteration=iteration, objects=scores))
        return Served(value=record, spans=tuple(spans), metrics=metrics)

    def _outcomes(self, shards: Sequence[ShardRecord], prompts: Sequence[Prompt]) -> dict[PromptId, str]:
        """What became of each prompt: trained, dropped because no shard holds it, or unscored."""
        valid = {pid: ok for shard in shards for pid, ok in zip(shard.prompt_ids, shard.valid, strict=True)}
        named = {True: TRAINED, False: f"unscored:{self._run.reward.on_unscored}", None: OVERLONG}
        return {prompt.prompt_id: named[valid.get(prompt.prompt_id)] for prompt in prompts}

    def _refuse_untrainable(self, iteration: int, outcomes: Mapping[PromptId, str]) -> None:
        """Raises UnscoredError where the run file says ``stop``; it or DataError where nothing is left."""
        unscored = [prompt_id for prompt_id, outcome in outcomes.items() if outcome.startswith("unscored")]
        dropped = sum(outcome == OVERLONG for outcome in outcomes.values())
        stale = sum(outcome == STALE for outcome in outcomes.values())
        if unscored and self._run.reward.on_unscored == "stop":
            raise UnscoredError(
                f"iteration {iteration}: {len(unscored)} samples could not be scored (first: {unscored[0]}) "
                "and reward.on_unscored is 'stop'; their shards' details say why. Mend the reward term, or set "
                "'neutral' or 'resample'."
            )
        if TRAINED in outcomes.values():
            return
        if stale:
            schedule = self._run.schedule
            raise DataError(
                f"iteration {iteration}: all {stale} samples that could be trained on have a token more than "
                f"schedule.drop_staler_than ({schedule.drop_staler_than}) versions old and were dropped; nothing is "
                f"left. Raise it, lower schedule.max_staleness ({schedule.max_staleness}), or leave it out: then "
                "algorithm.correction weighs them."
            )
        limit = f"longer than data.max_prompt_tokens ({self._run.data.max_prompt_tokens})"
        if dropped == len(outcomes):
            raise DataError(
                f"iteration {iteration}: each of its {dropped} prompts is {limit} and was dropped; there is nothing to "
                "train on. Raise the limit, or lower data.max_pixels."
            )
        also = f", {dropped} more are {limit} and were dropped" if dropped else ""
        raise UnscoredError(
            f"iteration {iteration}: none of {len(outcomes) - dropped} samples could be scored{also}; there is nothing "
            "to train on. The shards' details say why."
        )


def drop_stale(manifest: BatchManifest, limit: int, groups: Mapping[PromptId, str]) -> BatchManifest:
    """``manifest`` without the groups that have a token sampled more than ``limit`` versions too early.

    Their samples that would be trained on end as ``STALE`` and are no longer valid; shards and objects stay. Samples
    that were not to be trained on anyway do not make their group stale.

    Args:
        manifest: of a batch in the making.
        limit: versions between the policy that the batch is trained from and the oldest that sampled a token.
        groups: the group of each prompt id.
    """
    least = manifest.iteration - 1 - limit
    stale = {
        groups[prompt_id]
        for shard in manifest.shards
        for prompt_id, oldest in zip(shard.prompt_ids, shard.oldest_versions, strict=True)
        if oldest < least and manifest.outcomes[prompt_id] == TRAINED
    }
    outcomes = {
        prompt_id: STALE if end == TRAINED and groups[prompt_id] in stale else end
        for prompt_id, end in manifest.outcomes.items()
    }
    shards = tuple(
        replace(
            shard,
            valid=tuple(ok and outcomes[pid] != STALE for pid, ok in zip(shard.prompt_ids, shard.valid, strict=True)),
        )
        for shard in manifest.shards
    )
    dropped = float(sum(end == STALE for end in outcomes.values()))
    metrics = {**manifest.metrics, **_counts(outcomes), names.STALENESS_DROPPED: dropped}
    return replace(manifest, shards=shards, outcomes=outcomes, metrics=metrics)


def _counts(outcomes: Mapping[PromptId, str]) -> dict[str, float]:
    """How many prompts ended in each way, as metrics."""
    ends = Counter(outcome.partition(":")[0] for outcome in outcomes.values())
    return {names.outcome(kind): float(ends[kind]) for kind in sorted(OUTCOMES)}


def merge(shards: Sequence[Mapping[str, float]], *, samples: Sequence[int], scored: Sequence[int]) -> dict[str, float]:
    """Metrics of a batch from those of its shards, as if the batch had been one shard.

    Args:
        shards: metrics of each shard; NaN and absent values are left out.
        samples: samples of each shard.
        scored: valid ones of them: what the reward's metrics are means over.

    Returns:
        Sums for ``SUMMED``, maxima for ``…_max``, and means for the rest; the reward's standard deviation is that of
        all valid samples together, N σ² = Σ nᵢ (σᵢ² + (μᵢ − μ)²).
    """
    merged: dict[str, float] = {}
    for name in sorted({name for shard in shards for name in shard}):  # the mean comes before the deviation
        over = scored if name.startswith("reward/") and name != names.REWARD_VALID_RATE else samples
        known = [(s, s[name], w) for s, w in zip(shards, over, strict=True) if not math.isnan(s.get(name, math.nan))]
        total = sum(weight for _, _, weight in known)
        if not total:
            continue
        if name in SUMMED:
            merged[name] = sum(value for _, value, _ in known)
        elif name.endswith("_max"):
            merged[name] = max(value for _, value, _ in known)
        elif name == names.REWARD_STD:
            mean = merged[names.REWARD_MEAN]
            squares = (weight * (std**2 + (shard[names.REWARD_MEAN] - mean) ** 2) for shard, std, weight in known)
            merged[name] = math.sqrt(sum(squares) / total)
        else:
            merged[name] = sum(value * weight for _, value, weight in known) / total
    return merged
