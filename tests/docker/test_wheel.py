"""What users install: the wheel, as it is built of a checkout."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.docker.dockerfiles import ROOT

pytestmark = [pytest.mark.images, pytest.mark.timeout(300)]


def test_the_wheel_has_the_system_and_the_operator_and_nothing_that_stands_in_for_kuberay(tmp_path: Path):
    command = [ROOT / ".ci" / "uv", "build", "--wheel", "--quiet", "--out-dir", tmp_path, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"steadyhelm/loop.py", "steadyhelm_operator/controller.py"} <= set(names)
    assert not [name for name in names if name.startswith("steadyhelm_operator/testing") or "kuberay" in name.lower()]
