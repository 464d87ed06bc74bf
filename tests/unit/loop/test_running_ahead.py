"""Rollouts that run ahead: how old a token may be, what becomes of one that is too old, and that nothing is lost."""

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steadyhelm.batches import STALE, drop_stale
from steadyhelm.config import RunFile
from steadyhelm.data.types import (
    BatchManifest,
    ObjectRef,
    PolicyVersion,
    Prompt,
    PromptId,
    ShardRecord,
    Trajectory,
    WeightsRecord,
)
from steadyhelm.errors import DataError, FatalError
from steadyhelm.loop import Loop, Services
from steadyhelm.services import Served, ShardOrder
from steadyhelm.services.rollout.shards import put_shard
from steadyhelm.store.codec import decode_rollout
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.ledger import Ledger
from steadyhelm.store.log import CommitLog, LogView
from steadyhelm.telemetry import metrics as names
from steadyhelm.testing.fake_services import FakeLearner, FakePrompts, FakeReward, FakeRollout
from steadyhelm.testing.memory_store import MemoryStore

ITERATIONS, PROMPTS = 6, 6
EVERY_ID = [f"0:{n}" for n in range(ITERATIONS * PROMPTS)]
TICK_S = 0.0002


def run_file(ahead: int, drop: int | None = None) -> RunFile:
    return RunFile.model_validate(
        {
            "name": "fake",
            "model": {"path": "unused"},
            "data": {"train": "unused.py:pairs"},
            "rollout": {"engine": {"type": "transformers", "batch": 2}},
            "learner": {"train_batch": 4, "max_restarts": 9},
            "schedule": {
                "iterations": ITERATIONS,
                "prompts_per_iteration": PROMPTS,
                "checkpoint_every": 2,
                "max_staleness": ahead,
                "drop_staler_than": drop,
            },
        }
    )


def make(
    run: RunFile, store: MemoryStore, rollout: FakeRollout, learner: FakeLearner | None = None
) -> tuple[Loop, FakeLearner]:
    learner = learner or FakeLearner(store=store)
    services = Services(prompts=FakePrompts(run=run), rollout=rollout, learner=learner, reward=FakeReward(store=store))
    log = CommitLog.take_over(store, run.name, "test")
    return Loop(services, log, RunLayout(run.name), run, lambda event: None), learner


@dataclass
class Told:
    """What the engine had when it sampled each token, and the weights it was given."""

    served: list[PolicyVersion] = field(default_factory=list)
    sampled: dict[str, list[int]] = field(default_factory=dict)


@dataclass(kw_only=True)
class TokenByToken(FakeRollout):
    """Samples a token a tick, so that weights come in flight; takes as many ticks as drawn for weights and for tokens.

    ``told`` keeps, per shard key and prompt, which weights were served as each token was sampled.
    """

    told: Told
    token_ticks: list[int]
    weights_ticks: list[int]

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        while self.weights is None or self.weights.version.iteration < order.min_version:  # noqa: ASYNC110
            await asyncio.sleep(TICK_S)
        version, found = self.weights.version, []
        for prompt in order.prompts:
            whole = self._sample(prompt, version, greedy=False)
            versions = []
            for _ in range(3):
                await asyncio.sleep(TICK_S * self._next(self.token_ticks))
                if self.weights.version.attempt != version.attempt:  # as an engine does: another lineage's weights
                    return await self.rollout(order)
                versions.append(self.weights.version.iteration)
            self.told.sampled[f"{order.key}/{prompt.prompt_id}"] = versions
            found.append(self._of(whole, versions))
        put = put_shard(self.store, order, found)
        return Served(value=put.record, metrics=put.metrics)

    @staticmethod
    def _of(whole: Trajectory, versions: list[int]) -> Trajectory:
        return replace(
            whole,
            tokens=np.zeros(3, np.int32),
            logprobs=np.zeros(3, np.float32),
            versions=np.array(versions, np.int32),
        )

    async def apply_weights(self, weights: WeightsRecord) -> Served[None]:
        await asyncio.sleep(TICK_S * self._next(self.weights_ticks))
        self.told.served.append(weights.version)
        return await super().apply_weights(weights)

    @staticmethod
    def _next(ticks: list[int]) -> int:
        ticks.append(ticks.pop(0))
        return ticks[-1]


@dataclass(kw_only=True)
class Paced(FakeLearner):
    """Steps take as many ticks as drawn."""

    ticks: list[int]

    async def step(self, manifest: BatchManifest) -> Served[None]:
        self.ticks.append(self.ticks.pop(0))
        await asyncio.sleep(TICK_S * self.ticks[-1])
        return await super().step(manifest)


TICKS = st.lists(st.integers(0, 12), min_size=1, max_size=5)


