"""The run file of a run: written once, changed by an entry of the log."""

import json

import pytest
from steadyhelm.config import RunFile
from steadyhelm.driver import take_over
from steadyhelm.errors import ConfigError, FencedError
from steadyhelm.store.log import CommitLog
from steadyhelm.testing.memory_store import MemoryStore


def changed(run: RunFile, **schedule: object) -> RunFile:
    return run.model_copy(update={"schedule": run.schedule.model_copy(update=schedule)})


def test_an_accepted_change_is_an_entry_of_the_log_and_the_first_file_stays_as_it_was(run_file):
    store, other = MemoryStore(), changed(run_file, checkpoint_every=2)
    take_over(run_file, store, "fake", False)
    first = bytes(store.get("fake/run.json"))
    with pytest.raises(ConfigError, match=r"schedule\.checkpoint_every: 3 → 2"):
        take_over(other, store, "fake", False)
    assert CommitLog.read(store, "fake").attempt == 1
    take_over(other, store, "fake", True)
    take_over(other, store, "fake", False)
    with pytest.raises(ConfigError, match=r"schedule\.checkpoint_every: 2 → 3"):
        take_over(run_file, store, "fake", False)
    log = CommitLog.read(store, "fake")
    assert [entry.kind for entry in log.entries] == ["attempt", "attempt", "run_file", "attempt"]
    assert (log.run_record()["run"]["schedule"]["checkpoint_every"], log.run_record()["after"]) == (2, 0)
    assert bytes(store.get("fake/run.json")) == first
    assert json.loads(first)["run"]["schedule"]["checkpoint_every"] == 3


async def test_a_finished_run_goes_on_under_an_accepted_change_and_says_behind_which_iteration_it_holds(
    start, run_file
):
    store = MemoryStore()
    await start(store).follow()
    assert take_over(run_file, store, "fake", False) is None
    log = take_over(changed(run_file, iterations=8), store, "fake", True)
    assert log.finished() is None
    assert (log.run_record()["run"]["schedule"]["iterations"], log.run_record()["after"]) == (8, 4)
    longer = start(store, changed(run_file, iterations=8))
    assert await longer.follow() == [f"0:{n}" for n in range(32)]
    assert longer.log.finished()["iterations"] == 8


def test_who_was_taken_over_changes_no_run_file(run_file):
    store = MemoryStore()
    slept = take_over(run_file, store, "fake", False)
    take_over(run_file, store, "fake", False)
    with pytest.raises(FencedError, match="was taken over"):
        slept.append("run_file", {"after": 0, "run": {}})
    assert CommitLog.read(store, "fake").run_record()["run"] == run_file.model_dump(mode="json")
