"""What a run costs the API server does not grow with their number: counts of the benchmark, small, and no times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT, fetched

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_run_costs_few_requests_and_no_list_beside_few_others_and_beside_more(tmp_path: Path):
    fetched("kwok")
    if "STEADYHELM_TEST_PROGRAMS" not in os.environ:
        fetched("kubernetes")
    rows = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "benchmarks" / "operator_scale.py", "--quick", "--json", rows]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["name"]: row["value"] for row in json.loads(rows.read_text())}
    for number in (4, 12):  # 10, and some more where its pods take long
        assert found[f"{number} runs: requests each until it runs"] <= 12
        assert found[f"{number} runs: lists of whole kinds, from the start"] == 3
