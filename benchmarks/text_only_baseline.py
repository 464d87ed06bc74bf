"""How much of the digits task can be answered from its text? The accuracy of judges that do not see.

Two judges on all held-out pairs, in both orders: one that counts which label came more often with each text of the
training pairs, and the task's own model after the same cold start and the same reinforcement learning with every image
black. ``--quick`` counts only.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import table
import whole_runs
from steadyhelm.telemetry import metrics as names

GOAL = 0.03


def counted() -> tuple[float, int]:
    """Accuracy of the best guess from the text alone, ties to response 1, and the number of held-out pairs."""
    sys.path.insert(0, str(whole_runs.WORKLOAD))
    digits: Any = importlib.import_module("digits")
    seen: Counter[tuple[str, tuple[str, str], int]] = Counter()
    for pair in digits.train_pairs():
        seen[pair.question, pair.responses, pair.label] += 1
        seen[pair.question, pair.responses[::-1], 3 - pair.label] += 1
    right, pairs = 0, digits.eval_pairs()
    for pair in pairs:
        for responses, label in ((pair.responses, pair.label), (pair.responses[::-1], 3 - pair.label)):
            guess = 1 if seen[pair.question, responses, 1] >= seen[pair.question, responses, 2] else 2
            right += guess == label
    return right / (2 * len(pairs)), len(pairs)


def trained(folder: Path) -> dict[str, float]:
    """Metrics of the last evaluation of ``make train``'s two runs with black images, in the store ``folder``.

    Raises RuntimeError where a run fails.
    """
    whole_runs.steadyhelm("sft", "digits_sft.yaml", {"data.train": "digits.py:blank_sft_pairs", "store.uri": folder})
    blank = {"data.train": "digits.py:blank_train_pairs", "data.eval": "digits.py:blank_eval_pairs"}
    start = {**blank, "model.path": folder / "digits-sft" / "model", "store.uri": folder}
    whole_runs.steadyhelm("run", "digits.yaml", start)
    found = whole_runs.evaluations(folder, "digits-transformers")
    return found[max(found)]


def measure(quick: bool) -> list[table.Row]:
    """Accuracies and their distance from chance; every held-out pair counts, in both orders."""
    accuracy, pairs = counted()
    found = {"counted from the text": (accuracy, float(pairs))}
    if not quick:
        with tempfile.TemporaryDirectory() as folder:
            last = trained(Path(folder))
        found["trained on black images"] = (last[names.EVAL_ACCURACY], last[names.EVAL_PAIRS])
    rows = []
    for name, (accuracy, number) in found.items():
        off = abs(accuracy - 0.5)
        rows += [
            table.Row(name=f"{name}: accuracy", value=accuracy, unit="ratio", goal=None, better="higher"),
            table.Row(name=f"{name}: distance from chance", value=off, unit="ratio", goal=GOAL, better="lower"),
            table.Row(name=f"{name}: held-out pairs", value=number, unit="pairs", goal=2000, better="higher"),
        ]
    return rows


if __name__ == "__main__":
    table.main("Judges that do not see, on the digits task: accuracy and distance from chance.", measure)
