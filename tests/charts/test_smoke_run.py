"""The run behind ``helm test``, on this machine: what a cluster adds to it is Ray's addresses and a store in S3."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from steadyhelm.store import LocalStore
from steadyhelm.store.log import CommitLog

from tests.charts.objects import CLUSTER


@pytest.mark.runs
@pytest.mark.timeout(900)
def test_the_smoke_run_trains_its_iteration_and_ends(tmp_path: Path):
    for file in (CLUSTER / "files" / "smoke").glob("smoke.*"):
        shutil.copy(file, tmp_path)
    run_file = tmp_path / "smoke.yaml"
    run_file.write_text(run_file.read_text().replace("STORE", "runs"))
    command = [sys.executable, "-m", "steadyhelm.cli", "run", "smoke.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stdout + done.stderr
    log = CommitLog.read(LocalStore(tmp_path / "runs"), "smoke-transformers")
    assert (log.last_iteration, log.finished() is not None) == (1, True)
