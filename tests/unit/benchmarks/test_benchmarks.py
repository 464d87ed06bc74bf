"""Benchmarks start, say what they measure, and print what others read; what they measure is no test's business."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"
BENCHMARKS = sorted(file.name for file in FOLDER.glob("*.py") if "__main__" in file.read_text())


def started(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture
def table():
    spec = importlib.util.spec_from_file_location("table", FOLDER / "table.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["table"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        yield module
    finally:
        del sys.modules["table"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_imports_what_there_is_and_explains_itself(name):
    found = started(str(FOLDER / name), "--help")
    assert found.returncode == 0, found.stderr
    assert {"--quick", "--json"} <= set(found.stdout.replace("[", " ").replace("]", " ").split())


def test_the_quick_look_at_the_batch_plane_measures_and_writes_what_it_prints(tmp_path):
    found = started(str(FOLDER / "batch_plane.py"), "--quick", "--json", str(tmp_path / "rows.json"))
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row.keys() == {"name", "value", "unit", "goal", "better"} for row in rows)
    assert all(row["name"] in found.stdout and row["value"] > 0 for row in rows)
    assert any(row["goal"] is not None for row in rows)


def test_a_row_says_whether_it_meets_its_goal_in_the_direction_that_counts(table):
    def row(value: float, goal: float | None, better: str) -> str:
        return str(table.Row(name="x", value=value, unit="s", goal=goal, better=better).verdict)

    assert row(0.7, 0.7, "higher") == row(0.7, 0.7, "lower") == "met"
    assert row(0.69, 0.7, "higher") == row(0.71, 0.7, "lower") == "missed"
    assert row(1.0, None, "lower") == ""