async def drive(
    run: RunFile, store: MemoryStore, told: Told, pace: dict[str, list[int]], lose_at: set[int], until: int
):
    """One driver's attempt, which ends without a word behind iteration ``until``; the prompts that it applied."""
    learner = Paced(store=store, lose_at=set(lose_at), ticks=list(pace["step"]))
    rollout = TokenByToken(store=store, told=told, token_ticks=list(pace["token"]), weights_ticks=list(pace["weights"]))
    loop, _ = make(run, store, rollout, learner)
    reports = loop.iterations()
    async for report in reports:
        if report.metrics and report.iteration >= until:
            break
    await reports.aclose()
    return learner.applied


def check_log(store: MemoryStore, run: RunFile, told: Told) -> LogView:
    """Each token of each batch is as young as k allows, and of the very version that sampled it, a committed one."""
    log = CommitLog.read(store, run.name)
    for manifest in log.batches():
        for shard in manifest.shards:
            for number, row in enumerate(decode_rollout(store.read(shard.rollout))):
                versions = row.versions.tolist()
                assert versions == told.sampled[f"{shard.rollout.key}/{row.prompt.prompt_id}"]
                assert max(0, manifest.iteration - 1 - run.schedule.max_staleness) <= min(versions)
                assert max(versions) < manifest.iteration
                assert (shard.oldest or (shard.min_version,) * len(shard.prompt_ids))[number] == min(versions)
                for version in versions:
                    assert log.published(PolicyVersion(iteration=version, attempt=row.attempt))
    return log


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    ahead=st.integers(0, 4),
    pace=st.fixed_dictionaries({"step": TICKS, "token": TICKS, "weights": TICKS}),
    lose_at=st.sets(st.integers(1, 8), max_size=2),
    stops=st.lists(st.integers(1, ITERATIONS), max_size=2),
)
def test_however_fast_each_side_is_and_whatever_is_lost_no_token_is_older_than_k_and_each_prompt_is_trained_once(
    ahead, pace, lose_at, stops
):
    run, store, told = run_file(ahead), MemoryStore(), Told()

    async def attempts() -> list[str]:
        for stop in stops:
            await drive(run, store, told, pace, lose_at, stop)
        return await drive(run, store, told, pace, lose_at, ITERATIONS)

    assert asyncio.run(asyncio.wait_for(attempts(), 60)) == EVERY_ID
    log = check_log(store, run, told)
    assert Ledger.of(log.batches()).counts() == {"trained": len(EVERY_ID)}
    assert all(log.published(version) for version in told.served)


@dataclass(kw_only=True)
class Crossing(FakeRollout):
    """In batch 2 each third token waits for weights 1, which in turn wait for the two tokens before it."""

    halfway: asyncio.Event = field(default_factory=asyncio.Event)
    served: asyncio.Event = field(default_factory=asyncio.Event)

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        found = []
        for prompt in order.prompts:
            whole = self._sample(prompt, self.weights.version, greedy=False)
            versions = [self.weights.version.iteration] * 2
            if "/000002/" in order.key:
                self.halfway.set()
                await self.served.wait()
            found.append(TokenByToken._of(whole, [*versions, self.weights.version.iteration]))
        return Served(value=put_shard(self.store, order, found).record)

    async def apply_weights(self, weights: WeightsRecord) -> Served[None]:
        if weights.version.iteration == 1:
            await self.halfway.wait()
        answer = await super().apply_weights(weights)
        if weights.version.iteration == 1:
            self.served.set()
        return answer


async def test_weights_that_come_in_flight_stand_in_the_middle_of_a_completion_and_the_record_says_whose():
    run, store = run_file(1), MemoryStore()
    loop, learner = make(run, store, Crossing(store=store))
    async with asyncio.timeout(20):
        async for _ in loop.iterations():
            pass
    assert learner.applied == EVERY_ID
    batch = CommitLog.read(store, run.name).batches()[1]
    assert [(shard.oldest, shard.min_version, shard.max_version) for shard in batch.shards] == [((0, 1), 0, 1)] * 3
    versions = [row.versions.tolist() for row in decode_rollout(store.read(batch.shards[0].rollout))]
    assert versions == [[0, 0, 1], [1, 1, 1]]


async def test_a_batch_of_a_lost_lineage_is_trained_with_the_versions_that_sampled_it():
    """The learner is lost in step 2, and comes back as another attempt; what ran ahead of it is not sampled anew."""
    run, store, told = run_file(2), MemoryStore(), Told()
    applied = await drive(run, store, told, {"step": [9], "token": [0], "weights": [0]}, {2}, ITERATIONS)
    assert applied == EVERY_ID
    log = check_log(store, run, told)
    policies = {manifest.iteration: manifest.policy for manifest in log.batches()}
    assert {policy.attempt for policy in policies.values()} == {1, 2}
    assert policies[3].attempt == 1
    assert all(log.published(policy) for policy in policies.values())


