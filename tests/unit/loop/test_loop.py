import asyncio
from dataclasses import replace

import pytest
from steadyhelm.config import RunFile
from steadyhelm.data.types import ImageKey, Prompt, PromptId, ShardRecord
from steadyhelm.errors import DataError, FatalError, LearnerLostError, UnscoredError
from steadyhelm.loop import IterationReport, Loop, Services
from steadyhelm.services import Coming, Served, ShardOrder
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.log import CommitLog
from steadyhelm.telemetry import metrics as names
from steadyhelm.testing.fake_services import FakeLearner, FakePrompts, FakeReward, FakeRollout
from steadyhelm.testing.memory_store import InjectedCrash, MemoryStore

RUN = RunFile.model_validate(
    {
        "name": "fake",
        "model": {"path": "unused"},
        "data": {"train": "unused.py:pairs"},
        "rollout": {"engine": {"type": "transformers", "batch": 3}},
        "learner": {"train_batch": 4, "max_restarts": 2},
        "schedule": {"iterations": 5, "prompts_per_iteration": 8, "checkpoint_every": 2},
    }
)
AHEAD = RunFile.model_validate(
    RUN.model_dump()
    | {
        "schedule": {**RUN.schedule.model_dump(), "max_staleness": 2},
        "algorithm": {"type": "stable_reinforce", "correction": {"mode": "token"}},
    }
)
EVERY_ID = [f"0:{n}" for n in range(40)]


def make(store: MemoryStore, run: RunFile = RUN, **services: object) -> tuple[Loop, Services, list[str]]:
    """A driver's attempt: fresh services over what ``store`` holds."""
    told: list[str] = []
    parts = {
        "prompts": FakePrompts(run=run),
        "rollout": FakeRollout(store=store),
        "learner": FakeLearner(store=store),
        "reward": FakeReward(store=store),
    } | services
    log = CommitLog.take_over(store, run.name, "test")
    made = Services(**parts)
    return Loop(made, log, RunLayout(run.name), run, lambda event: told.append(str(event))), made, told


async def drive(loop: Loop) -> list[IterationReport]:
    return [report async for report in loop.iterations()]


def exact(reports: list[IterationReport]) -> dict[int, dict[str, float]]:
    """The metrics that do not depend on clocks; of an iteration that came twice, the last ones."""
    return {r.iteration: names.exact(r.metrics) for r in reports if r.metrics}


async def test_every_prompt_is_trained_once_and_in_order():
    loop, services, _ = make(MemoryStore())
    reports = await drive(loop)
    assert [r.iteration for r in reports] == [0, 1, 2, 3, 4, 5]
    assert services.learner.applied == EVERY_ID


async def test_a_strictly_on_policy_batch_is_sampled_from_the_version_before_it():
    loop, _, _ = make(MemoryStore())
    reports = await drive(loop)
    assert [r.metrics[names.STALENESS_MAX] for r in reports if r.metrics] == [0.0] * 5


class Slow(FakeRollout):
    """Its second batch comes once somebody has been told that it is awaited."""

    def __init__(self, store: MemoryStore, told: asyncio.Event) -> None:
        super().__init__(store=store)
        self.told = told

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        if order.prompts[0].prompt_id.startswith("0:8"):
            await asyncio.wait_for(self.told.wait(), 30)
        return await super().rollout(order)


async def test_who_wants_to_know_is_told_while_a_batch_is_awaited():
    store, told, said = MemoryStore(), asyncio.Event(), []

    def meanwhile(iteration: int, seconds: float) -> None:
        said.append((iteration, seconds))
        told.set()

    services = make(store, rollout=Slow(store, told))[1]
    log = CommitLog.take_over(store, RUN.name, "test")
    loop = Loop(services, log, RunLayout(RUN.name), RUN, lambda _: None, meanwhile, look_s=0.01)
    await asyncio.wait_for(drive(loop), 60)
    assert 2 in {iteration for iteration, _ in said}
    assert all(seconds > 0 for _, seconds in said)
    assert services.learner.applied == EVERY_ID


async def test_what_is_awaited_has_ended_when_the_loop_is_cancelled():
    loop, waiting, ended = make(MemoryStore())[0], asyncio.Event(), []

    async def work() -> None:
        try:
            waiting.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    call = asyncio.create_task(loop._awaited(work(), 1, 0.0))
    await waiting.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended


