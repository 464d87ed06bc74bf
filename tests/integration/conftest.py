"""A small real run: the tiny Qwen2.5-VL from its factory, digits, and a reward that random completions earn too.

It has all four services, two engines, and two ranks.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from steadyhelm.store import LocalStore
from steadyhelm.store.log import CommitLog, LogView
from steadyhelm.telemetry import metrics as names
from steadyhelm.telemetry.metrics_log import join_segments

ROOT = Path(__file__).resolve().parents[2]
TASK = '''
def vowels(sample):
    """A dense reward: random text earns some of it."""
    text = sample.completion_text
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))
'''
RUN = """
name: small
seed: 3
model: {factory: "tiny_model.py:build", dtype: float32}
data: {train: "digits.py:train_pairs", template: "digits.py:template",
       max_prompt_tokens: 128}
algorithm: {type: stable_reinforce, beta: 0.01}
rollout: {engine: {type: transformers, batch: 4}, replicas: 2, max_new_tokens: 8}
reward: {terms: [{type: format}, {type: choice}, {type: custom, name: vowels, code: "task.py:vowels", weight: 2.0}]}
learner: {replicas: 2, train_batch: 8, micro_batch: 4, lr: 1.0e-3}
schedule: {iterations: 6, prompts_per_iteration: 16, checkpoint_every: 4}
store: {uri: runs}
runtime: {start_deadline_s: 240, step_deadline_s: 120}
"""


@dataclass
class Run:
    """A run in a folder of its own, driven through the command line."""

    folder: Path
    engine: str = "transformers"
    process: subprocess.Popen[str] | None = None

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.folder / "runs")

    @property
    def run_id(self) -> str:
        return f"small-{self.engine}"

    @property
    def log(self) -> LogView:
        return CommitLog.read(self.store, self.run_id)

    def command(self, *more: str, name: str = "run") -> list[str]:
        return [sys.executable, "-m", "steadyhelm.cli", name, "run.yaml", *more]

    def start(self, *more: str, command: str = "run") -> None:
        if self.process is not None:
            self.process.wait(60)
        with (self.folder / "output.txt").open("a") as output:
            self.process = subprocess.Popen(
                self.command(*more, name=command),
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def wait_for(self, holds: Callable[[LogView], bool], timeout_s: float = 300) -> None:
        self.wait_until(lambda: holds(self.log), timeout_s)

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = 300) -> None:
        ends = time.monotonic() + timeout_s
        while not holds():
            assert self.process is not None
            assert self.process.poll() is None, f"the run ended early:\n{self.text()}"
            assert time.monotonic() < ends, f"nothing after {timeout_s} s:\n{self.text()}"
            time.sleep(0.1)

    def finish(self, timeout_s: float = 400) -> int:
        assert self.process is not None
        return self.process.wait(timeout_s)

    def text(self) -> str:
        return (self.folder / "output.txt").read_text()

    def pid_of(self, title: str) -> int:
        """A process of the run whose title begins so (Ray names its workers after their actors)."""
        pid = self.find(title)
        assert pid is not None, f"no process {title}"
        return pid

    def find(self, title: str) -> int | None:
        return next(iter(self.pids_of(title)), None)

    def pids_of(self, title: str) -> list[int]:
        """All processes of the run whose titles begin so."""
        found = []
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                if (process.cmdline() or [""])[0].startswith(title):
                    found.append(process.pid)
        return found

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def metrics(self) -> dict[int, dict[str, float]]:
        """The metrics of each iteration."""
        prefix = f"{self.run_id}/metrics/"
        segments = {key: bytes(self.store.get(key)) for key in self.store.list(prefix)}
        return {line.iteration: dict(line.metrics) for line in join_segments(segments)}

    def exact_metrics(self) -> dict[int, dict[str, float]]:
        """Those of them that do not depend on clocks."""
        return {iteration: names.exact(metrics) for iteration, metrics in self.metrics().items()}

    def left_of(self, processes: list[psutil.Process], timeout_s: float = 120) -> list[str]:
        """The command lines of those that still run after ``timeout_s``."""
        _, alive = psutil.wait_procs(processes, timeout=timeout_s)
        return [" ".join(p.cmdline()) for p in alive if p.status() != psutil.STATUS_ZOMBIE]

    def trained(self) -> list[str]:
        return [pid for batch in self.log.batches() for pid, outcome in batch.outcomes.items() if outcome == "trained"]


@pytest.fixture
def make_run(tmp_path: Path):
    made: list[Run] = []

    def make(name: str = "run", run_file: str = RUN, engine: str = "transformers") -> Run:
        folder = tmp_path / name
        folder.mkdir()
        for file in (ROOT / "workloads" / "r1_reward").glob("*.py"):
            shutil.copy(file, folder)
        (folder / "task.py").write_text(TASK)
        (folder / "run.yaml").write_text(run_file)
        made.append(Run(folder, engine))
        return made[-1]

    yield make
    for run in made:
        if run.process is not None and run.process.poll() is None:
            tree = run.tree()
            for process in tree:
                process.kill()
            psutil.wait_procs(tree, timeout=10)
            run.process.wait()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run without any failure."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for file in (ROOT / "workloads" / "r1_reward").glob("*.py"):
        shutil.copy(file, folder)
    (folder / "task.py").write_text(TASK)
    (folder / "run.yaml").write_text(RUN)
    run = Run(folder)
    run.start()
    assert run.finish() == 0, run.text()
    return run
