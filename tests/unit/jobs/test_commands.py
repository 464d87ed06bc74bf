"""``submit``, ``status``, ``logs``, ``stop`` and ``list`` against a cluster on this machine."""

import base64
import io
import json
import os
import socket
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import psutil
import pytest
from click.testing import Result
from steadyhelm.cli import app, exit_code
from steadyhelm.errors import ConfigError, RequestRefusedError, TokenRefusedError, UnreachableError
from steadyhelm.jobs import Jobs
from steadyhelm.jobs.folder import folder_files
from steadyhelm.jobs.forward import PortForward, secret_token
from steadyhelm.telemetry.status import Rollouts, RunStatus, Version, serve_status
from typer.testing import CliRunner

from tests.unit.jobs.jobs_api import TOKEN, FakeCluster, serving

RUN = """
name: digits
model: {path: /models/m}
data: {train: "task.py:pairs"}
learner: {train_batch: 4}
schedule: {iterations: 3, prompts_per_iteration: 4}
store: {uri: "s3://runs"}
"""
LOG = """Running entrypoint for job digits-transformers.1: exec steadyhelm run
{"time": "t", "level": "info", "source": "run", "message": "RunStarted", "pid": 1, "event": "RunStarted", \
"run_id": "digits-transformers", "iterations": 3, "first_iteration": 1, "place": "s3://runs/digits-transformers"}
{"time": "t", "level": "info", "source": "run", "message": "IterationDone", "pid": 1, "event": "IterationDone", \
"iteration": 1, "metrics": {"reward/mean": 1.5}, "replayed": false}
{"time": "t", "level": "warning", "source": "run", "message": "rollout 0 is lost", "pid": 1, "event": "Notice"}
{"time": "t", "level": "warning", "source": "client", "message": "tries again", "pid": 1}
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with serving(FakeCluster(token=TOKEN)) as cluster:
        yield cluster


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    (made / "parts" / "__pycache__").mkdir(parents=True)
    (made / "runs" / "digits").mkdir(parents=True)
    (made / ".git").mkdir()
    for name in ("parts/__pycache__/task.pyc", ".git/HEAD", "old.pyc", ".secret", "parts/more.py", "runs/digits/x"):
        (made / name).write_text("x = 1\n")
    (made / "task.py").write_text("def pairs(): ...\n")
    (made / "run.yaml").write_text(RUN)
    return made


def steadyhelm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ending(cluster: FakeCluster, status: str, code: int | None) -> Callable[[str], None]:
    def run(submission_id: str) -> None:
        cluster.logs[submission_id] = LOG + RunStatus(run="digits-transformers", phase="finished").line() + "\nbye"
        cluster.end(submission_id, status, code)

    return run


class TestSubmitting:
    """One job for each attempt, with the code and without what is made."""

    def test_a_run_is_sent_with_its_code_and_shown_to_its_end(self, cluster: FakeCluster, folder: Path):
        cluster.run = ending(cluster, "SUCCEEDED", 0)
        sets = ("--set", "learner.lr=1e-5")
        done = steadyhelm("submit", folder / "run.yaml", "--address", cluster.address, *sets)
        assert (done.exit_code, done.exception) == (0, None)
        job = cluster.jobs["digits-transformers.1"]
        assert job["entrypoint"] == (
            "exec steadyhelm run run.yaml --id digits-transformers --address auto --log-format json "
            "--set=learner.lr=1e-5"
        )
        assert job["metadata"].items() >= {"run": "digits-transformers", "attempt": "1", "file": "run.yaml"}.items()
        (package,) = cluster.packages.values()
        with zipfile.ZipFile(io.BytesIO(package)) as packed:
            assert sorted(packed.namelist()) == ["parts/more.py", "run.yaml", "task.py"]
        assert done.stdout.splitlines() == [
            "Running entrypoint for job digits-transformers.1: exec steadyhelm run",
            "run digits-transformers: 3 iterations, in s3://runs/digits-transformers",
            "iteration 1/3  reward 1.500  0:00 left" if "left" in done.stdout else "iteration 1/3  reward 1.500",
            "rollout 0 is lost",
            "client: tries again",
            "bye",
        ]
        assert TOKEN not in json.dumps(cluster.jobs)
        assert TOKEN not in done.output

    @pytest.mark.parametrize(
        ("status", "code", "expected"),
        [("FAILED", 2, 2), ("FAILED", 1, 1), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 143)],
    )
    def test_the_exit_code_is_the_run_s(
        self, cluster: FakeCluster, folder: Path, status: str, code: int | None, expected: int
    ):
        cluster.run = ending(cluster, status, code)
        assert steadyhelm("submit", folder / "run.yaml", "--address", cluster.address).exit_code == expected

    def test_a_repeat_finds_the_run_and_the_next_attempt_comes_after_its_end(self, cluster: FakeCluster, folder: Path):
        command = ("submit", folder / "run.yaml", "--address", cluster.address, "--detach")
        first, again = steadyhelm(*command), steadyhelm(*command)
        assert "is sent as job digits-transformers.1" in first.stderr
        assert "runs already as job digits-transformers.1" in again.stderr
        assert f"steadyhelm logs --follow digits-transformers --address {cluster.address}" in again.stderr
        cluster.end("digits-transformers.1", "FAILED", 1)
        assert "is sent as job digits-transformers.2" in steadyhelm(*command).stderr
        other = steadyhelm(*command, "--id", "other")
        assert "is sent as job other.1" in other.stderr
        assert cluster.asked.count("POST /api/jobs/") == 3

    def test_a_head_that_takes_no_jobs_yet_is_asked_again(
        self, cluster: FakeCluster, folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("steadyhelm.jobs.client.FIRST_PAUSE_S", 0.01)
        busy = [True] * 3
        cluster.broken = lambda h: h.command == "POST" and bool(busy) and busy.pop() and h.answer(500, "later") is None
        done = steadyhelm("submit", folder / "run.yaml", "--address", cluster.address, "--detach")
        assert done.exit_code == 0
        assert done.stderr.count("HTTP 500 to POST /api/jobs/: later Tries again for 120 s.") == 1
        assert "is sent as job digits-transformers.1" in done.stderr

    def test_a_run_that_another_run_file_drives_is_left_alone(self, cluster: FakeCluster, folder: Path):
        command = ("submit", folder / "run.yaml", "--address", cluster.address, "--detach")
        steadyhelm(*command)
        for change in (("--set", "learner.lr=1e-5"), ("--take-over",)):
            refused = steadyhelm(*command, *change)
            assert isinstance(refused.exception, ConfigError)
            assert "is being driven by job 'digits-transformers.1', which was sent with another" in str(
                refused.exception
            )
        (folder / "task.py").write_text("def pairs(): return 2\n")
        assert isinstance(steadyhelm(*command).exception, ConfigError)
        assert len(cluster.jobs) == 1

    def test_a_run_that_a_training_run_drives_gets_no_second_driver(self, cluster: FakeCluster, folder: Path):
        about = {"run": "digits-transformers", "trainingrun": "rl/digits"}
        cluster.add("digits-transformers.0a1b2c3d.1", metadata=about)
        command = ("submit", folder / "run.yaml", "--address", cluster.address, "--detach")
        refused = steadyhelm(*command)
        assert "is being driven by TrainingRun rl/digits" in str(refused.exception)
        assert (exit_code(refused.exception), cluster.asked.count("POST /api/jobs/")) == (2, 0)
        cluster.end("digits-transformers.0a1b2c3d.1", "STOPPED")
        done = steadyhelm(*command)
        assert "was TrainingRun rl/digits's: suspend or delete that" in done.stderr
        assert "is sent as job digits-transformers.1" in done.stderr

    def test_ctrl_c_leaves_the_run_and_says_how_to_come_back(
        self, cluster: FakeCluster, folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        def interrupted(*_: object) -> Iterator[str]:
            yield "begin\n"
            raise KeyboardInterrupt

        monkeypatch.setattr(Jobs, "follow", interrupted)
        done = steadyhelm("submit", folder / "run.yaml", "--address", cluster.address)
        assert done.exit_code == 130
        assert "run digits-transformers goes on without you" in done.stderr
        assert f"to stop: steadyhelm stop digits-transformers --address {cluster.address}" in done.stderr
        assert "POST /api/jobs/digits-transformers.1/stop" not in cluster.asked

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ("store.uri=runs", "a folder that would go away with the job"),
            ("data.train=../task.py:pairs", "but only"),
            ("learner.lrr=1", "did you mean 'lr'"),
        ],
    )
    def test_what_no_cluster_could_run_is_not_sent(self, cluster: FakeCluster, folder: Path, change: str, words: str):
        (folder.parent / "task.py").write_text("def pairs(): ...\n")
        refused = steadyhelm("submit", folder / "run.yaml", "--address", cluster.address, "--set", change)
        assert words in str(refused.exception)
        assert exit_code(refused.exception) == 2
        assert not cluster.asked

    @pytest.mark.parametrize("name", ["../x", "a b", "a/b", "Ä", "images", "x" * 300])
    def test_an_id_that_no_run_can_have_is_not_sent(self, cluster: FakeCluster, folder: Path, name: str):
        refused = steadyhelm("submit", folder / "run.yaml", "--address", cluster.address, "--detach", "--id", name)
        assert "a run cannot be called" in str(refused.exception)
        assert exit_code(refused.exception) == 2
        assert not cluster.asked

    def test_a_folder_of_data_is_not_sent(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("steadyhelm.jobs.folder.LARGEST_BYTES", 1 << 20)
        (folder / "data.bin").write_bytes(bytes(1 << 20))
        with pytest.raises(ConfigError, match=r"more than the 1 MiB .* data\.bin \(1\.0 MiB\)"):
            folder_files(folder)
        (folder / "data.bin").unlink()
        assert sorted(folder_files(folder)) == ["parts/more.py", "run.yaml", "runs/digits/x", "task.py"]

    def test_no_cluster_no_token_and_a_wrong_one_are_told_apart(
        self, cluster: FakeCluster, folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        command = ("submit", folder / "run.yaml")
        assert "no cluster is named" in str(steadyhelm(*command).exception)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        assert isinstance(steadyhelm(*command).exception, TokenRefusedError)
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        assert "asks for a token" in str(steadyhelm(*command).exception)
        (folder.parent / "token").write_text(TOKEN + "\n")
        assert steadyhelm(*command, "--detach", "--token-file", folder.parent / "token").exit_code == 0
        assert "cannot be read" in str(steadyhelm(*command, "--token-file", folder / "none").exception)
        (folder.parent / "token").write_text(TOKEN + "\nsecond\n")
        refused = steadyhelm(*command, "--token-file", folder.parent / "token")
        assert isinstance(refused.exception, TokenRefusedError)
        assert TOKEN not in refused.output + str(refused.exception)


class TestLooking:
    """At runs that were sent."""

    def test_a_driver_that_lives_is_asked_and_one_that_ended_left_its_status(self, cluster: FakeCluster):
        cluster.add("digits.1", "FAILED", metadata={"run": "digits"}, driver_exit_code=1)
        cluster.add("digits.2", metadata={"run": "digits"})
        told = RunStatus(
            run="digits",
            submission_id="digits.2",
            phase="running",
            iteration=12,
            iterations=60,
            attempt=2,
            version=Version(iteration=12, attempt=2),
            reward=1.5,
            rollouts=Rollouts(ready=1, desired=2),
            waiting=("rollout 1: pool rollout has no node",),
            reason="NoCapacity",
            message="rollout 1: pool rollout has no node",
            store="s3://runs",
        )
        port, end = serve_status(lambda: told, "127.0.0.1", 0, TOKEN)
        where = ("--address", cluster.address, "--status-address", f"http://127.0.0.1:{port}")
        try:
            done = steadyhelm("status", "digits", *where)
            as_json = json.loads(steadyhelm("status", "digits", "--json", *where).stdout)
        finally:
            end()
        assert done.stdout.splitlines()[1:] == [
            "  running, iteration 12 of 60 · attempt 2 · version 12.2 · reward 1.500 · 1 of 2 rollouts",
            "  store s3://runs",
            "  waits: rollout 1: pool rollout has no node",
            "  NoCapacity: rollout 1: pool rollout has no node",
        ]
        assert as_json["job"]["submission_id"] == as_json["status"]["submission_id"] == "digits.2"
        assert "No driver serves its status" in steadyhelm("status", "digits", *where).stdout
        cluster.logs["digits.1"] = told.model_copy(update={"phase": "failed"}).line()
        assert "failed, iteration 12 of 60" in steadyhelm("status", "digits.1", *where).stdout

    def test_a_status_address_that_is_none_is_said(self, cluster: FakeCluster):
        cluster.add("digits.1", metadata={"run": "digits"})
        for address in ("http://[::1", "http://head:99999"):
            done = steadyhelm("status", "digits", "--address", cluster.address, "--status-address", address)
            assert f"its driver says nothing: {address!r} is no address of a driver's status" in done.stdout

    def test_the_status_of_another_run_on_the_same_head_is_not_taken_for_its_own(self, cluster: FakeCluster):
        cluster.add("digits.1", metadata={"run": "digits"})
        port, end = serve_status(lambda: RunStatus(run="other", submission_id="other.1"), "127.0.0.1", 0, TOKEN)
        try:
            where = ("--address", cluster.address, "--status-address", f"http://127.0.0.1:{port}")
            assert "is other.1's" in steadyhelm("status", "digits", *where).stdout
        finally:
            end()

    def test_a_training_run_s_run_is_found_by_its_name(self, cluster: FakeCluster):
        about = {"run": "digits", "trainingrun": "rl/digits"}
        cluster.add("digits.0a1b2c3d.10", "FAILED", metadata=about, driver_exit_code=1)
        cluster.add("digits.0a1b2c3d.11", metadata=about)
        cluster.logs["digits.0a1b2c3d.11"] = "its words\n"
        where = ("--address", cluster.address)
        (line,) = steadyhelm("list", *where).stdout.splitlines()
        assert line.startswith("digits  running  job digits.0a1b2c3d.11 of TrainingRun rl/digits, since")
        assert line in steadyhelm("status", "digits", *where, "--status-address", "http://127.0.0.1:1").stdout
        assert steadyhelm("logs", "digits", *where).stdout == "its words\n"
        assert "digits  stopped  job digits.0a1b2c3d.11" in steadyhelm("stop", "digits", *where).stdout

    def test_a_job_that_has_not_ended_is_the_run_s_before_a_later_one_that_has(self, cluster: FakeCluster):
        cluster.add("digits.0a1b2c3d.3", metadata={"run": "digits", "trainingrun": "rl/digits"})
        cluster.add("digits.1", "FAILED", metadata={"run": "digits"}, driver_exit_code=1)
        assert "job digits.0a1b2c3d.3" in steadyhelm("list", "--address", cluster.address).stdout
        cluster.end("digits.0a1b2c3d.3", "STOPPED")
        assert "job digits.1," in steadyhelm("list", "--address", cluster.address).stdout

    def test_runs_are_listed_with_their_newest_jobs(self, cluster: FakeCluster):
        cluster.add("b.1", "SUCCEEDED", metadata={"run": "b"}, driver_exit_code=0)
        cluster.add("a.9", "FAILED", metadata={"run": "a"}, driver_exit_code=1)
        cluster.add("a.10", metadata={"run": "a"})
        cluster.add("raysubmit_1", "RUNNING")
        lines = steadyhelm("list", "--address", cluster.address).stdout.splitlines()
        assert [line.partition(", since")[0] for line in lines] == [
            "b  succeeded, exit code 0  job b.1",
            "a  running  job a.10",
        ]
        assert [
            j["submission_id"] for j in json.loads(steadyhelm("list", "--json", "--address", cluster.address).stdout)
        ]

    def test_logs_are_shown_as_they_are_or_for_people(self, cluster: FakeCluster):
        cluster.add("a.1", "FAILED", metadata={"run": "a"}, driver_exit_code=2)
        cluster.logs["a.1"] = LOG
        assert steadyhelm("logs", "a", "--log-format", "json", "--address", cluster.address).stdout == LOG
        done = steadyhelm("logs", "a", "--follow", "--quiet", "--address", cluster.address)
        assert (done.exit_code, "rollout 0 is lost" in done.stdout, "iteration" in done.stdout) == (2, True, False)

    def test_a_run_is_stopped_and_its_end_awaited(self, cluster: FakeCluster):
        cluster.add("a.1", metadata={"run": "a"})
        assert "a  stopped  job a.1" in steadyhelm("stop", "a", "--address", cluster.address).stdout
        assert "a  stopped  job a.1" in steadyhelm("stop", "a", "--address", cluster.address).stdout
        cluster.add("b.1", metadata={"run": "b"})
        assert "told to stop" in steadyhelm("stop", "b", "--wait", "0", "--address", cluster.address).stdout

    def test_a_run_whose_job_goes_with_its_head_is_stopped(self, cluster: FakeCluster):
        def goes(handler: BaseHTTPRequestHandler) -> bool:
            if handler.path.endswith("/stop"):
                handler.answer(200, {"stopped": True})
                cluster.jobs.clear()
            return handler.path.endswith("/stop")

        cluster.add("a.1", metadata={"run": "a"})
        cluster.broken = goes
        done = steadyhelm("stop", "a", "--wait", "5", "--address", cluster.address)
        assert (done.exit_code, "job a.1 is gone" in done.stdout) == (0, True)

    def test_a_run_that_is_not_there_is_said_with_those_that_are(self, cluster: FakeCluster):
        cluster.add("a.1", metadata={"run": "a"})
        for command in ("status", "logs", "stop"):
            refused = steadyhelm(command, "b", "--address", cluster.address)
            assert "knows no run 'b': it has a" in str(refused.exception)


KUBECTL = """#!{python}
import os, socket, sys, threading
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    print(os.getpid(), *arguments, file=log)
if "get" in arguments:
    kind, name, *more = arguments[arguments.index("get") + 1:]
    if {forbidden!r}:
        sys.exit('Error from server (Forbidden): secrets "rl" is forbidden')
    elif kind == "raycluster" and name in {clusters!r}:
        print(name, {named!r}, end="")
    elif kind == "raycluster" and name == "--selector":
        print("".join(f"{{cluster}} {named}\\n" for cluster in {clusters!r}), end="")
    elif kind == "secret" and name == {secret!r} and {token!r}:
        print({token!r}, end="")
    else:
        sys.exit('Error from server (NotFound): ' + kind + ' "' + name + '" not found')
