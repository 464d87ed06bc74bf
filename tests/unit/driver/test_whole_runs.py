"""What the driver adds to the loop, and what a crash leaves of it: evaluations, metrics, model, report, the end."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from steadyhelm.cli import app
from steadyhelm.config import RunFile
from steadyhelm.data.types import ObjectRef, Prompt, ShardRecord
from steadyhelm.errors import DataError, FencedError
from steadyhelm.report import read_metrics
from steadyhelm.services import Served, ShardOrder
from steadyhelm.store import LocalStore
from steadyhelm.store.records import from_json
from steadyhelm.telemetry import MetricsLine
from steadyhelm.testing.fake_services import FakeLearner, FakePrompts, FakeReward, FakeRollout
from steadyhelm.testing.memory_store import InjectedCrash, MemoryStore
from typer.testing import CliRunner

EVERY_ID = [f"0:{n}" for n in range(16)]
EVALUATED = {0, 2, 4}


def evaluated(metrics: dict[int, dict[str, float]]) -> set[int]:
    return {iteration for iteration, values in metrics.items() if "eval/accuracy" in values}


async def test_a_run_ends_with_metrics_of_each_iteration_and_evaluation(start):
    run = start(MemoryStore())
    assert await run.follow() == EVERY_ID
    metrics = run.exact_metrics()
    assert sorted(metrics) == [0, 1, 2, 3, 4]
    assert evaluated(metrics) == EVALUATED
    assert metrics[2]["eval/pairs"] == 4.0


@pytest.mark.parametrize(("mode", "warned"), [("off", 1), ("auto", 0)])
async def test_a_run_that_trains_on_old_policies_without_correction_says_so_once_in_its_notes(
    start, run_file, mode, warned
):
    parts = run_file.model_dump()
    parts["schedule"]["max_staleness"] = 1
    parts["algorithm"]["correction"]["mode"] = mode
    run = start(MemoryStore(), RunFile.model_validate(parts))
    assert await run.follow() == EVERY_ID
    notes = [note for line in read_metrics(run.store, "fake") for note in line.notes]
    assert sum("algorithm.correction.mode is 'off'" in note for note in notes) == warned


async def test_an_evaluation_outlives_the_replay_of_its_iteration(start):
    store = MemoryStore()
    undisturbed = start(MemoryStore())
    await undisturbed.follow()
    store.fail("fake/checkpoints/*")  # behind iteration 3, which is not evaluated; 1 to 3 are stepped again
    with pytest.raises(InjectedCrash):
        await start(store).follow()
    resumed = start(store.copy())
    assert await resumed.follow() == EVERY_ID
    assert evaluated(resumed.exact_metrics()) == EVALUATED
    assert resumed.exact_metrics() == undisturbed.exact_metrics()


async def test_an_evaluation_whose_metrics_were_not_put_comes_back_from_the_log(start):
    store = MemoryStore()
    store.fail("fake/metrics/*", nth=3)  # of iteration 2, whose evaluation is committed
    with pytest.raises(InjectedCrash):
        await start(store).follow()
    resumed = start(store.copy())
    assert 2 in {entry.payload["iteration"] for entry in resumed.log.entries if entry.kind == "eval"}
    await resumed.follow()
    assert evaluated(resumed.exact_metrics()) == EVALUATED


class Slept(FakePrompts):
    """Sleeps, when the ledger asks for the first iteration again, through another driver's work."""

    async def prompts(self, iteration: int) -> Served[tuple[Prompt, ...]]:
        if self.meanwhile is not None and self.asked == self.run.schedule.iterations:
            await self.meanwhile()
        self.asked += 1
        return await super().prompts(iteration)

    asked = 0
    meanwhile: Callable[[], Awaitable[object]] | None = None


class SleptInExport(FakeLearner):
    """Sleeps through another driver's work once its model is put."""

    meanwhile: Callable[[], Awaitable[object]]

    async def export(self, key: str) -> Served[tuple[ObjectRef, ...]]:
        exported = await super().export(key)
        await self.meanwhile()
        return exported


async def test_the_last_word_of_a_run_names_its_model_with_checksums(start):
    store = MemoryStore()
    run = start(store)
    await run.follow()
    (ref,) = (from_json(ObjectRef, item, "the model") for item in run.log.finished()["model"])
    assert json.loads(bytes(store.read(ref)))["applied"] == EVERY_ID


@pytest.mark.parametrize("asleep", ["before the export", "before the report"])
async def test_a_driver_that_wakes_behind_its_successors_end_overwrites_neither_model_nor_report(
    start, run_file, asleep
):
    store, done = MemoryStore(), []

    async def successor() -> None:
        await start(store).follow()
        done.append(len(store.puts))

    if asleep == "before the export":
        sleeper = Slept(run=run_file, pairs=4)
        sleeper.meanwhile = successor
        first = start(store, prompts=sleeper)
    else:
        learner = SleptInExport(store=store)
        learner.meanwhile = successor
        first = start(store, learner=learner)
    with pytest.raises(FencedError, match="was taken over"):
        await first.follow()
    assert first.log.finished() is not None
    late = [key for key in store.puts[done[0] :] if not key.startswith("fake/metrics/1-")]
    assert late == []


class Overlong(FakeRollout):
    """Finds the prompts in ``too_long`` too long."""

    too_long: tuple[str, ...] = ()

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        kept = tuple(prompt for prompt in order.prompts if prompt.prompt_id not in self.too_long)
        return await super().rollout(replace(order, prompts=kept))


async def test_a_held_out_pair_of_which_one_order_is_too_long_is_left_out(start):
    store = MemoryStore()
    rollout = Overlong(store=store)
    rollout.too_long = ("eval-1/swapped", "eval-3")
    run = start(store, rollout=rollout)
    await run.follow()
    assert run.exact_metrics()[0]["eval/pairs"] == 2.0


async def test_held_out_pairs_that_are_all_too_long_name_the_limit(start):
    store = MemoryStore()
    rollout = Overlong(store=store)
    rollout.too_long = tuple(f"eval-{n}" for n in range(4))
    with pytest.raises(DataError, match=r"each of the 4 held-out pairs is longer than data\.max_prompt_tokens"):
        await start(store, rollout=rollout).follow()


async def test_each_iteration_says_how_its_prompts_ended_and_what_was_done_again(start):
    store = MemoryStore()
    reward = FakeReward(store=store, unscorable={"0:5"})
    run = start(store, reward=reward, learner=FakeLearner(store=store, lose_at={2}))
    await run.follow()
    lines = {line.iteration: line.metrics for line in read_metrics(store, "fake")}
    ends = {name: value for name, value in lines[2].items() if name.startswith("outcomes/")}
    assert ends == {"outcomes/trained": 3, "outcomes/unscored": 1, "outcomes/dropped": 0, "outcomes/replaced": 0}
    assert [lines[i]["run/restarts"] for i in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert [lines[i]["run/replayed_iterations"] for i in (1, 2, 3, 4)] == [1, 2, 2, 2]


async def test_a_finished_run_has_its_metrics_in_one_file_beside_the_report_and_the_command_prints_them(
    start, tmp_path
):
    store = LocalStore(tmp_path)
    await start(store).follow()
    text = bytes(store.get("fake/report/metrics.jsonl")).decode()
    assert [MetricsLine.parse(line) for line in text.splitlines()] == read_metrics(store, "fake")
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "fake"), "--metrics"])
    assert (shown.exit_code, shown.stdout) == (0, text)
