"""Errors that end the loop: what is committed stays valid, and the next driver goes on from it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from steadyhelm.config import RunFile
from steadyhelm.data.types import BatchManifest
from steadyhelm.errors import NonFiniteError, ObjectMissingError, StoreError
from steadyhelm.loop import IterationReport, Loop, Services
from steadyhelm.services import Served
from steadyhelm.store import LocalStore, ObjectStore
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.log import CommitLog
from steadyhelm.telemetry import metrics as names
from steadyhelm.testing.fake_services import FakeLearner, FakePrompts, FakeReward, FakeRollout
from steadyhelm.testing.memory_store import MemoryStore

RUN = RunFile.model_validate(
    {
        "name": "fake",
        "model": {"path": "unused"},
        "data": {"train": "unused.py:pairs"},
        "rollout": {"engine": {"type": "transformers", "batch": 4}},
        "learner": {"train_batch": 4},
        "schedule": {"iterations": 4, "prompts_per_iteration": 8, "checkpoint_every": 2},
    }
)
EVERY_ID = [f"0:{n}" for n in range(32)]
BALLAST = ".ballast"


def make(store: ObjectStore, learner: FakeLearner | None = None) -> tuple[Loop, FakeLearner]:
    learner = learner or FakeLearner(store=store)
    services = Services(
        prompts=FakePrompts(run=RUN), rollout=FakeRollout(store=store), learner=learner, reward=FakeReward(store=store)
    )
    log = CommitLog.take_over(store, RUN.name, "test")
    return Loop(services, log, RunLayout(RUN.name), RUN, lambda event: None), learner


async def drive(loop: Loop, reports: list[IterationReport]) -> None:
    async for report in loop.iterations():
        reports.append(report)


def exact(reports: list[IterationReport]) -> dict[int, dict[str, float]]:
    return {r.iteration: names.exact(r.metrics) for r in reports if r.metrics}


class FillingStore(LocalStore):
    """A folder whose disk another program fills just before the nth put of a key like ``pattern``."""

    def __init__(self, root: Path, pattern: str, nth: int) -> None:
        super().__init__(root)
        self._pattern, self._left = pattern, nth

    def put(self, key, data, *, if_absent=False):
        self._left -= fnmatchcase(key, self._pattern)
        if self._left == 0:
            self._left = -1
            with (self.root / BALLAST).open("wb", buffering=0) as ballast:
                try:
                    while ballast.write(bytes(4096)):
                        pass
                except OSError:
                    pass
        return super().put(key, data, if_absent=if_absent)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system needs root and mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("pattern", "nth", "committed"),
    [
        ("fake/batches/000002/*.rollout", 2, 1),
        ("fake/batches/000003/*.reward", 1, 2),
        ("fake/log/*", 2, 0),  # weights of iteration 0
        ("fake/log/*", 5, 1),  # batch 2
        ("fake/weights/000002.*", 1, 2),
        ("fake/log/*", 7, 2),  # checkpoint 2
        ("fake/checkpoints/*", 1, 2),
        ("fake/checkpoints/*", 2, 4),
    ],
)
async def test_a_disk_that_fills_up_ends_the_run_and_freeing_space_lets_it_go_on(small_disk, pattern, nth, committed):
    undisturbed: list[IterationReport] = []
    await drive(make(MemoryStore())[0], undisturbed)
    reports: list[IterationReport] = []
    with pytest.raises(StoreError, match=r"the disk is full: free some space or point store\.uri to another disk"):
        await drive(make(FillingStore(small_disk, pattern, nth))[0], reports)
    store = LocalStore(small_disk)
    log = CommitLog.read(store, "fake")
    assert (log.last_iteration, log.torn) == (committed, None)
    for manifest in log.batches():
        for shard in manifest.shards:
            store.read(shard.rollout)
            store.read(shard.reward)
    (small_disk / BALLAST).unlink()
    loop, learner = make(store)
    await drive(loop, reports)
    assert learner.applied == EVERY_ID
    assert exact(reports) == exact(undisturbed)


class Exploding(FakeLearner):
    """Its loss is not finite in step ``explodes_at``."""

    explodes_at = 3

    async def step(self, manifest: BatchManifest) -> Served[None]:
        if self.steps + 1 == self.explodes_at:
            raise NonFiniteError(f"iteration {manifest.iteration}: the loss is not finite")
        return await super().step(manifest)


async def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_checkpoint_kept():
    store = MemoryStore()
    reports: list[IterationReport] = []
    with pytest.raises(NonFiniteError, match="iteration 3: the loss is not finite"):
        await drive(make(store, Exploding(store=store))[0], reports)
    log = CommitLog.read(store, "fake")
    checkpoint = log.checkpoint()
    assert (log.last_iteration, checkpoint.version.iteration) == (3, 2)
    assert json.loads(bytes(store.read(checkpoint.objects[0])))["applied"] == EVERY_ID[:16]
    loop, learner = make(store)
    await drive(loop, reports)
    assert learner.applied == EVERY_ID
    assert [r.iteration for r in reports if r.replayed] == [3]


async def test_a_shard_that_somebody_deleted_ends_the_replay_with_its_name():
    store = MemoryStore()
    with pytest.raises(NonFiniteError):
        await drive(make(store, Exploding(store=store))[0], [])
    shard = CommitLog.read(store, "fake").batches()[-1].shards[0]
    store.delete(shard.reward.key)
    with pytest.raises(ObjectMissingError, match=re.escape(shard.reward.key)):
        await drive(make(store)[0], [])


async def finished_run() -> tuple[MemoryStore, list[IterationReport]]:
    store, reports = MemoryStore(), []
    await drive(make(store)[0], reports)
    return store, reports


def harm(store: MemoryStore, key: str, how: str) -> None:
    if how == "damaged":
        store.damage(key, flip_bit=9)
    elif how == "truncated":
        store.damage(key, keep_bytes=3)
    else:
        store.delete(key)


@pytest.mark.parametrize("how", ["damaged", "truncated", "missing"])
@pytest.mark.parametrize("iterations", [(4,), (2, 4)], ids=["the newest", "all"])
async def test_in_place_of_a_checkpoint_that_is_gone_an_older_one_and_the_batches_bring_the_run_back(how, iterations):
    store, undisturbed = await finished_run()
    for iteration in iterations:
        harm(store, f"fake/checkpoints/{iteration:06d}.1/state", how)
    loop, learner = make(store)
    reports: list[IterationReport] = []
    await drive(loop, reports)
    assert learner.applied == EVERY_ID
    assert [r.iteration for r in reports if r.replayed] == ([3, 4] if iterations == (4,) else [1, 2, 3, 4])
    again = exact(reports)
    assert again == {iteration: exact(undisturbed)[iteration] for iteration in again}
    checkpoint = CommitLog.read(store, "fake").checkpoint()
    assert str(checkpoint.version) == "4.2"
    assert json.loads(bytes(store.read(checkpoint.objects[0])))["applied"] == EVERY_ID


@pytest.mark.parametrize("how", ["damaged", "truncated", "missing"])
async def test_weights_that_cannot_be_read_are_published_again(how):
    store, _ = await finished_run()
    harm(store, "fake/weights/000004.1/weights", how)
    told: list[object] = []
    services = Services(
        prompts=FakePrompts(run=RUN),
        rollout=FakeRollout(store=store),
        learner=FakeLearner(store=store),
        reward=FakeReward(store=store),
    )
    log = CommitLog.take_over(store, RUN.name, "test")
    await drive(Loop(services, log, RunLayout(RUN.name), RUN, told.append), [])
    weights = CommitLog.read(store, "fake").latest_weights()
    assert str(weights.version) == "4.2"
    assert json.loads(bytes(store.read(weights.objects[0])))["applied"] == EVERY_ID
    assert services.rollout.weights == weights
    assert ["Weights 4.1 cannot be read" in str(event) for event in told] == [True]


class Damaging(FakeLearner):
    """Its third version is damaged on the way to the store."""

    published = 0

    async def publish(self, version, key, known=None):
        served = await super().publish(version, key, known)
        self.published += 1
        if self.published == 3:
            self.store.damage(served.value.objects[0].key, flip_bit=9)
        return served


async def test_a_new_version_that_cannot_be_read_is_published_once_more():
    store, told = MemoryStore(), []
    learner = Damaging(store=store)
    services = Services(
        prompts=FakePrompts(run=RUN), rollout=FakeRollout(store=store), learner=learner, reward=FakeReward(store=store)
    )
    log = CommitLog.take_over(store, RUN.name, "test")
    reports: list[IterationReport] = []
    await drive(Loop(services, log, RunLayout(RUN.name), RUN, told.append), reports)
    assert learner.applied == EVERY_ID
    assert learner.published == len(reports) + 1
    assert ["Weights 2.1 cannot be read" in str(event) for event in told] == [True]


DRIVER = """
import asyncio, json, sys
from pathlib import Path
from steadyhelm.config import RunFile
from steadyhelm.errors import SteadyhelmError
from steadyhelm.loop import Loop, Services
from steadyhelm.store import LocalStore
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.liveness import held
from steadyhelm.store.log import CommitLog
from steadyhelm.testing.fake_services import FakeLearner, FakePrompts, FakeReward, FakeRollout

