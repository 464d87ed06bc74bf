"""A run's status: what events make of it, who may read it, and what is left of it."""

import errno
import json
import socket
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from steadyhelm.cli import app
from steadyhelm.config import RunFile
from steadyhelm.driver import take_over
from steadyhelm.errors import (
    ConfigError,
    DeadlineError,
    EngineLostError,
    FatalError,
    NonFiniteError,
    ObjectMissingError,
    StoreError,
    reason_of,
)
from steadyhelm.status import ADDRESS, StatusBoard, kept, served, told_at_the_end
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.local import LocalStore
from steadyhelm.telemetry import EvalDone, Event, IterationDone, Notice, RunStarted, ServiceState
from steadyhelm.telemetry.status import RunStatus
from steadyhelm.testing.memory_store import MemoryStore
from typer.testing import CliRunner

TOKEN = "canary-token-0123456789"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def ask(port: int, token: str = "", path: str = "/status", header: str = "Authorization") -> dict[str, object]:
    headers = {header: f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers), timeout=5
    ) as a:
        return json.loads(a.read())


def asked_until_it_answers(port: int) -> dict[str, object]:
    ends = time.monotonic() + 20
    while True:
        try:
            return ask(port)
        except urllib.error.URLError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)


class TestTheDocument:
    """What the events say."""

    def test_it_says_how_far_the_run_is_and_how_good(self, monkeypatch: pytest.MonkeyPatch):
        config = json.dumps({"metadata": {"job_submission_id": "digits.2"}})
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config)
        board = StatusBoard()
        board.take(RunStarted(run="digits", iterations=60, first_iteration=13, place="s3://runs/digits"))
        board.take(Notice(text="rollout 0 is lost", level="warning"))
        assert board.document().message == "rollout 0 is lost"
        board.take(IterationDone(iteration=13, metrics={"reward/mean": 1.5, "staleness/mean": float("nan")}))
        board.take(EvalDone(iteration=13, metrics={"eval/accuracy": 0.75}))
        found = json.loads(board.document().line())
        expected = {"run": "digits", "submission_id": "digits.2", "iterations": 60, "iteration": 12}
        assert {name: found[name] for name in expected} == expected
        assert (found["reward"], found["staleness"], found["accuracy"], found["message"]) == (1.5, None, 0.75, "")

    def test_losses_stay_known_behind_the_iteration_that_follows(self):
        board = StatusBoard()
        board.take(Notice(text="rollout 0 is lost; another one takes its place", level="warning", loss=True))
        board.take(Notice(text="a shard is late", level="warning"))
        board.take(Notice(text="a learner rank is lost: " + 1000 * "x", level="warning", loss=True))
        board.take(IterationDone(iteration=1, metrics={}))
        found = board.document()
        assert (found.losses, found.message, len(found.lost)) == (2, "", 300)
        assert found.lost.startswith("a learner rank is lost")

    def test_it_says_what_takes_long_and_what_finds_no_room(self):
        board = StatusBoard(clock=lambda: 100.0)
        board.take(ServiceState(service="learner", state="steps iteration 3", since_s=40.0))
        board.take(ServiceState(service="reward 0", state="scores", since_s=95.0))
        board.take(ServiceState(service="prompts 0", state="waits for work", since_s=0.0, waiting=True))
        assert board.document().waiting == ("learner: steps iteration 3, for 60 s",)
        lacks = "pool rollout lacks GPU"
        board.take(ServiceState(service="rollout 1", state="start", since_s=70.0, lacks=lacks))
        status = board.document()
        assert status.waiting[0] == status.message == f"rollout 1: {lacks}"
        assert status.reason == "NoCapacity"
        board.take(ServiceState(service="rollout 1", state="", since_s=90.0))
        assert (board.document().reason, len(board.document().waiting)) == ("", 1)

    def test_who_ended_for_lack_of_room_says_that(self):
        board = StatusBoard()
        board.take(ServiceState(service="rollout 0", state="start", since_s=0.0, lacks="pool rollout has no node"))
        board.failed(DeadlineError("No answer from rollout 0 within 300 s."))
        board.failed(ConfigError("what comes of it"))
        status = board.document()
        assert (status.phase, status.reason, status.waiting) == ("failed", "NoCapacity", ())
        assert status.message.startswith("No answer from rollout 0")

    def test_secrets_of_the_environment_are_not_in_it(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        board = StatusBoard()
        board.take(Notice(text=f"the token is {TOKEN}", level="error"))
        board.take(ServiceState(service="a", state="start", since_s=0.0, lacks=f"room for {TOKEN}"))
        assert TOKEN not in board.document().line()
        board.failed(FatalError(f"https://me:{TOKEN}@host refuses"))
        assert TOKEN not in board.document().line()

    @pytest.mark.parametrize(
        ("code", "phase", "reason"), [(0, "finished", ""), (143, "stopped", "Stopped"), (130, "stopped", "Stopped")]
    )
    def test_it_says_how_the_driver_ended(self, code: int, phase: str, reason: str):
        board = StatusBoard()
        board.ended(code)
        assert (board.document().phase, board.document().reason) == (phase, reason)

    def test_the_last_document_of_a_log_is_found_in_it(self):
        first, last = RunStatus(run="a", phase="running").line(), RunStatus(run="a", phase="failed").line()
        log = f'{{"time": "…"}}\n{first}\n{last}\nsteadyhelm: it ended\n{{"run": "phase": broken'
        assert RunStatus.from_log(log) == RunStatus(run="a", phase="failed")
        assert RunStatus.from_log("nothing\n") is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConfigError("x"), "BadRunFile"),
        (NonFiniteError("x"), "NonFinite"),
        (EngineLostError("x"), "EngineFailed"),
        (ObjectMissingError("x"), "StoreFailed"),
        (StoreError("x", "StoreUnreachable"), "StoreUnreachable"),
        (OSError(errno.ENOSPC, "No space left on device"), "DiskFull"),
        (ZeroDivisionError(), "Bug"),
    ],
)
def test_an_error_has_a_class_for_machines(error: BaseException, reason: str):
    assert reason_of(error) == reason