@pytest.mark.parametrize("run", [RUN, AHEAD], ids=["k=0", "k=2"])
async def test_the_learner_is_told_of_images_and_objects_before_their_batch_is_committed(run):
    store = MemoryStore()
    committed = {}

    class WithImages(FakePrompts):
        async def prompts(self, iteration: int) -> Served[tuple[Prompt, ...]]:
            served = await super().prompts(iteration)
            images = (ImageKey("images/all"), ImageKey(f"images/{iteration}"))
            return Served(value=tuple(replace(prompt, images=images) for prompt in served.value))

    class Learner(FakeLearner):
        def expect(self, coming: Coming) -> None:
            last = CommitLog.read(store, "fake").last_iteration
            committed.update({(coming.iteration, what): last for what in (*coming.images, *coming.objects)})

    await drive(make(store, run, prompts=WithImages(run=run), learner=Learner(store=store))[0])
    for manifest in CommitLog.read(store, "fake").batches():
        needed = [ref for shard in manifest.shards for ref in (shard.rollout, shard.reward)]
        for what in ("images/all", f"images/{manifest.iteration}", *needed):
            assert committed[manifest.iteration, what] < manifest.iteration


async def crash_points(run: RunFile) -> int:
    store = MemoryStore()
    await drive(make(store, run)[0])
    return len(store.puts)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("run", [RUN, AHEAD], ids=["k=0", "k=2"])
async def test_a_crash_on_either_side_of_any_put_loses_nothing_and_trains_nothing_twice(run, when):
    points = await crash_points(run)
    assert points > 40
    undisturbed, services, _ = make(MemoryStore(), run)
    expected = exact(await drive(undisturbed))
    final = services.learner.number
    for point in range(1, points + 1):
        store = MemoryStore()
        store.fail("*", nth=point, when=when)
        seen: list[IterationReport] = []
        try:
            loop = make(store, run)[0]
            async for report in loop.iterations():
                seen.append(report)
            crashed = False
        except InjectedCrash:
            crashed = True
        assert crashed or point == points + 1, f"no crash at put {point}"
        loop, services, _ = make(store.copy(), run)
        seen += await drive(loop)
        assert services.learner.applied == EVERY_ID, f"crash {when} put {point} of {store.puts[-1:]}"
        if run is RUN:  # rollouts that ran ahead may be sampled from another version the second time
            assert exact(seen) == expected, f"crash {when} put {point}"
            assert services.learner.number == final


async def test_a_resumed_run_makes_no_committed_batch_again():
    store = MemoryStore()
    loop, _, _ = make(store)
    async for report in loop.iterations():
        if report.iteration == 3:
            break
    again = store.copy()
    loop, services, _ = make(again)
    await drive(loop)
    made = [key for key in again.puts if key.endswith(".rollout")]
    assert {key.split("/")[2] for key in made} == {"000004", "000005"}
    assert services.learner.applied == EVERY_ID


async def test_a_finished_loop_has_nothing_left_to_do():
    store = MemoryStore()
    await drive(make(store)[0])
    reports = await drive(make(store)[0])
    assert [(r.iteration, r.served, dict(r.metrics)) for r in reports] == [(5, True, {})]


async def test_a_lost_learner_goes_on_from_the_checkpoint_without_new_rollouts():
    store = MemoryStore()
    loop, services, told = make(store, learner=FakeLearner(store=store, lose_at={4}))
    reports = await drive(loop)
    assert services.learner.applied == EVERY_ID
    assert [r.iteration for r in reports if r.replayed] == [3, 4]
    assert any("checkpoint" in line for line in told)
    undisturbed, _, _ = make(MemoryStore())
    assert exact(reports) == exact(await drive(undisturbed))


async def test_a_batch_names_the_policy_version_that_sampled_it_also_where_another_attempt_published_that():
    store = MemoryStore()
    loop, _, _ = make(store)
    async for report in loop.iterations():
        if report.iteration == 3:
            break
    again = store.copy()
    await drive(make(again, learner=FakeLearner(store=again, lose_at={3}))[0])
    log = CommitLog.read(again, "fake")
    assert [str(m.policy) for m in log.batches()] == ["0.1", "1.1", "2.1", "3.1", "4.2"]
    sampled = [{s.rollout.key.split("/")[-1][0] for s in m.shards} for m in log.batches()]
    assert sampled == [{"1"}, {"1"}, {"1"}, {"2"}, {"2"}]


