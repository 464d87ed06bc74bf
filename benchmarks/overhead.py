"""System overhead of an iteration: wall time in which neither an engine nor the learner computes, over wall time.

Runs the digits recipe from a random model, for few iterations: once with an iteration of at least 20 s on two cores,
and once as `make train` runs it. The share is what the run itself logs as ``overhead/share``: one minus the union of
all spans that compute (forward passes of generation; forward, backward and optimiser of the learner), over the wall
time from one iteration's report to the next. The first iteration of each run warms caches and does not count.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import table
from steadyhelm.store import LocalStore
from steadyhelm.telemetry import metrics as names
from steadyhelm.telemetry.metrics_log import join_segments

RUN_FILE = Path(__file__).resolve().parents[1] / "workloads" / "r1_reward" / "digits.yaml"
GOAL = 0.03


def iterations(folder: Path, prompts: int, train_batch: int, count: int) -> list[dict[str, float]]:
    """Metrics of each iteration of a short run, the first left out.

    Raises RuntimeError where the run fails.
    """
    settings = {
        "model.path": "",
        "model.factory": "tiny_model.py:build",
        "data.eval": "null",
        "schedule.prompts_per_iteration": prompts,
        "learner.train_batch": train_batch,
        "schedule.iterations": count,
        "schedule.checkpoint_every": count,
        "store.uri": str(folder),
    }
    command = [sys.executable, "-m", "steadyhelm.cli", "run", str(RUN_FILE), "--id", f"n{prompts}", "--quiet"]
    command += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run failed:\n{done.stdout}{done.stderr}")
    store = LocalStore(folder)
    lines = join_segments({key: bytes(store.get(key)) for key in store.list(f"n{prompts}/metrics/")})
    return [dict(line.metrics) for line in lines if line.iteration > 1]


def measure(quick: bool) -> list[table.Row]:
    """The shares of a large iteration and of the digits run's."""
    rows: list[table.Row] = []
    sizes = [(512, 256, 3)] if quick else [(2560, 1280, 4), (128, 64, 12)]
    for prompts, train_batch, count in sizes:
        with tempfile.TemporaryDirectory() as folder:
            found = iterations(Path(folder), prompts, train_batch, count)
        share = statistics.median(line[names.OVERHEAD_SHARE] for line in found)
        seconds = statistics.median(line[names.ITERATION_SECONDS] for line in found)
        goal = GOAL if seconds >= 20 else None
        rows.append(
            table.Row(name=f"overhead of {prompts} rollouts", value=share, unit="ratio", goal=goal, better="lower")
        )
        rows.append(
            table.Row(name=f"iteration of {prompts} rollouts", value=seconds, unit="s", goal=None, better="lower")
        )
    return rows


if __name__ == "__main__":
    table.main(__doc__ or "", measure)
