"""A run on a Ray cluster that stands already, over its Jobs API: sent, found again, left, stopped, gone on with."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from steadyhelm.store import LocalStore
from steadyhelm.store.log import CommitLog

from tests.integration.conftest import ROOT

TOKEN = "canary-token-0123456789abcdef0123456789abcdef"
TASK = '''
import time
from pathlib import Path


def vowels(sample):
    """A dense reward, given once nobody holds it back."""
    while Path("{hold}").exists():
        time.sleep(0.05)
    return sum(letter in "aeiou" for letter in sample.completion_text) / max(1, len(sample.completion_text))
'''
RUN = """
name: sent
seed: 3
model: {factory: "tiny_model.py:build", dtype: float32}
data: {train: "digits.py:train_pairs", template: "digits.py:template", max_prompt_tokens: 128}
rollout: {engine: {type: transformers, batch: 8}, max_new_tokens: 4}
reward: {terms: [{type: format}, {type: custom, name: vowels, code: "task.py:vowels"}], sample_deadline_s: 120}
learner: {train_batch: 8, micro_batch: 8, lr: 1.0e-3}
schedule: {iterations: 6, prompts_per_iteration: 8, checkpoint_every: 100}
runtime: {start_deadline_s: 280, step_deadline_s: 120}
"""


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


@dataclass
class Head:
    """A Ray head with pools, a token, and one run's folder."""

    folder: Path
    ray: str
    api: str
    status: str
    environment: dict[str, str]

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.folder.parent / "runs")

    @property
    def hold(self) -> Path:
        return self.folder.parent / "hold"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "steadyhelm.cli", *arguments, "--address", self.api]

    def submit(self, *more: str) -> list[str]:
        return self.command("submit", str(self.folder / "run.yaml"), "--set", f"store.uri={self.store.root}", *more)

    def done(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=400)

    def ask(self, token: str) -> dict[str, object]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"{self.status}/status", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str], output: Path, timeout_s: float = 300) -> None:
    ends = time.monotonic() + timeout_s
    while not holds():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < ends, f"nothing after {timeout_s} s:\n{output.read_text()}"
        time.sleep(0.1)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    folder = tmp_path / "work"
    folder.mkdir()
    for file in (ROOT / "workloads" / "r1_reward").glob("*.py"):
        shutil.copy(file, folder)
    (folder / "task.py").write_text(TASK.replace("{hold}", str(tmp_path / "hold")))
    (folder / "run.yaml").write_text(RUN)
    gcs, api, agent, agent_grpc, metrics, client, status = free_ports(7)
    scratch = tempfile.mkdtemp(prefix="sh-")  # Ray's sockets are in it, whose paths must be short
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "100",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "STEADYHELM_STATUS_ADDRESS": f"127.0.0.1:{status}",
    }
    pools = {"pool_head": 16, "pool_rollout": 1, "pool_reward": 1, "pool_learner": 1}  # as the cluster chart has them
    command = ["ray", "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={scratch}", "--num-cpus=2"]
    command += [f"--port={gcs}", f"--dashboard-port={api}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}"]
    command += [f"--ray-client-server-port={client}", f"--object-store-memory={100 * 2**20}"]
    command += [f"--resources={json.dumps(pools)}"]
    command[0] = str(Path(sys.executable).with_name("ray"))
    process = started(command, environment, tmp_path / "head.txt")
    try:
        yield Head(folder, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{api}", f"http://127.0.0.1:{status}", environment)
    finally:
        end(process)
        shutil.rmtree(scratch, ignore_errors=True)


def started(command: list[str], environment: dict[str, str], words: Path) -> subprocess.Popen[str]:
    """Ray, once it says that it runs; on a busy machine it may give up after its own 30 s, hence three tries."""
    for _ in range(3):
        with words.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None:
            if "will now block" in words.read_text():
                return process
            time.sleep(0.2)
    raise AssertionError(words.read_text())


def end(process: subprocess.Popen[str]) -> None:
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(tree, timeout=40)
    for one in left:
        one.kill()
    psutil.wait_procs(left, timeout=10)
    process.wait(10)


@pytest.mark.runs
@pytest.mark.timeout(1200)
def test_a_run_is_sent_found_left_stopped_and_gone_on_with(head: Head):
    log = lambda: CommitLog.read(head.store, "sent-transformers")  # noqa: E731
    words = head.folder.parent / "first.txt"
    with words.open("w") as output:
        command = ["env", "--default-signal=INT", *head.submit()]  # else a test run in the background ignores it
        first = subprocess.Popen(command, env=head.environment, stdout=output, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: log().last_iteration >= 1, first, words)
    head.hold.touch()  # the reward of some later batch waits: the run stands still
    again = head.done(head.submit("--detach"))
    assert "runs already as job sent-transformers.1" in again.stderr
    changed = head.done(head.submit("--detach", "--set", "learner.lr=1.0e-4"))
    assert (changed.returncode, "was sent with another run file" in changed.stderr) == (2, True)

    status = head.ask(TOKEN)
    assert (status["phase"], status["submission_id"]) == ("running", "sent-transformers.1")
    assert status["rollouts"] == {"ready": 1, "desired": 1}
    for token in ("", "wrong"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            head.ask(token)
        assert refused.value.code == 401
        refused.value.close()
    lines = head.done(head.command("status", "sent-transformers", "--status-address", head.status)).stdout
    assert "running, iteration" in lines

    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130, words.read_text()
    assert "goes on without you" in words.read_text()
    assert "run sent-transformers: 6 iterations" in words.read_text()
    assert head.done(head.command("stop", "sent-transformers", "--wait", "0")).returncode == 0
    head.hold.unlink()
    stopped = head.done(head.command("stop", "sent-transformers"))
    assert "stopped" in stopped.stdout, stopped.stderr
    reached = log().last_iteration
    assert 1 <= reached < 6
    assert log().checkpoint().version.iteration == reached
    kept = json.loads(bytes(head.store.get("sent-transformers/status.json")))
    assert (kept["phase"], kept["iteration"]) == ("stopped", reached)

    resumed = head.done(head.submit())
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "is sent as job sent-transformers.2" in resumed.stderr
    assert f"from iteration {reached + 1}" in resumed.stdout
    assert (log().finished() is not None, log().attempt) == (True, 2)
    broken = head.done(head.submit("--id", "broken", "--set", "model.factory=null", "--set", "model.path=/nowhere"))
    assert broken.returncode == 2, broken.stdout + broken.stderr
    told = json.loads(head.done(head.command("status", "broken", "--json")).stdout)
    assert (told["job"]["driver_exit_code"], told["status"]["reason"]) == (2, "BadModel")
    everything = head.done(head.command("logs", "sent-transformers", "--log-format", "json")).stdout
    assert TOKEN not in everything
    assert TOKEN not in head.done(head.command("list", "--json")).stdout


@pytest.mark.runs
@pytest.mark.timeout(600)
def test_a_run_leaves_a_cluster_alone_that_somebody_else_runs_and_that_its_environment_names(head: Head):
    command = [sys.executable, "-m", "steadyhelm.cli", "run", str(head.folder / "run.yaml"), "--id", "alone"]
    command += ["--set", f"store.uri={head.store.root}", "--set", "schedule.iterations=1"]
    environment = {**head.environment, "RAY_ADDRESS": head.ray}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert CommitLog.read(head.store, "alone").finished() is not None
    request = urllib.request.Request(f"{head.api}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert json.loads(answer.read()) == []  # drivers that joined it would be here
