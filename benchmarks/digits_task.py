"""The main job, three times: what the digits run learns, holds and costs.

For each of three seeds the two runs of ``make train`` (cold start, then reinforcement learning), and 50 iterations more
from the final model, with the same learning rate schedule from half its peak. Accuracies are on all held-out pairs, in
both orders; the table shows the median over the seeds, and each seed's accuracy. ``--quick`` makes a short cold start.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import table
import whole_runs
from steadyhelm.config.load import load_run_file
from steadyhelm.telemetry import metrics as names

SEEDS = (0, 1, 2)
MORE = 50
"""Iterations after the run."""


def seed_figures(seed: int, folder: Path) -> dict[str, float]:
    """Everything of one seed, in the store ``folder``. Raises RuntimeError where a run fails."""
    run = load_run_file(whole_runs.WORKLOAD / "digits.yaml", [])
    common: dict[str, object] = {"seed": seed, "store.uri": folder}
    sft = whole_runs.steadyhelm("sft", "digits_sft.yaml", common)
    start = {**common, "model.path": folder / "digits-sft" / "model"}
    trained = whole_runs.steadyhelm("run", "digits.yaml", start)
    more: dict[str, object] = {
        **common,
        "name": "more",
        "model.path": folder / "digits-transformers" / "model",
        "schedule.iterations": MORE,
        "learner.lr": run.learner.lr / 2,
        "schedule.eval_every": 10,
    }
    whole_runs.steadyhelm("run", "digits.yaml", more)
    found = whole_runs.evaluations(folder, "digits-transformers")
    before, after = found[0], found[run.schedule.iterations]
    held = whole_runs.evaluations(folder, "more-transformers")
    print(f"seed {seed}: {found} then {held}", file=sys.stderr, flush=True)
    return {
        "accuracy after SFT": before[names.EVAL_ACCURACY],
        "accuracy after StableReinforce": after[names.EVAL_ACCURACY],
        "gain over SFT": after[names.EVAL_ACCURACY] - before[names.EVAL_ACCURACY],
        f"accuracy after {MORE} iterations more": held[MORE][names.EVAL_ACCURACY],
        "format rate": after[names.EVAL_FORMAT],
        "consistency rate": after[names.EVAL_CONSISTENCY],
        "wall time of both runs": sft.seconds + trained.seconds,
        "peak memory of all processes": max(sft.peak_bytes, trained.peak_bytes) / 1e9,
    }


def measure(quick: bool) -> list[table.Row]:
    """Medians over the seeds with their goals, and each seed's accuracy."""
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            cost = whole_runs.steadyhelm("sft", "digits_sft.yaml", {"schedule.iterations": 2, "store.uri": folder})
        memory = cost.peak_bytes / 1e9
        return [
            table.Row(name="wall time of a short cold start", value=cost.seconds, unit="s", goal=None, better="lower"),
            table.Row(name="peak memory of all processes", value=memory, unit="GB", goal=5.0, better="lower"),
        ]
    seeds = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            seeds.append(seed_figures(seed, Path(folder)))
    goals = (None, 0.95, 0.15, 0.95, 0.99, 0.98, 360.0, 5.0)
    units = ("ratio",) * 6 + ("s", "GB")
    rows = [
        table.Row(
            name=name,
            value=statistics.median(figures[name] for figures in seeds),
            unit=unit,
            goal=goal,
            better="higher" if unit == "ratio" else "lower",
        )
        for (name, goal), unit in zip(zip(seeds[0], goals, strict=True), units, strict=True)
    ]
    for seed, figures in zip(SEEDS, seeds, strict=True):
        for name in [name for name in figures if name.startswith("accuracy")]:
            title = f"seed {seed}: {name}"
            rows.append(table.Row(name=title, value=figures[name], unit="ratio", goal=None, better="higher"))
    return rows


if __name__ == "__main__":
    table.main("The digits task over three seeds: what it learns, holds and costs.", measure)
