"""The folders of Ray sessions, over real processes that are really killed."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from steadyhelm.runtime.folder import session_folder

HOLD = """
import sys
from steadyhelm.runtime.folder import session_folder
with session_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_a_folder_is_gone_with_its_context_and_that_of_a_killed_driver_with_the_next_one(driver):
    left = Path(driver.stdout.readline().strip())
    (left / "session").mkdir()
    with session_folder() as mine:
        assert left.is_dir()  # its driver lives
        assert Path(mine).is_dir()
    assert not Path(mine).exists()
    driver.send_signal(signal.SIGKILL)
    driver.wait(30)
    assert left.is_dir()
    with session_folder() as mine:
        assert not left.exists()
        assert Path(mine).is_dir()


def test_what_is_no_session_of_ours_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "steadyhelm-ray-other").mkdir()
    (tmp_path / "steadyhelm-ray-link").mkdir()
    (tmp_path / "target").touch()
    (tmp_path / "steadyhelm-ray-link" / "driver.lock").symlink_to(tmp_path / "target")
    with session_folder():
        assert (tmp_path / "steadyhelm-ray-other").is_dir()
        assert (tmp_path / "steadyhelm-ray-link").is_dir()
