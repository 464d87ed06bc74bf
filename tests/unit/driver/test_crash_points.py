"""A crash on either side of every put that a driver causes: run file, evaluations, metrics, model, report, the end."""

import json

import pytest
from steadyhelm.config import RunFile
from steadyhelm.data.types import ObjectRef
from steadyhelm.driver import take_over
from steadyhelm.report import metrics_jsonl, read_metrics
from steadyhelm.store.log import CommitLog
from steadyhelm.store.records import from_json
from steadyhelm.telemetry import metrics as names
from steadyhelm.testing.fake_services import FakePrompts
from steadyhelm.testing.memory_store import InjectedCrash, MemoryStore

EVERY_ID = [f"0:{n}" for n in range(9)]
KINDS = {"run.json", "log", "batches", "weights", "checkpoints", "metrics", "eval", "model", "report"}


@pytest.fixture
def short(run_file: RunFile) -> RunFile:
    changes = {"iterations": 3, "prompts_per_iteration": 3, "checkpoint_every": 2}
    learner = run_file.learner.model_copy(update={"train_batch": 3})
    schedule = run_file.schedule.model_copy(update=changes)
    return run_file.model_copy(update={"schedule": schedule, "learner": learner})


def end_of(store: MemoryStore) -> tuple[object, ...]:
    """What a run leaves: what its weights were trained on, its metrics, its evaluations, what its last entry says."""
    log = CommitLog.read(store, "fake")
    finished = log.finished()
    (model,) = (from_json(ObjectRef, ref, "the model") for ref in finished.pop("model"))
    assert bytes(store.get("fake/report/metrics.jsonl")).decode() == metrics_jsonl(store, "fake")
    assert b"<html" in bytes(store.get("fake/report/report.html"))
    return (
        json.loads(bytes(store.read(model)))["applied"],
        {line.iteration: names.exact(line.metrics) for line in read_metrics(store, "fake")},
        {int(entry.payload["iteration"]) for entry in log.entries if entry.kind == "eval"},
        sum(entry.kind == "eval" for entry in log.entries),
        log.run_record()["run"],
        finished,
    )


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_crash_on_either_side_of_any_put_leaves_a_run_that_ends_as_an_undisturbed_one(start, short, when):
    async def drive(store: MemoryStore) -> None:
        await start(store, short, prompts=FakePrompts(run=short, pairs=1)).follow()

    whole = MemoryStore()
    await drive(whole)
    assert {key.split("/")[1] for key in whole.puts} == KINDS
    expected = end_of(whole)
    assert expected[0] == EVERY_ID
    assert expected[2:4] == ({0, 2, 3}, 3)
    for point, key in enumerate(whole.puts, start=1):
        store = MemoryStore()
        store.fail("*", nth=point, when=when)
        try:
            await drive(store)
            raise AssertionError(f"no crash {when} put {point}, {key}")
        except InjectedCrash:
            pass
        again = store.copy()
        if CommitLog.read(again, "fake").finished() is None:
            await drive(again)
        else:
            assert (key, when) == (whole.puts[-1], "after")
            assert take_over(short, again, "fake", False) is None
        assert end_of(again) == expected, f"crash {when} put {point}, {key}"