def test_a_full_disk_behind_another_error_is_found():
    error = FatalError("rollout 0 failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert reason_of(error) == "DiskFull"


def test_a_store_that_refuses_is_told_from_one_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = LocalStore(tmp_path)
    for number, reason in ((errno.ENOSPC, "DiskFull"), (errno.EROFS, "StoreRefused"), (errno.EIO, "StoreFailed")):
        monkeypatch.setattr("os.writev", lambda *_, n=number: (_ for _ in ()).throw(OSError(n, "no")))
        with pytest.raises(StoreError) as caught:
            store.put("a", b"1")
        assert caught.value.reason == reason


class TestServing:
    """Who may read it."""

    def test_it_is_served_to_who_bears_the_token(self, monkeypatch: pytest.MonkeyPatch):
        port = free_port()
        monkeypatch.setenv(ADDRESS, f"127.0.0.1:{port}")
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        with served(StatusBoard(), lambda event: None) as tell:
            tell(RunStarted(run="digits", iterations=3))
            assert ask(port, TOKEN)["run"] == ask(port, TOKEN, header="X-Ray-Authorization")["run"] == "digits"
            for token in ("", "wrong", TOKEN[:-1], "ä"):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    ask(port, token.encode().decode("latin-1"))
                assert refused.value.code == 401
                refused.value.close()
            with pytest.raises(urllib.error.HTTPError) as missing:
                ask(port, TOKEN, "/")
            assert missing.value.code == 404
            missing.value.close()
        with pytest.raises(urllib.error.URLError):
            ask(port, TOKEN)

    def test_without_a_token_it_is_open(self, monkeypatch: pytest.MonkeyPatch):
        port = free_port()
        monkeypatch.setenv(ADDRESS, f"127.0.0.1:{port}")
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with served(StatusBoard(), lambda event: None):
            assert ask(port)["phase"] == "starting"

    def test_a_port_that_becomes_free_is_taken(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        said: list[Event] = []
        with ExitStack() as stack:
            with socket.create_server(("127.0.0.1", 0)) as first:
                port = first.getsockname()[1]
                monkeypatch.setenv(ADDRESS, f"127.0.0.1:{port}")
                tell = stack.enter_context(served(StatusBoard(), said.append, again_s=0.05))
            tell(RunStarted(run="second", iterations=3))
            assert asked_until_it_answers(port)["run"] == "second"
        warning, *others = [event.text for event in said if isinstance(event, Notice)]
        assert "It is tried again every" in warning
        assert others == [f"This run's status is served at 127.0.0.1:{port} now."]

    @pytest.mark.parametrize("address", ["127.0.0.1:{taken}", "127.0.0.1:http", "nowhere.invalid:1", "127.0.0.1:70000"])
    def test_where_it_cannot_be_served_the_run_goes_on(self, address: str, monkeypatch: pytest.MonkeyPatch):
        told: list[Event] = []
        with socket.create_server(("127.0.0.1", 0)) as other:
            monkeypatch.setenv(ADDRESS, address.format(taken=other.getsockname()[1]))
            with served(StatusBoard(), told.append) as tell:
                tell(RunStarted(run="digits", iterations=3))
        notice, started = told
        assert isinstance(notice, Notice)
        assert notice.text.startswith("Nobody can ask for this run's status: STEADYHELM_STATUS_ADDRESS")
        assert isinstance(started, RunStarted)


class TestWhatIsLeft:
    """Beside the run's objects, and in the job's log."""

    def test_the_status_is_stored_however_the_run_ends(self, run_file: RunFile):
        store, layout, board = MemoryStore(), RunLayout("fake"), StatusBoard()
        log = take_over(run_file, store, "fake", False)
        with pytest.raises(NonFiniteError), kept(board, store, layout, log):
            raise NonFiniteError("loss is NaN")
        found = RunStatus.model_validate_json(bytes(store.get("fake/status.json")))
        assert (found.phase, found.reason, found.message) == ("failed", "NonFinite", "loss is NaN")
        board = StatusBoard()
        with kept(board, store, layout, log):
            board.ended(0)
        assert RunStatus.model_validate_json(bytes(store.get("fake/status.json"))).phase == "finished"

    def test_who_was_taken_over_leaves_the_other_s_alone(self, run_file: RunFile):
        store, layout = MemoryStore(), RunLayout("fake")
        log = take_over(run_file, store, "fake", False)
        with kept(StatusBoard(), store, layout, log):
            take_over(run_file, store, "fake", False)
        assert not store.exists("fake/status.json")

    def test_a_store_that_fails_hides_no_error(self, run_file: RunFile):
        store, layout, board = MemoryStore(), RunLayout("fake"), StatusBoard()
        log = take_over(run_file, store, "fake", False)
        store.fail("*status*", nth=1, when="before", error=StoreError("the disk is full"))
        with pytest.raises(ConfigError, match="the cause"), kept(board, store, layout, log):
            raise ConfigError("the cause")
        assert board.document().message == "the cause (This status could not be stored: StoreError.)"

    def test_it_is_the_last_line_also_of_a_run_that_never_began(self, tmp_path: Path):
        (tmp_path / "run.yaml").write_text("name: x\n")
        done = CliRunner().invoke(app, ["run", str(tmp_path / "run.yaml"), "--log-format", "json"])
        assert isinstance(done.exception, ConfigError)
        status = RunStatus.from_log(done.stdout)
        assert status is not None
        assert (status.phase, status.reason) == ("failed", "BadRunFile")
        assert "model" in status.message

    def test_a_signal_during_the_last_words_is_in_them(self):
        said: list[str] = []
        with pytest.raises(KeyboardInterrupt), told_at_the_end(StatusBoard(), said.append):
            raise KeyboardInterrupt
        assert RunStatus.from_log(said[0]).phase == "failed"


async def test_the_driver_keeps_it_up_to_date(start):
    run = start(MemoryStore())
    await run.follow()
    status = run.driver._board.document()
    assert (status.phase, status.iteration, status.attempt) == ("running", 4, 1)
    assert (status.version.iteration, status.checkpoint.iteration) == (4, 4)
    assert status.checkpoint.key == "fake/checkpoints/000004.1"
