"""System overhead of an iteration: wall time in which neither an engine nor the learner computes, over wall time.

Runs the digits recipe from a random model, for few iterations: once with an iteration of at least 20 s on two cores,
and once with the sizes of ``make train``. The share is what the run itself logs as ``overhead/share``: one minus the
union of all spans that compute (forward passes of generation; forward, backward and optimiser of the learner), over
the iteration's wall time. A checkpoint counts in the iteration behind it; here, as with the recipe's ten iterations
from one to the next, the median iteration has none. The first iteration of each run warms caches and does not count.
``--quick`` makes a short run of the second kind only.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import table
import whole_runs
from steadyhelm.config.load import load_run_file
from steadyhelm.telemetry import metrics as names

GOAL = 0.03
LARGE_S = 20.0
"""How long the large iteration has to take for its share to count."""


def iterations(folder: Path | str, prompts: int, train_batch: int, count: int) -> list[dict[str, float]]:
    """Metrics of each iteration of a short run, the first left out. Raises RuntimeError where the run fails."""
    settings = {
        "name": f"n{prompts}",
        "model.path": "",
        "model.factory": "tiny_model.py:build",
        "data.eval": "null",
        "schedule.eval_every": 0,
        "schedule.prompts_per_iteration": prompts,
        "learner.train_batch": train_batch,
        "schedule.iterations": count,
        "store.uri": folder,
    }
    whole_runs.steadyhelm("run", "digits.yaml", settings)
    return [
        dict(line.metrics) for line in whole_runs.lines_of(folder, f"n{prompts}-transformers") if line.iteration > 1
    ]


def measure(quick: bool) -> list[table.Row]:
    """The shares of a large iteration and of the digits run's. Raises RuntimeError where the large one is not."""
    run = load_run_file(whole_runs.WORKLOAD / "digits.yaml", [])
    prompts, train_batch = run.schedule.prompts_per_iteration, run.learner.train_batch
    sizes = [(prompts, train_batch, 4)] if quick else [(12 * prompts, 12 * train_batch, 4), (prompts, train_batch, 21)]
    rows: list[table.Row] = []
    for number, (rollouts, batch, count) in enumerate(sizes):
        with tempfile.TemporaryDirectory() as folder:
            found = iterations(Path(folder), rollouts, batch, count)
        share = statistics.median(line[names.OVERHEAD_SHARE] for line in found)
        seconds = statistics.median(line[names.ITERATION_SECONDS] for line in found)
        large = not quick and number == 0
        if large and seconds < LARGE_S:
            raise RuntimeError(f"an iteration of {rollouts} rollouts takes {seconds:.1f} s here: make it larger")
        name = f"overhead of {rollouts} rollouts"
        rows += [
            table.Row(name=name, value=share, unit="ratio", goal=GOAL if large else None, better="lower"),
            table.Row(name=f"iteration of {rollouts} rollouts", value=seconds, unit="s", goal=None, better="lower"),
        ]
    return rows


if __name__ == "__main__":
    table.main(__doc__ or "", measure)