elif {refuse!r}:
    sys.exit({refuse!r})
else:
    here = int(arguments[-2].partition(":")[0])
    def relay(a, b):
        try:
            while data := a.recv(65536):
                b.sendall(data)
        except OSError:
            pass
        b.close()
    there = int(arguments[-1].partition(":")[0])
    def unserved(of):  # as the real one: it ends where nobody in the pod takes what it forwards
        of.accept()
        os._exit(1)
    with socket.create_server(("127.0.0.1", there)) as other, socket.create_server(("127.0.0.1", here)) as s:
        threading.Thread(target=unserved, args=(other,), daemon=True).start()
        for local, remote in ((here, 8265), (there, 8266)):
            print(f"Forwarding from 127.0.0.1:{{local}} -> {{remote}}", flush=True)
        while True:
            a, _ = s.accept()
            b = socket.create_connection(("127.0.0.1", {port}))
            for pair in ((a, b), (b, a)):
                threading.Thread(target=relay, args=pair, daemon=True).start()
"""


class TestReleases:
    """A cluster that is found by the name of its release, through kubectl."""

    @pytest.fixture
    def kubectl(self, cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def make(
            token: str = TOKEN,
            refuse: str = "",
            named: str = "",
            secret: str = "rl",
            clusters: tuple[str, ...] = ("rl",),
            *,
            forbidden: bool = False,
        ) -> Path:
            log, program = tmp_path / "kubectl.log", tmp_path / "bin" / "kubectl"
            program.parent.mkdir(exist_ok=True)
            port = cluster.address.rpartition(":")[2]
            program.write_text(
                KUBECTL.format(
                    python=sys.executable,
                    log=str(log),
                    token=base64.b64encode(token.encode()).decode(),
                    secret=secret,
                    clusters=clusters,
                    refuse=refuse,
                    port=port,
                    named=named,
                    forbidden=forbidden,
                )
            )
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
            monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
            return log

        return make

    def test_a_release_is_reached_by_its_secret_and_a_port_forward(self, cluster: FakeCluster, folder: Path, kubectl):
        log = kubectl()
        cluster.run = ending(cluster, "SUCCEEDED", 0)
        where = ("--release", "rl", "--namespace", "ml")
        done = steadyhelm("submit", folder / "run.yaml", *where)
        assert (done.exit_code, done.exception) == (0, None)
        _, get, forward = log.read_text().splitlines()
        asked = "--namespace ml get secret rl --output jsonpath={.data.auth_token}"
        forwarded = "--namespace ml port-forward --address 127.0.0.1 svc/rl-head-svc"
        assert get.split(maxsplit=1)[1] == asked
        assert " ".join(forward.split()[1:7]) == forwarded
        assert [pair.partition(":")[2] for pair in forward.split()[7:]] == ["8265", "8266"]
        assert not psutil.pid_exists(int(forward.split()[0]))
        again = steadyhelm("submit", folder / "run.yaml", *where, "--detach")
        assert "steadyhelm logs --follow digits-transformers --release rl --namespace ml" in again.stderr

    def test_a_port_forward_that_breaks_is_begun_again(self, cluster: FakeCluster, kubectl):
        log = kubectl()
        cluster.add("a.1", "SUCCEEDED")
        cluster.logs["a.1"] = "all\n"
        with PortForward("rl") as forward:
            api = Jobs(f"http://127.0.0.1:{forward.local[8265]}", TOKEN)
            psutil.Process(int(log.read_text().split()[0])).kill()
            assert "".join(api.follow("a.1", patience_s=60)) == "all\n"
        assert len(log.read_text().splitlines()) == 2
        assert secret_token("rl") == TOKEN

    def test_a_token_that_the_user_has_does_where_the_secret_may_not_be_read(
        self, cluster: FakeCluster, kubectl, monkeypatch: pytest.MonkeyPatch
    ):
        kubectl(forbidden=True)
        cluster.add("a.1", metadata={"run": "a"})
        assert "a  running  job a.1" in steadyhelm("list", "--release", "rl").stdout
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        assert "kubectl cannot read the secret 'rl'" in str(steadyhelm("list", "--release", "rl").exception)

    def test_the_secret_that_the_cluster_names_has_the_token_and_no_old_one(
        self, cluster: FakeCluster, kubectl, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        log = kubectl(named="team-token", secret="team-token")
        cluster.add("a.1", metadata={"run": "a"})
        assert "a  running  job a.1" in steadyhelm("list", "--release", "rl").stdout
        asked = [line.split(" ", 1)[1] for line in log.read_text().splitlines() if " get " in line]
        assert asked == [
            "get raycluster rl --output jsonpath={.metadata.name} {.spec.authOptions.secretName}",
            "get secret team-token --output jsonpath={.data.auth_token}",
        ]

    @pytest.mark.parametrize("name", ["other", "k" * 53])
    def test_a_release_whose_cluster_has_another_name_is_found_by_its_label(
        self, cluster: FakeCluster, kubectl, monkeypatch: pytest.MonkeyPatch, name: str
    ):
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        log = kubectl(secret=name[-50:], clusters=(name,))
        cluster.add("a.1", metadata={"run": "a"})
        assert "a  running  job a.1" in steadyhelm("list", "--release", "rl").stdout
        assert "get raycluster --selector app.kubernetes.io/instance=rl" in log.read_text()
        assert f"svc/{name}-head-svc" in log.read_text()

    def test_a_release_with_two_clusters_asks_which(self, cluster: FakeCluster, kubectl):
        kubectl(clusters=("one", "two"))
        refused = steadyhelm("list", "--release", "rl")
        assert "give --release one of one, two" in str(refused.exception)
        assert exit_code(refused.exception) == 2

    def test_kubectl_s_own_words_are_passed_on(self, kubectl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        kubectl(token="", refuse='Error from server (NotFound): services "rl-head-svc" not found')
        assert secret_token("rl") == ""
        refused = steadyhelm("list", "--release", "rl")
        assert isinstance(refused.exception, UnreachableError)
        assert 'services "rl-head-svc" not found' in str(refused.exception)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "there is no kubectl" in str(steadyhelm("list", "--release", "rl").exception)


def test_what_serves_no_status_is_said():
    from steadyhelm.jobs.status import read_status

    with serving(FakeCluster()) as cluster, pytest.raises(RequestRefusedError, match="serves no run's status"):
        read_status(cluster.address)
    with socket.create_server(("127.0.0.1", 0)) as hung, pytest.raises(UnreachableError, match="timed out"):
        read_status(f"http://127.0.0.1:{hung.getsockname()[1]}", timeout_s=0.1)