async def test_behind_a_lost_learner_batches_have_the_new_attempts_keys_and_policy():
    store = MemoryStore()
    await drive(make(store, learner=FakeLearner(store=store, lose_at={3}))[0])
    log = CommitLog.read(store, "fake")
    assert [str(m.policy) for m in log.batches()] == ["0.1", "1.1", "2.1", "3.2", "4.2"]
    keys = [m.shards[0].rollout.key.split("/")[-1] for m in log.batches()]
    assert keys == ["1-0000.rollout"] * 3 + ["2-0000.rollout"] * 2


async def test_a_batch_of_a_policy_version_that_nobody_published_is_refused():
    class Boasting(FakeRollout):
        async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
            served = await super().rollout(order)
            return replace(served, value=replace(served.value, attempt=7))

    store = MemoryStore()
    with pytest.raises(FatalError, match=r"policy 0\.7 sampled its completions, but the log has no such version"):
        await drive(make(store, rollout=Boasting(store=store))[0])
    assert CommitLog.read(store, "fake").last_iteration == 0


async def test_a_learner_that_is_lost_too_often_ends_the_run():
    store = MemoryStore()
    loop, _, _ = make(store, learner=FakeLearner(store=store, lose_at={2, 4, 6}))
    with pytest.raises(LearnerLostError):
        await drive(loop)


async def test_rollouts_run_ahead_by_max_staleness_versions_and_no_further():
    store = MemoryStore()
    loop, services, _ = make(store, AHEAD)
    reports = await drive(loop)
    assert [r.metrics[names.STALENESS_MAX] for r in reports if r.metrics] == [0.0, 1.0, 2.0, 2.0, 2.0]
    assert services.learner.applied == EVERY_ID


async def test_unscored_samples_stay_out_of_training_but_have_a_record():
    store = MemoryStore()
    reward = FakeReward(store=store, unscorable={"0:3", "0:12"})
    loop, services, _ = make(store, reward=reward)
    await drive(loop)
    assert services.learner.applied == [pid for pid in EVERY_ID if pid not in {"0:3", "0:12"}]
    outcomes = {k: v for m in CommitLog.read(store, "fake").batches() for k, v in m.outcomes.items()}
    assert outcomes["0:3"] == "unscored:neutral"
    assert outcomes["0:4"] == "trained"
    assert len(outcomes) == 40


def with_policy(policy: str) -> RunFile:
    return RUN.model_copy(update={"reward": RUN.reward.model_copy(update={"on_unscored": policy})})


async def test_resampled_prompts_are_replaced_by_another_sample():
    store = MemoryStore()
    reward = FakeReward(store=store, unscorable={"0:3", "0:12", "0:12r1"})
    loop, services, _ = make(store, with_policy("resample"), reward=reward)
    await drive(loop)
    assert "0:3r1" in services.learner.applied
    assert "0:12r2" in services.learner.applied
    assert len(services.learner.applied) == len(set(services.learner.applied)) == 40
    outcomes = {k: v for m in CommitLog.read(store, "fake").batches() for k, v in m.outcomes.items()}
    assert outcomes["0:12"] == "replaced:0:12r1"
    assert outcomes["0:12r1"] == "replaced:0:12r2"
    assert outcomes["0:12r2"] == "trained"


async def test_a_prompt_that_can_never_be_scored_ends_as_unscored():
    store = MemoryStore()
    reward = FakeReward(store=store, unscorable={"0:3", "0:3r1", "0:3r2", "0:3r3"})
    loop, services, _ = make(store, with_policy("resample"), reward=reward)
    await drive(loop)
    assert len(services.learner.applied) == 39
    outcomes = CommitLog.read(store, "fake").batches()[0].outcomes
    assert outcomes["0:3r3"] == "unscored:resample"


async def test_stop_ends_the_run_at_the_first_unscored_sample_with_nothing_committed():
    store = MemoryStore()
    loop, services, _ = make(store, with_policy("stop"), reward=FakeReward(store=store, unscorable={"0:9"}))
    with pytest.raises(UnscoredError, match="0:9"):
        await drive(loop)
    assert CommitLog.read(store, "fake").last_iteration == 1
    assert services.learner.applied == EVERY_ID[:8]


async def test_an_iteration_without_a_single_score_ends_the_run():
    store = MemoryStore()
    loop, _, _ = make(store, reward=FakeReward(store=store, unscorable=set(EVERY_ID[:8])))
    with pytest.raises(UnscoredError, match="none of 8"):
        await drive(loop)


