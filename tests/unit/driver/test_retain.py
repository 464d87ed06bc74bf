"""What the driver deletes while the run goes on."""

from pathlib import Path

from steadyhelm.config import RunFile
from steadyhelm.data.types import BatchManifest, CheckpointRecord, PolicyVersion
from steadyhelm.driver import Driver, RunOptions
from steadyhelm.errors import StoreError
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.log import CommitLog
from steadyhelm.telemetry import Notice
from steadyhelm.testing.memory_store import MemoryStore


def driver_of(store: MemoryStore, told: list[object], keep: int) -> tuple[Driver, CommitLog]:
    run = RunFile.model_validate(
        {
            "name": "fake",
            "model": {"path": "unused"},
            "data": {"train": "unused.py:pairs"},
            "schedule": {"iterations": 9, "keep_checkpoints": keep},
        }
    )
    log = CommitLog.take_over(store, "fake", "start")
    return Driver(run, Path(), RunOptions(), store, RunLayout("fake"), log, told.append), log


def save(store: MemoryStore, log: CommitLog, iteration: int) -> None:
    version = PolicyVersion(iteration=iteration, attempt=1)
    log.commit_batch(BatchManifest(iteration=iteration, policy=version, shards=(), outcomes={}))
    ref = store.put(f"{RunLayout('fake').checkpoint(version)}/state.json", b"{}")
    log.commit_checkpoint(CheckpointRecord(version=version, objects=(ref,)))


def saved(store: MemoryStore) -> list[str]:
    return [key.split("/")[2] for key in store.list("fake/checkpoints/")]


async def test_behind_each_checkpoint_the_ones_that_it_replaces_go():
    store, told = MemoryStore(), []
    driver, log = driver_of(store, told, keep=2)
    await driver._retain()
    for iteration in (1, 2, 3, 4):
        save(store, log, iteration)
        await driver._retain()
        await driver._retain()
    assert saved(store) == ["000003.1", "000004.1"]
    assert told == []


async def test_a_run_that_keeps_all_deletes_nothing():
    store = MemoryStore()
    driver, log = driver_of(store, [], keep=0)
    for iteration in (1, 2, 3):
        save(store, log, iteration)
    await driver._retain()
    assert len(saved(store)) == 3


class Clinging(MemoryStore):
    """A store that deletes nothing."""

    def delete(self, key):
        raise StoreError("the credentials may not do that")


async def test_a_store_that_may_not_delete_is_told_and_the_run_goes_on():
    store, told = Clinging(), []
    driver, log = driver_of(store, told, keep=1)
    for iteration in (1, 2):
        save(store, log, iteration)
    await driver._retain()
    text = "Could not delete what the run needs no more: the credentials may not do that"
    assert told == [Notice(text=text, level="warning")]
