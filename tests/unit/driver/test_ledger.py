"""The ledger at the end of a run, over batches that the loop's own code makes from fake services."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from steadyhelm.config import RunFile
from steadyhelm.data.types import BatchManifest, PolicyVersion, PromptId, ShardRecord
from steadyhelm.driver import Driver, RunOptions, settle_ledger
from steadyhelm.errors import FatalError
from steadyhelm.loop import Loop, Services
from steadyhelm.services import Served, ShardOrder
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.ledger import Record
from steadyhelm.store.log import CommitLog
from steadyhelm.testing.fake_services import FakeLearner, FakePrompts, FakeReward, FakeRollout
from steadyhelm.testing.memory_store import MemoryStore


def run_file(**reward: object) -> RunFile:
    return RunFile.model_validate(
        {
            "name": "fake",
            "model": {"path": "unused"},
            "data": {"train": "unused.py:pairs"},
            "rollout": {"engine": {"type": "transformers", "batch": 3}},
            "reward": reward,
            "learner": {"train_batch": 2},
            "schedule": {"iterations": 2, "prompts_per_iteration": 4},
        }
    )


class Dropping(FakeRollout):
    """Leaves one prompt out of its shard, as a rollout does with one that is too long."""

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        return await super().rollout(replace(order, prompts=tuple(p for p in order.prompts if p.prompt_id != "0:2")))


def services_of(store: MemoryStore, run: RunFile, *unscorable: str) -> Services:
    return Services(
        prompts=FakePrompts(run=run),
        rollout=Dropping(store=store),
        learner=FakeLearner(store=store),
        reward=FakeReward(store=store, unscorable=set(unscorable)),
    )


async def ledger_after(run: RunFile, *unscorable: str) -> tuple[dict[str, int], dict[PromptId, Record]]:
    store = MemoryStore()
    services = services_of(store, run, *unscorable)
    log = CommitLog.take_over(store, "fake", "start")
    async for _ in Loop(services, log, RunLayout("fake"), run, lambda _: None).iterations():
        pass
    ledger = await settle_ledger(CommitLog.read(store, "fake"), services.prompts, 0)
    assert sorted(ledger.trained()) == sorted(services.learner.applied)
    return ledger.counts(), dict(ledger.records)


async def test_the_ledger_reads_dropped_and_neutral_outcomes_as_the_loop_writes_them():
    counts, records = await ledger_after(run_file(on_unscored="neutral"), "0:5")
    assert counts == {"trained": 6, "dropped": 1, "unscored": 1}
    assert records["0:2"] == Record(iteration=1, outcome="dropped:overlong")
    assert records["0:5"] == Record(iteration=2, outcome="unscored:neutral")


async def test_the_ledger_reads_chains_of_replacements_as_the_loop_writes_them():
    hopeless = ("0:6", "0:6r1", "0:6r2", "0:6r3")
    counts, records = await ledger_after(run_file(on_unscored="resample"), "0:1", "0:1r1", *hopeless)
    assert counts == {"trained": 6, "dropped": 1, "replaced": 5, "unscored": 1}
    assert [records[name].outcome for name in ("0:1", "0:1r1", "0:1r2")] == [
        "replaced:0:1r1",
        "replaced:0:1r2",
        "trained",
    ]
    assert [records[name].outcome for name in hopeless] == [
        "replaced:0:6r1",
        "replaced:0:6r2",
        "replaced:0:6r3",
        "unscored:resample",
    ]


def batch(iteration: int, *dropped: str) -> BatchManifest:
    outcomes = {PromptId(name): "dropped:overlong" for name in dropped}
    policy = PolicyVersion(iteration=iteration - 1, attempt=1)
    return BatchManifest(iteration=iteration, policy=policy, shards=(), outcomes=outcomes)


FIRST = batch(1, "0:0", "0:1", "0:2", "0:3")
SECOND = batch(2, "0:4", "0:5", "0:6", "0:7")


async def finish(store: MemoryStore, *batches: BatchManifest, after: int | None = None) -> None:
    """The end of a driver's work over a log that holds these batches."""
    run = run_file()
    store.put("fake/run.json", (RECORD % run.model_dump_json()).encode())
    log = CommitLog.take_over(store, "fake", "start")
    for manifest in batches:
        log.commit_batch(manifest)
        if manifest.iteration == after:
            log.append("run_file", json.loads(RECORD % run.model_dump_json()) | {"after": after})
    driver = Driver(run, Path(), RunOptions(), store, RunLayout("fake"), log, lambda _: None)
    await driver._finish(services_of(store, run))


RECORD = '{"format": 1, "steadyhelm": "0", "after": 0, "run": %s}'


def finished(store: MemoryStore) -> dict[str, object]:
    """What the log's last word says, without the model's objects."""
    said = CommitLog.read(store, "fake").finished()
    assert [item["key"] for item in said.pop("model")] == ["fake/model/model"]
    return said


async def test_a_finished_run_says_what_became_of_its_prompts():
    store = MemoryStore()
    await finish(store, FIRST, SECOND)
    assert finished(store) == {"iterations": 2, "ledger": {"dropped": 8}, "ledger_after": 0}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (batch(2, "0:4", "0:6"), r"no record of 2 issued prompts \(0:5, 0:7\)"),
        (batch(2, "0:4", "0:5", "0:6", "0:7", "0:1"), r"'0:1' ended in iteration 1 already"),
        (batch(2, "0:4", "0:5", "0:6", "0:7", "9:9"), r"records of 1 that were not issued \(9:9\)"),
    ],
)
async def test_a_run_whose_ledger_does_not_add_up_does_not_finish(second, message):
    store = MemoryStore()
    with pytest.raises(FatalError, match=message):
        await finish(store, FIRST, second)
    assert CommitLog.read(store, "fake").finished() is None
    assert not [key for key in store.puts if key.startswith(("fake/model", "fake/report"))]


async def test_iterations_under_another_run_file_are_not_compared_with_what_this_one_issues():
    store = MemoryStore()
    await finish(store, batch(1, "0:6", "0:7"), SECOND, after=1)
    assert finished(store) == {"iterations": 2, "ledger": {"dropped": 4}, "ledger_after": 1}
