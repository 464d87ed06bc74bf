"""The reward service: scores a shard's completions and puts the scores beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steadyhelm import telemetry
from steadyhelm.config.reward import CustomTerm, Reward
from steadyhelm.data.types import ObjectRef, Rewards, ShardRecord, Trajectory
from steadyhelm.errors import ConfigError, ObjectExistsError
from steadyhelm.rewards.consistency import Judge, RulesJudge
from steadyhelm.rewards.custom import load_term
from steadyhelm.rewards.interface import Sample, Scope
from steadyhelm.rewards.scoring import means, score_samples
from steadyhelm.rewards.workers import TermProcesses
from steadyhelm.services import Served
from steadyhelm.store import ObjectStore
from steadyhelm.store.checksum import make_ref
from steadyhelm.store.codec import decode_rewards, decode_rollout, encode_rewards
from steadyhelm.telemetry import metrics as names

_SHARD_SCOPES: tuple[Scope, ...] = ("sample", "group")


class RewardScorer:
    """Scores shards with the run file's terms: built-in ones here, custom ones in processes under a deadline.

    A sample that cannot be scored is *unscored*: ``valid`` False, total NaN, the reason in its detail; never 0 or 1.

    Args:
        config: the run file's ``reward`` part.
        base: the run file's folder.
        store: where shards lie.
        group_size: samples per prompt, for terms of scope ``group``.
        judge: who compares thought and answer; None takes the rules.

    Raises ConfigError for terms that cannot be loaded, or whose scope is wider than a shard.
    """

    def __init__(
        self, config: Reward, *, base: Path, store: ObjectStore, group_size: int = 1, judge: Judge | None = None
    ) -> None:
        self._config = config
        self._store = store
        self._group_size = group_size
        self._judge: Judge = judge or RulesJudge()
        custom = [term for term in config.terms if isinstance(term, CustomTerm)]
        self._scopes = {term.name: _shard_scope(term, base, config) for term in custom}
        self._processes = (
            TermProcesses(custom, base, num_processes=config.workers, sample_deadline_s=config.sample_deadline_s)
            if custom
            else None
        )

    async def score(self, shard: ShardRecord) -> Served[tuple[ObjectRef, tuple[bool, ...]]]:
        """Puts the shard's ``Rewards`` as ``<shard>.reward``; a shard that was scored before keeps its first scores.

        Raises CorruptObjectError, ObjectMissingError, and RetryableError where the service is closed meanwhile.
        """
        key = shard.rollout.key.removesuffix(".rollout") + ".reward"
        with telemetry.collect() as spans:
            if await asyncio.to_thread(self._store.exists, key):
                ref, rewards = await asyncio.to_thread(self._first, key)
            else:
                with telemetry.span("reward", "read"):
                    trajectories = await asyncio.to_thread(self._trajectories, shard)
                with telemetry.span("reward", "score"):
                    rewards = await self._rewards(trajectories)
                with telemetry.span("reward", "write"):
                    ref, rewards = await asyncio.to_thread(self._put, key, rewards)
        return Served(value=(ref, tuple(rewards.valid.tolist())), spans=tuple(spans), metrics=_metrics(rewards))

    def close(self) -> None:
        """Ends the scoring processes; calls in flight raise RetryableError and put nothing."""
        if self._processes is not None:
            self._processes.close()

    async def _rewards(self, trajectories: Sequence[Trajectory]) -> Rewards:
        return await score_samples(
            [Sample.of(trajectory) for trajectory in trajectories],
            self._config,
            judge=self._judge,
            scopes=self._scopes,
            runner=self._processes,
            group_size=self._group_size,
        )

    def _trajectories(self, shard: ShardRecord) -> Sequence[Trajectory]:
        return decode_rollout(self._store.read(shard.rollout))

    def _put(self, key: str, rewards: Rewards) -> tuple[ObjectRef, Rewards]:
        try:
            return self._store.put(key, encode_rewards(rewards), if_absent=True), rewards
        except ObjectExistsError:
            return self._first(key)

    def _first(self, key: str) -> tuple[ObjectRef, Rewards]:
        """The object that an earlier call for the same shard has put."""
        data = self._store.get(key)
        return make_ref(key, [data]), decode_rewards(data)


def _shard_scope(term: CustomTerm, base: Path, config: Reward) -> Scope:
    """The term's scope. Raises ConfigError where a shard does not hold whole units of it."""
    scope = load_term(base, term).scope
    if scope not in _SHARD_SCOPES:
        raise ConfigError(
            f"{term.code}: its scope is {scope!r}, but shards are scored one by one; this version serves the scopes "
            f"{' and '.join(_SHARD_SCOPES)}"
        )
    if scope == "group" and config.on_unscored == "resample":
        raise ConfigError(
            f"{term.code}: its scope is 'group', and a single replaced sample would stand without its group; set "
            "reward.on_unscored to 'neutral' or 'stop'"
        )
    return scope


def _metrics(rewards: Rewards) -> dict[str, float]:
    """Means over the valid samples, and how many there are; a shard without any has no means."""
    valid = rewards.valid
    found = {names.REWARD_VALID_RATE: float(np.mean(valid)) if valid.size else float("nan")}
    if valid.any():
        found |= {names.reward_part(name): value for name, value in means(rewards).items()}
        found[names.REWARD_STD] = float(rewards.total[valid].std(dtype=np.float64))
    return found
