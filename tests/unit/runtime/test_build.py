"""What a service's process does before it builds its service."""

import os
from pathlib import Path

import pytest
from steadyhelm.config import RunFile
from steadyhelm.runtime import build
from steadyhelm.services.rollout.worker import RolloutWorker


@pytest.mark.parametrize(
    ("ahead", "gpus", "nicer"), [(0, 0.0, []), (1, 0.0, [build.GIVE_WAY]), (1, 1.0, [])], ids=["k0", "k1", "k1 GPU"]
)
def test_an_engine_on_cpus_that_runs_ahead_gives_way_to_the_learner(monkeypatch, tmp_path: Path, ahead, gpus, nicer):
    told: list[int] = []
    monkeypatch.setattr(os, "nice", told.append)
    monkeypatch.setattr(RolloutWorker, "build", lambda spec: spec)
    run = RunFile.model_validate(
        {
            "name": "fake",
            "model": {"path": str(tmp_path)},
            "data": {"train": "unused.py:pairs"},
            "schedule": {"iterations": 1, "prompts_per_iteration": 4, "max_staleness": ahead},
            "learner": {"train_batch": 4},
            "runtime": {"gpus_per_engine": gpus},
        }
    )
    uri, folder = f"file://{tmp_path}/runs", str(tmp_path)
    place = build.RunPlace(run=run, run_id="fake", attempt=1, base=folder, store_uri=uri, model=folder)
    assert build.rollout(place).version.iteration == 0
    assert told == nicer
