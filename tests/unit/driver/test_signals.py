"""What a signal leaves: an exit code, and a line on how to go on where there is something to go on with."""

import asyncio
import os
import signal
from dataclasses import dataclass, field

import pytest
from steadyhelm.cli import exit_code
from steadyhelm.data.types import BatchManifest, CheckpointRecord, ObjectRef, PolicyVersion
from steadyhelm.driver import RunOptions, _cancelled_by_signals
from steadyhelm.errors import StoppedError
from steadyhelm.report import read_metrics
from steadyhelm.services import Served
from steadyhelm.telemetry import Notice
from steadyhelm.telemetry.metrics import ITERATION_SECONDS
from steadyhelm.testing.fake_services import FakeLearner
from steadyhelm.testing.memory_store import MemoryStore


class Signalled(FakeLearner):
    """A signal comes while it exports."""

    driver: object

    async def export(self, key: str) -> Served[tuple[ObjectRef, ...]]:
        self.driver._signal = signal.SIGTERM
        return await super().export(key)


@dataclass
class Stopped(FakeLearner):
    """Learns of a signal in its second step; ``behind`` are the iterations with metrics when it saves."""

    driver: object = None
    behind: list[list[int]] = field(default_factory=list)

    async def step(self, manifest: BatchManifest) -> Served[None]:
        if manifest.iteration == 2:
            self.driver._signal = signal.SIGTERM
            self.driver._loop.stop()
        return await super().step(manifest)

    async def save(self, version: PolicyVersion, key: str) -> Served[CheckpointRecord]:
        self.behind.append(
            [line.iteration for line in read_metrics(self.store, "fake") if ITERATION_SECONDS in line.metrics]
        )
        return await super().save(version, key)


def lines(run) -> list[str]:
    return [event.text for event in run.told if isinstance(event, Notice)]


async def test_a_signal_while_the_run_finishes_is_not_the_end_of_an_unfinished_run(start):
    store = MemoryStore()
    learner = Signalled(store=store)
    run = start(store, learner=learner)
    learner.driver = run.driver
    await run.follow()
    assert run.driver._stopped() == 0
    assert [line.partition(":")[0] for line in lines(run)] == ["Finished. Model"]


async def test_no_checkpoint_is_ahead_of_the_metrics_behind_a_signal_either(start):
    store = MemoryStore()
    learner = Stopped(store=store)
    run = start(store, learner=learner)
    learner.driver = run.driver
    await run.follow()
    assert run.log.checkpoint().version.iteration == 2
    assert learner.behind == [[1, 2]]


async def test_who_stops_a_run_reads_the_whole_command_that_goes_on(start):
    options = RunOptions(new=True, command="steadyhelm run 'my runs/digits.yaml' --set=learner.lr=1e-5")
    run = start(MemoryStore(), options=options)
    run.driver._signal = signal.SIGINT
    await run.follow()
    assert run.driver._stopped() == 130
    assert lines(run)[-1].endswith("; steadyhelm run 'my runs/digits.yaml' --set=learner.lr=1e-5 --id fake goes on.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_an_evaluation_with_its_own_exit_code(number):
    async def evaluation() -> None:
        work = asyncio.current_task()
        with _cancelled_by_signals(work) as listen:
            signal.signal(number, signal.SIG_DFL)  # as Ray's start does
            listen()
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
            await asyncio.sleep(60)

    with pytest.raises(StoppedError, match=number.name) as caught:
        await asyncio.create_task(evaluation())
    assert exit_code(caught.value) == 128 + number
