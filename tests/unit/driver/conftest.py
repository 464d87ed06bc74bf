"""Whole runs of the driver over fake services: everything of a run but its processes."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from steadyhelm.config import RunFile
from steadyhelm.driver import Driver, RunOptions, take_over
from steadyhelm.loop import Services
from steadyhelm.report import read_metrics
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.log import CommitLog, LogView
from steadyhelm.telemetry import Event
from steadyhelm.telemetry import metrics as names
from steadyhelm.testing.fake_services import FakeLearner, FakePrompts, FakeReward, FakeRollout
from steadyhelm.testing.memory_store import MemoryStore

PLAIN = RunOptions()


@dataclass(kw_only=True)
class Attempt:
    """One driver of a run, its services, and what it told."""

    store: MemoryStore
    run: RunFile
    driver: Driver
    services: Services
    told: list[Event] = field(default_factory=list)

    async def follow(self) -> list[str]:
        """Drives to the end; the prompts that were applied to the final weights."""
        await self.driver.follow(self.services)
        return self.services.learner.applied

    @property
    def log(self) -> LogView:
        return CommitLog.read(self.store, "fake")

    def exact_metrics(self) -> dict[int, dict[str, float]]:
        return {line.iteration: names.exact(line.metrics) for line in read_metrics(self.store, "fake")}


@pytest.fixture
def run_file() -> RunFile:
    return RunFile.model_validate(
        {
            "name": "fake",
            "model": {"path": "unused"},
            "data": {"train": "unused.py:pairs", "eval": "unused.py:held_out"},
            "rollout": {"engine": {"type": "transformers", "batch": 3}},
            "learner": {"train_batch": 4},
            "schedule": {
                "iterations": 4,
                "prompts_per_iteration": 4,
                "checkpoint_every": 3,
                "eval_every": 2,
                "keep_checkpoints": 0,
            },
        }
    )


@pytest.fixture
def start(run_file: RunFile):
    def make(store: MemoryStore, run: RunFile = run_file, options: RunOptions = PLAIN, **services: object) -> Attempt:
        layout, told = RunLayout("fake"), []
        log = take_over(run, store, "fake", False)
        parts = {
            "prompts": FakePrompts(run=run, pairs=4),
            "rollout": FakeRollout(store=store),
            "learner": FakeLearner(store=store),
            "reward": FakeReward(store=store),
        } | services
        driver = Driver(run, Path(), options, store, layout, log, told.append)
        return Attempt(store=store, run=run, driver=driver, services=Services(**parts), told=told)

    return make
