"""How much of the digits task can be answered from its text? The accuracy of judges that do not see.

Two judges on all held-out pairs, in both orders: one that counts which label came more often with each text of the
training pairs, and the task's own model after the same cold start and the same reinforcement learning with every image
black. ``--quick`` counts only.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import table
from steadyhelm.store import LocalStore
from steadyhelm.telemetry import metrics as names
from steadyhelm.telemetry.metrics_log import join_segments

WORKLOAD = Path(__file__).resolve().parents[1] / "workloads" / "r1_reward"
GOAL = 0.03


def counted() -> tuple[float, int]:
    """Accuracy of the best guess from the text alone, ties to response 1, and the number of held-out pairs."""
    sys.path.insert(0, str(WORKLOAD))
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
    _steadyhelm("sft", "digits_sft.yaml", {"data.train": "digits.py:blank_sft_pairs", "store.uri": folder})
    blank = {"data.train": "digits.py:blank_train_pairs", "data.eval": "digits.py:blank_eval_pairs"}
    _steadyhelm("run", "digits.yaml", {**blank, "model.path": folder / "digits-sft" / "model", "store.uri": folder})
    store = LocalStore(folder)
    lines = join_segments({key: bytes(store.get(key)) for key in store.list("digits-transformers/metrics/")})
    return dict(next(line.metrics for line in reversed(lines) if names.EVAL_ACCURACY in line.metrics))


def _steadyhelm(command: str, run_file: str, settings: dict[str, object]) -> None:
    words = [sys.executable, "-m", "steadyhelm.cli", command, str(WORKLOAD / run_file), "--quiet"]
    words += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"steadyhelm {command} failed:\n{done.stdout}{done.stderr}")


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