async def test_stop_checkpoints_behind_the_step_in_progress():
    store = MemoryStore()
    loop, _, _ = make(store, rollout=FakeRollout(store=store, slow_s=0.05))
    async for report in loop.iterations():
        if report.iteration == 3:
            loop.stop()
    log = CommitLog.read(store, "fake")
    assert log.last_iteration == 3
    assert log.checkpoint().version.iteration == 3
    loop, services, _ = make(store)
    reports = await drive(loop)
    assert not any(r.replayed for r in reports)
    assert services.learner.applied == EVERY_ID


async def test_a_prompt_that_a_shard_leaves_out_is_recorded_as_dropped():
    class Dropping(FakeRollout):
        async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
            kept = tuple(p for p in order.prompts if p.prompt_id != "0:5")
            return await super().rollout(replace(order, prompts=kept))

    store = MemoryStore()
    loop, services, _ = make(store, rollout=Dropping(store=store))
    await drive(loop)
    assert "0:5" not in services.learner.applied
    assert CommitLog.read(store, "fake").batches()[0].outcomes["0:5"] == "dropped:overlong"


class DroppingAll(FakeRollout):
    """Finds every prompt but those of ``kept`` too long."""

    kept: tuple[str, ...] = ()

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        return await super().rollout(
            replace(order, prompts=tuple(p for p in order.prompts if p.prompt_id in self.kept))
        )


async def test_an_iteration_whose_prompts_are_all_too_long_names_the_limit():
    store = MemoryStore()
    with pytest.raises(DataError, match=r"each of its 8 prompts is longer than data\.max_prompt_tokens \(2048\)"):
        await drive(make(store, rollout=DroppingAll(store=store))[0])
    assert CommitLog.read(store, "fake").last_iteration == 0


async def test_an_iteration_of_which_the_rest_is_unscored_says_both():
    store = MemoryStore()
    rollout = DroppingAll(store=store)
    rollout.kept = ("0:1", "0:2")
    reward = FakeReward(store=store, unscorable={"0:1", "0:2"})
    with pytest.raises(UnscoredError, match=r"none of 2 samples could be scored, 6 more are longer than data\.max"):
        await drive(make(store, rollout=rollout, reward=reward)[0])


class Grouped(FakePrompts):
    """Three samples of each prompt, side by side."""

    async def prompts(self, iteration: int) -> Served[tuple[Prompt, ...]]:
        served = await super().prompts(iteration)
        samples = [
            replace(prompt, prompt_id=PromptId(f"{prompt.prompt_id}s{sample}"))
            for prompt in served.value
            for sample in range(3)
        ]
        return Served(value=tuple(samples))


async def test_no_prompts_samples_are_in_two_shards():
    rollout = {"engine": {"type": "transformers", "batch": 7}, "samples_per_prompt": 3}
    run = RunFile.model_validate(RUN.model_dump() | {"rollout": rollout})
    store = MemoryStore()
    await drive(make(store, run, prompts=Grouped(run=run))[0])
    for manifest in CommitLog.read(store, "fake").batches():
        assert [len(shard.prompt_ids) for shard in manifest.shards] == [6, 6, 6, 6]
        groups = [{prompt_id.partition("s")[0] for prompt_id in shard.prompt_ids} for shard in manifest.shards]
        assert [len(group) for group in groups] == [2, 2, 2, 2]


async def test_a_failing_shard_cancels_the_others_and_raises_its_own_error():
    class Failing(FakeRollout):
        async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
            if order.shard == 1:
                raise UnscoredError("shard 1 is broken")
            await asyncio.sleep(60)
            raise AssertionError

    store = MemoryStore()
    loop, _, _ = make(store, rollout=Failing(store=store))
    with pytest.raises(UnscoredError, match="shard 1"):
        await asyncio.wait_for(drive(loop), 5)


class PausedRollout(FakeRollout):
    async def apply_weights(self, weights):
        await super().apply_weights(weights)
        return Served(value=None, metrics={names.WEIGHTS_PAUSE_SECONDS: 1.0e-9})


async def test_an_iteration_says_how_long_its_weights_took_and_for_which_share_of_it_engines_paused():
    store = MemoryStore()
    loop, _, _ = make(store, rollout=PausedRollout(store=store))
    found = [report.metrics for report in await drive(loop) if report.metrics]
    for metrics in found:
        share = metrics[names.WEIGHTS_PAUSE_SECONDS] / metrics[names.ITERATION_SECONDS]
        assert metrics[names.WEIGHTS_PAUSE_SHARE] == pytest.approx(share)
        assert 0.0 < metrics[names.WEIGHTS_SYNC_SECONDS] < metrics[names.ITERATION_SECONDS]
    assert len(found) == 5
