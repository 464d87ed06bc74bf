"""What is wrong with machine, model folder or data ends a run with one line that says where and what to do."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from steadyhelm import driver
from steadyhelm.config import RunFile
from steadyhelm.errors import FatalError, ModelError, ResourceError, StoreError
from steadyhelm.runtime import cluster as clusters
from steadyhelm.store import LocalStore
from steadyhelm.store.liveness import held

from tests.integration.conftest import RUN as SMALL
from tests.integration.conftest import Run

RUN = {
    "name": "bad",
    "data": {"train": "task.py:pairs"},
    "learner": {"train_batch": 4},
    "schedule": {"iterations": 1, "prompts_per_iteration": 8},
}
SECRET = "wJalrXUtnFEMI-never-shown"


def run_file(tmp_path: Path, model: Path, **parts: object) -> RunFile:
    return RunFile.model_validate(
        RUN | {"model": {"path": str(model)}, "store": {"uri": str(tmp_path / "runs")}} | parts
    )


def start(run: RunFile, tmp_path: Path, **options: object) -> int:
    return driver.run(run, tmp_path, driver.RunOptions(**options), lambda event: None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a folder on a file system of the size asked for."""
    made: list[Path] = []

    def make(size: str) -> Path:
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("a small file system needs root and mount")
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this machine lets nobody mount")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["config.json"], r"has no config\.json: save the model with save_pretrained"),
        (["model.safetensors"], r"has no weights \(\*\.safetensors\): save the whole model there"),
        (["tokenizer.json"], r"has no tokenizer \(tokenizer\.json\): save it with the model"),
        (["chat_template.jinja"], r"has no chat template: add chat_template\.jinja"),
    ],
)
def test_a_model_folder_that_lacks_a_part_ends_the_run_before_anything_starts(tiny_model, tmp_path, missing, message):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for name in missing:
        (model / name).unlink()
    with pytest.raises(ModelError, match=message) as raised:
        start(run_file(tmp_path, model), tmp_path)
    assert str(raised.value).startswith(f"model.path '{model}' cannot be used: ")
    assert not (tmp_path / "runs").exists()


def test_a_model_folder_that_is_not_there_is_named(tmp_path):
    message = r"model folder .*/nowhere does not exist: set model\.path .* finish that run first"
    with pytest.raises(ModelError, match=message):
        start(run_file(tmp_path, tmp_path / "nowhere"), tmp_path)


def test_a_taken_metrics_port_ends_the_run_before_it_exists(tiny_model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = run_file(tmp_path, tiny_model, runtime={"metrics_port": port})
        with pytest.raises(
            ResourceError, match=rf"runtime\.metrics_port {port} cannot be opened .*in use.*another port"
        ):
            start(run, tmp_path)
    assert list(LocalStore(tmp_path / "runs").list("")) == []


def test_a_store_that_cannot_be_written_is_named(tiny_model, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match=r"runs/\.locks/bad-transformers\.lock: .* not a folder: choose another"):
        start(run_file(tmp_path, tiny_model), tmp_path)


def test_a_store_on_a_full_disk_is_refused_at_the_start(tiny_model, tmp_path, small_disk):
    disk = small_disk("64k")
    (disk / "ballast").write_bytes(bytes(64 << 10))
    with pytest.raises(StoreError, match="the disk is full: free some space"):
        start(run_file(tmp_path, tiny_model, store={"uri": str(disk)}), tmp_path)


def test_a_run_that_another_process_drives_is_refused_with_its_pid(tiny_model, tmp_path):
    run = run_file(tmp_path, tiny_model)
    with (
        held(LocalStore(tmp_path / "runs"), "bad-transformers"),
        pytest.raises(FatalError, match=rf"another driver is running run .*pid {os.getpid()} on .*--take-over"),
    ):
        start(run, tmp_path)
    with held(LocalStore(tmp_path / "runs"), "bad-transformers"), held(LocalStore(tmp_path / "runs"), "other"):
        pass


def test_too_little_shared_memory_is_told_with_the_remedy(small_disk):
    with pytest.raises(ResourceError, match=r"has 1 MiB free but Ray's object store takes 100 MiB: .* --shm-size"):
        clusters._require_shared_memory(small_disk("1m"))


def test_a_ray_address_where_nothing_listens_is_told_at_once(tmp_path):
    with socket.socket() as bound:  # bound but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with (
            pytest.raises(ResourceError, match=rf"No Ray cluster answers at runtime\.address '{address}' .*refused"),
            clusters.cluster(run_file(tmp_path, tmp_path), address),
        ):
            raise AssertionError("there is no cluster")


def test_an_error_that_quotes_a_secret_does_not_show_it(tmp_path):
    (tmp_path / "task.py").write_text(
        "import os\ndef pairs():\n    raise ValueError('denied for key ' + os.environ['AWS_SECRET_ACCESS_KEY'])\n"
    )
    (tmp_path / "run.yaml").write_text(
        "name: bad\nmodel: {path: m}\ndata: {train: 'task.py:pairs'}\nlearner: {train_batch: 1}\n"
        "schedule: {iterations: 1}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "steadyhelm.cli", "data", "run.yaml", "--debug"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=os.environ | {"AWS_SECRET_ACCESS_KEY": SECRET},
    )
    assert done.returncode == 2
    assert "task.py line 3" in done.stderr
    assert "denied for key ***" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


@pytest.mark.runs
@pytest.mark.timeout(900)
def test_two_runs_side_by_side_of_which_one_fills_its_disk(make_run, small_disk, monkeypatch):
    """The full one ends with one line and without processes, the other one is not disturbed, and the first goes on."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    full: Run = make_run("full")
    disk = small_disk("37m")  # images, start, an anchor of 5 MB and four deltas, but no checkpoint of 15 MB
    (full.folder / "runs").symlink_to(disk)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    beside: Run = make_run("beside", f"{SMALL.rstrip()[:-1]}, metrics_port: {port}}}\n")
    full.start()
    beside.start("--set", "schedule.iterations=12")
    full.wait_for(lambda log: log.attempt == 1)
    again = subprocess.run(full.command(), cwd=full.folder, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert f"pid {full.process.pid} on" in again.stderr
    tree, scraped, ends = [], "", time.monotonic() + 600
    while not (tree and 'run="small-transformers"' in scraped):
        assert time.monotonic() < ends, full.text() + beside.text()
        if not tree and full.log.latest_weights() is not None:
            tree = full.tree()
        if 'run="small-transformers"' not in scraped and beside.log.last_iteration > 0:
            scraped = scrape(port)
        time.sleep(0.05)
    assert full.finish() == 1, full.text()
    last = full.text().splitlines()[-1]
    assert last.startswith("steadyhelm: cannot write 'small-transformers/checkpoints/")
    assert "the disk is full: free some space" in last
    assert len(tree) > 5
    assert full.left_of(tree) == []
    assert beside.finish() == 0, beside.text()
    subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    full.start()
    assert full.finish() == 0, full.text()
    assert len(set(full.trained())) == len(full.trained()) == 96
    assert full.trained() == beside.trained()[:96]
    assert full.exact_metrics() == {i: values for i, values in beside.exact_metrics().items() if i <= 6}
    for run in (full, beside):
        files = [file for file in [*run.folder.rglob("*"), *disk.rglob("*")] if file.is_file()]
        assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