@dataclass(kw_only=True)
class Shifted(FakeRollout):
    """Waits for the newest weights; samples prompts from as many versions after those as ``shifts`` says, or before."""

    shifts: dict[str, int]

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        newest = int(order.key.split("/")[2]) - 1
        async with asyncio.timeout(10):
            while self.weights is None or self.weights.version.iteration < newest:  # noqa: ASYNC110
                await asyncio.sleep(TICK_S)
        return await super().rollout(order)

    def _sample(self, prompt: Prompt, version: PolicyVersion, greedy: bool) -> Trajectory:
        row = super()._sample(prompt, version, greedy)
        return replace(row, versions=row.versions + np.int32(self.shifts.get(prompt.group_id, 0)))


async def trained(run: RunFile, store: MemoryStore, **shifts: int) -> list[str]:
    """The prompts that a run applied whose engine shifts the versions of ``p<n>`` (prompt ``0:<n>``)."""
    shifted = Shifted(store=store, shifts={f"0:{name[1:]}": shift for name, shift in shifts.items()})
    loop, learner = make(run, store, shifted)
    async for _ in loop.iterations():
        pass
    return learner.applied


@pytest.mark.parametrize(("shift", "message"), [(1, "policies 1 to 2 sampled"), (-1, "policies 0 to 1 sampled")])
async def test_an_engine_whose_tokens_are_too_young_or_too_old_for_their_batch_is_found_out(shift, message):
    store = MemoryStore()
    with pytest.raises(FatalError, match=rf"iteration 2: engines say that {message} .* allows 1 to 1 only"):
        await trained(run_file(0), store, p7=shift)
    assert CommitLog.read(store, "fake").last_iteration == 1


async def test_a_prompt_that_is_staler_than_allowed_is_dropped_with_a_record_and_a_count():
    run, store = run_file(2, drop=1), MemoryStore()
    applied = await trained(run, store, p13=-2, p20=-1)  # in iterations 3 and 4
    assert applied == [prompt_id for prompt_id in EVERY_ID if prompt_id != "0:13"]
    batches = CommitLog.read(store, "fake").batches()
    assert batches[2].outcomes["0:13"] == "dropped:stale"
    assert Ledger.of(batches).counts() == {"trained": len(EVERY_ID) - 1, "dropped": 1}
    assert [batch.metrics[names.STALENESS_DROPPED] for batch in batches] == [0, 0, 1, 0, 0, 0]
    assert [batch.metrics[names.outcome("trained")] for batch in batches] == [6, 6, 5, 6, 6, 6]


async def test_without_a_bound_the_same_prompt_is_trained_on():
    run, store = run_file(2), MemoryStore()
    assert await trained(run, store, p13=-2, p20=-1) == EVERY_ID
    assert all(names.STALENESS_DROPPED not in batch.metrics for batch in CommitLog.read(store, "fake").batches())


async def test_a_batch_of_which_nothing_is_fresh_enough_ends_the_run_with_a_remedy():
    store = MemoryStore()
    with pytest.raises(
        DataError, match=r"iteration 3: all 6 samples .* schedule\.drop_staler_than \(1\) .* were dropped"
    ):
        await trained(run_file(2, drop=1), store, **{f"p{n}": -2 for n in range(12, 18)})
    assert CommitLog.read(store, "fake").last_iteration == 2


def record(ids: list[str], oldest: tuple[int, ...], valid: tuple[bool, ...], least: int) -> ShardRecord:
    return ShardRecord(
        shard=0,
        rollout=ObjectRef(key="k", num_bytes=1, xxh3="0"),
        prompt_ids=tuple(PromptId(name) for name in ids),
        num_tokens=9,
        min_version=least,
        max_version=4,
        attempt=1,
        valid=valid,
        oldest=oldest,
    )


def test_a_stale_sample_takes_its_group_with_it_but_an_unscored_one_does_not():
    ids = ["0:1s0", "0:1s1", "0:2s0", "0:2s1", "0:3s0"]
    shards = (
        record(ids[:4], (2, 4, 4, 1), (True, True, True, False), 1),
        record(ids[4:], (), (True,), 3),  # all of one version, as written before there was a field for it
    )
    ends = dict.fromkeys(map(PromptId, ids), "trained") | {PromptId("0:2s1"): "unscored:neutral"}
    manifest = BatchManifest(iteration=5, policy=PolicyVersion(iteration=1, attempt=1), shards=shards, outcomes=ends)
    kept = drop_stale(manifest, 1, {PromptId(name): name.partition("s")[0] for name in ids})
    assert [name for name in ids if kept.outcomes[name] == STALE] == ["0:1s0", "0:1s1"]
    assert kept.outcomes["0:2s1"] == "unscored:neutral"
    assert [shard.valid for shard in kept.shards] == [(False, False, True, False), (True,)]
    assert kept.metrics[names.STALENESS_DROPPED] == 2
    Ledger.of([kept])
