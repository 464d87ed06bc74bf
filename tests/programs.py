"""Programs of other people that tests take: ``.ci/NAME`` finds one on the machine or has it built."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def fetched(script: str) -> Path:
    """What ``.ci/SCRIPT`` prints: a program, or a folder of some. Skips the test where the machine cannot have it."""
    done = subprocess.run([ROOT / ".ci" / script], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-4000:]
    return Path(done.stdout.strip())