store, run = LocalStore(Path(sys.argv[1])), RunFile.model_validate_json(sys.argv[2])

async def drive():
    learner = FakeLearner(store=store)
    services = Services(prompts=FakePrompts(run=run), rollout=FakeRollout(store=store, slow_s=0.02), learner=learner,
                        reward=FakeReward(store=store))
    log = CommitLog.take_over(store, run.name, "test")
    loop = Loop(services, log, RunLayout(run.name), run, lambda event: None)
    async for report in loop.iterations():
        print("iteration", report.iteration, flush=True)
    print(json.dumps(learner.applied), flush=True)

try:
    with held(store, run.name, take_over="--take-over" in sys.argv):
        asyncio.run(drive())
except SteadyhelmError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(1)
"""


def test_a_second_driver_is_refused_or_takes_over_and_the_first_one_woken_up_commits_nothing(tmp_path):
    run = RUN.model_copy(update={"schedule": RUN.schedule.model_copy(update={"iterations": 40})}).model_dump_json()

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, tmp_path, run, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    first = start()
    try:
        for line in first.stdout:
            if line == "iteration 3\n":
                break
        os.kill(first.pid, signal.SIGSTOP)
        refused, _ = start().communicate(timeout=240)
        assert refused.startswith(
            f"HeldError another driver is running run 'fake' in file://{tmp_path} (pid {first.pid}"
        )
        second = start("--take-over")
        told, _ = second.communicate(timeout=240)
        assert second.returncode == 0, told
        assert json.loads(told.splitlines()[-1]) == [f"0:{n}" for n in range(320)]
        entries = CommitLog.read(LocalStore(tmp_path), "fake").entries
        os.kill(first.pid, signal.SIGCONT)
        woken, _ = first.communicate(timeout=240)
        assert first.returncode == 1
        assert "FencedError" in woken
        assert CommitLog.read(LocalStore(tmp_path), "fake").entries == entries
    finally:
        first.kill()
        first.wait()
