"""The client of the Jobs API against a server on this machine."""

import http.server
import io
import json
import socket
import threading
import time
import traceback
import zipfile
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steadyhelm.errors import ConfigError, RequestRefusedError, TokenRefusedError, UnreachableError
from steadyhelm.jobs import Job, JobRequest, Jobs, api_token, entrypoint, read_status, submission_id
from steadyhelm.jobs.client import _zipped

from tests.unit.jobs.jobs_api import TOKEN, FakeCluster, serving

REQUEST = JobRequest(
    submission_id="digits.1", entrypoint="true", working_dir="gcs://_ray_pkg_1.zip", metadata={"run": "digits"}
)


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with serving(FakeCluster(token=TOKEN)) as cluster:
        yield cluster


def jobs(cluster: FakeCluster, timeout_s: float = 5.0) -> Jobs:
    return Jobs(cluster.address, TOKEN, timeout_s)


def test_a_job_is_submitted_once_whoever_asks_again(cluster: FakeCluster):
    first = jobs(cluster).submit(REQUEST)
    assert (first.submission_id, first.status, first.metadata) == ("digits.1", "PENDING", {"run": "digits"})
    assert cluster.jobs["digits.1"]["runtime_env"] == {"working_dir": "gcs://_ray_pkg_1.zip"}
    cluster.end("digits.1", "FAILED", 1)
    again = jobs(cluster).submit(REQUEST)
    assert (again.status, again.driver_exit_code, again.end_time) == ("FAILED", 1, 9.0)
    assert cluster.asked.count("POST /api/jobs/") == 1


def test_who_loses_a_race_for_an_id_gets_the_winner_s_job(cluster: FakeCluster):
    def another_is_first(handler: http.server.BaseHTTPRequestHandler) -> bool:
        if handler.command == "POST" and "digits.1" not in cluster.jobs:
            cluster.add("digits.1", "RUNNING", metadata={"by": "another"})
        return False

    cluster.broken = another_is_first
    assert jobs(cluster).submit(REQUEST).metadata == {"by": "another"}
    assert "POST /api/jobs/" in cluster.asked


def test_a_submission_whose_answer_is_lost_is_found(cluster: FakeCluster):
    def hang_up(handler: http.server.BaseHTTPRequestHandler) -> bool:
        if handler.command == "POST":
            cluster.add("digits.1")
            handler.close_connection = True
            return True
        return False

    cluster.broken = hang_up
    assert jobs(cluster).submit(REQUEST).status == "RUNNING"


@pytest.mark.parametrize("status", [400, 409])
def test_an_answer_that_refuses_an_id_which_is_there_means_that_job(cluster: FakeCluster, status: int):
    def faster(handler: http.server.BaseHTTPRequestHandler) -> bool:
        if handler.command == "POST":
            cluster.add("digits.1")
            handler.answer(status, "digits.1 exists")
        return handler.command == "POST"

    cluster.broken = faster
    assert jobs(cluster).submit(REQUEST).submission_id == "digits.1"


def test_a_job_that_is_refused_and_not_there_is_an_error(cluster: FakeCluster):
    cluster.broken = lambda handler: handler.command == "POST" and handler.answer(400, "no such runtime_env") is None
    with pytest.raises(RequestRefusedError, match="no such runtime_env"):
        jobs(cluster).submit(REQUEST)


def test_a_cluster_that_fails_at_submitting_can_be_asked_again(cluster: FakeCluster):
    cluster.broken = lambda handler: handler.command == "POST" and handler.answer(500, "No available agent") is None
    with pytest.raises(UnreachableError, match="HTTP 500 to POST /api/jobs/: No available agent"):
        jobs(cluster).submit(REQUEST)


@pytest.mark.parametrize(("token", "words"), [("", "asks for a token"), ("wrong", "refuses the token")])
def test_a_token_that_is_missing_or_wrong_is_named_and_never_shown(cluster: FakeCluster, token: str, words: str):
    client = Jobs(cluster.address, token)
    for ask in (lambda: client.get("a.1"), client.list, lambda: list(client.follow("a.1")), lambda: client.upload({})):
        with pytest.raises(TokenRefusedError, match=words) as caught:
            ask()
        assert TOKEN not in str(caught.value)


def test_nobody_there_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UnreachableError, match=f"http://127.0.0.1:{port} does not answer .Connection refused."):
        Jobs(f"http://127.0.0.1:{port}").list()


def test_a_server_that_hangs_is_left_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Jobs(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        for ask in (lambda: client.get("a.1"), lambda: list(client.follow("a.1", patience_s=0.0))):
            with pytest.raises(UnreachableError, match="timed out"):
                ask()


def test_a_server_that_drips_is_left_at_the_deadline():
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as dripping:

        def drip() -> None:
            connection, _ = dripping.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                while not over.wait(0.02):
                    connection.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(UnreachableError, match=r"timed out|no whole answer within 0\.2 s"):
                Jobs(f"http://127.0.0.1:{dripping.getsockname()[1]}", timeout_s=0.2).list()
        finally:
            over.set()
            thread.join()


def test_what_is_no_ray_api_is_told_apart(cluster: FakeCluster):
    cluster.broken = lambda handler: handler.answer(200, "<html>") is None
    with pytest.raises(RequestRefusedError, match="does not answer as a Ray API"):
        jobs(cluster).list()


JOB = {"submission_id": "a.1", "status": "RUNNING"}


@pytest.mark.parametrize(
    "answer",
    [None, [1], {"a": 1}, {"submission_id": "a.1"}, 7]
    + [JOB | more for more in ({"status": "LIMBO"}, {"metadata": []}, {"metadata": {"run": 1}}, {"start_time": "now"},
       {"start_time": 1e300}, {"end_time": float("nan")}, {"driver_exit_code": "1"}, {"message": {}})],
)  # fmt: skip
def test_an_answer_of_another_form_is_no_ray_api_s(cluster: FakeCluster, answer: object):
    cluster.broken = lambda handler: handler.answer(200, answer) is None
    client = jobs(cluster)
    asked = [lambda: client.get("a.1"), lambda: client.submit(REQUEST)]
    if not isinstance(answer, dict):
        asked += [lambda: client.stop("a.1"), lambda: client.logs("a.1")]
    for ask in asked:
        with pytest.raises(RequestRefusedError, match="does not answer as a Ray API"):
            ask()
    cluster.broken = lambda handler: handler.answer(200, [answer] if isinstance(answer, dict) else answer) is None
    if answer != {"a": 1}:  # which has no submission id, as what others drive
        with pytest.raises(RequestRefusedError, match="does not answer as a Ray API"):
            client.list()


NO_ADDRESSES = [
    "head:8265", "", "http://", "ray://head:10001", "http://head:x", "http://head:0", "http://head:99999",
    "http://[::1", "http://a..b:8265", "http://head/ä",
]  # fmt: skip


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_an_address_that_is_none_is_a_wrong_input(address: str):
    with pytest.raises(ConfigError, match="is no address of a Ray API"):
        Jobs(address)
    with pytest.raises(ConfigError, match="is no address of a driver's status"):
        read_status(address)


def test_jobs_are_listed_oldest_first_without_drivers_of_others(cluster: FakeCluster):
    cluster.add("b.1", start_time=2000)
    cluster.add("a.1", "SUCCEEDED", start_time=1000)
    assert [(job.submission_id, job.start_time) for job in jobs(cluster).list()] == [("a.1", 1.0), ("b.1", 2.0)]


def test_a_job_is_stopped_and_deleted_however_often(cluster: FakeCluster):
    cluster.add("a.1")
    client = jobs(cluster)
    assert [client.stop("a.1"), client.stop("a.1")] == [True, False]
    client.delete("a.1")
    client.delete("a.1")
    assert client.get("a.1") is None
    with pytest.raises(RequestRefusedError, match=r"HTTP 404 .* Job a.1 does not exist"):
        client.stop("a.1")


def test_files_are_sent_once(cluster: FakeCluster):
    files = {"run.yaml": b"name: a", "code/task.py": b"x = 1\n"}
    uri = jobs(cluster).upload(files)
    assert uri == jobs(cluster).upload(dict(reversed(files.items())))
    assert [line for line in cluster.asked if line.startswith("PUT")] == [f"PUT /api/packages/gcs/{uri[6:]}"]
    with zipfile.ZipFile(io.BytesIO(cluster.packages[uri[6:]])) as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == files
    assert jobs(cluster).upload({**files, "more.txt": b""}) != uri


@given(st.dictionaries(st.text("abc/.", min_size=1, max_size=5), st.binary(max_size=40), max_size=4))
def test_a_package_depends_on_its_files_alone(files: dict[str, bytes]):
    assert _zipped(files) == _zipped(dict(sorted(files.items(), reverse=True)))


class TestFollowing:
    """Each character once, whatever breaks."""

    LOG = "".join(f"line {n}\n" for n in range(40)) + "ä" * 70_000

    @pytest.fixture(autouse=True)
    def short_pauses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("steadyhelm.jobs.client.FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr("steadyhelm.jobs.client.LONGEST_PAUSE_S", 0.05)

    def test_a_log_is_read_to_the_job_s_end(self, cluster: FakeCluster):
        cluster.add("a.1")
        cluster.ping = True
        cluster.logs["a.1"] = "begin\n"
        pieces = []
        for piece in jobs(cluster).follow("a.1"):
            pieces.append(piece)
            if len(pieces) == 1:
                cluster.logs["a.1"] += self.LOG
                cluster.end("a.1", "SUCCEEDED", 0)
        assert "".join(pieces) == "begin\n" + self.LOG

    def test_a_cut_connection_costs_no_line(self, cluster: FakeCluster):
        cluster.add("a.1")
        cluster.logs["a.1"] = self.LOG
        cluster.cut_tail_after = [10, 0, 250, 70_100]
        found = ""
        for piece in jobs(cluster).follow("a.1"):
            found += piece
            if len(found) >= 250:
                cluster.end("a.1", "STOPPED")
        assert found == self.LOG

    def test_a_cluster_that_is_away_for_a_while_is_waited_for(self, cluster: FakeCluster):
        cluster.add("a.1", "FAILED")
        cluster.logs["a.1"] = self.LOG
        away = [True] * 5
        cluster.broken = lambda handler: bool(away) and away.pop() and handler.answer(503, "starting") is None
        assert "".join(jobs(cluster).follow("a.1")) == self.LOG
        assert not away

    def test_a_silent_log_of_a_job_that_has_ended_ends(self, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("steadyhelm.jobs.client.QUIET_S", 0.1)
        cluster.add("a.1")
        cluster.logs["a.1"] = "all\n"
        ends = threading.Timer(0.3, cluster.end, ("a.1", "SUCCEEDED"))
        ends.start()
        assert "".join(jobs(cluster).follow("a.1")) == "all\n"
        ends.join()

    def test_a_job_that_ended_is_seen_though_no_tail_is_closed_properly(self, cluster: FakeCluster):
        cluster.add("a.1", "SUCCEEDED")
        cluster.logs["a.1"] = "begin\nthe end\n"
        cluster.cut_tail_after = [6] * 1000
        assert "".join(jobs(cluster).follow("a.1", patience_s=60)) == "begin\nthe end\n"
        assert len(cluster.cut_tail_after) > 990

    def test_a_cluster_that_only_repeats_itself_is_left_after_a_while(self, cluster: FakeCluster):
        cluster.add("a.1")
        cluster.logs["a.1"] = "begin\n"
        cluster.cut_tail_after = [6] * 1000
        cluster.broken = lambda handler: handler.path.endswith("a.1") and handler.answer(503, "busy") is None
        found = jobs(cluster).follow("a.1", patience_s=0.3)
        assert next(found) == "begin\n"
        with pytest.raises(UnreachableError, match="busy"):
            next(found)

    def test_a_quiet_job_behind_connections_that_break_is_followed_on(self, cluster: FakeCluster):
        cluster.add("a.1")
        cluster.logs["a.1"] = "begin\n"
        cluster.cut_tail_after = [6] * 1000
        ends = threading.Timer(0.6, cluster.end, ("a.1", "SUCCEEDED"))
        ends.start()
        assert "".join(jobs(cluster).follow("a.1", patience_s=0.3)) == "begin\n"
        ends.join()

    def test_a_log_that_was_quiet_for_long_survives_a_head_that_is_away(
        self, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("steadyhelm.jobs.client.QUIET_S", 0.05)
        cluster.add("a.1")
        cluster.logs["a.1"] = "begin\n"
        quiet_until = time.monotonic() + 0.8
        away = [True] * 3

        def breaks(handler: http.server.BaseHTTPRequestHandler) -> bool:
            if time.monotonic() < quiet_until or not away:
                return False
            away.pop()
            if not away:
                cluster.end("a.1", "SUCCEEDED")
            handler.answer(503, "away")
            return True

        cluster.broken = breaks
        assert "".join(jobs(cluster).follow("a.1", patience_s=0.4)) == "begin\n"
        assert not away

    def test_a_job_that_is_gone_is_said(self, cluster: FakeCluster):
        with pytest.raises(RequestRefusedError, match=r"There is no job 'a\.1'"):
            list(jobs(cluster).follow("a.1"))


def test_ids_and_commands_are_safe_for_shells_and_addresses():
    assert submission_id("my run/1", 2) == "my-run-1.2"
    command = entrypoint("my run.yaml", "digits", sets=["data.train=a b.py:f"], take_over=True)
    assert command == (
        "exec steadyhelm run 'my run.yaml' --id digits --address auto --log-format json "
        "'--set=data.train=a b.py:f' --take-over"
    )


def test_a_job_s_request_has_no_environment():
    assert set(REQUEST.to_json()["runtime_env"]) == {"working_dir"}
    assert Job.of(json.loads('{"submission_id": "a.1", "status": "RUNNING"}')).metadata == {}


def test_the_token_is_where_ray_looks_for_it(tmp_path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "token"
    file.write_text(" from-file\n")
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("usual")
    assert api_token({"RAY_AUTH_TOKEN": "given", "RAY_AUTH_TOKEN_PATH": str(file)}) == "given"
    assert api_token({"RAY_AUTH_TOKEN": "given"}, file) == "from-file"
    assert api_token({"RAY_AUTH_TOKEN_PATH": str(file)}) == "from-file"
    assert api_token({"RAY_AUTH_MODE": "token"}) == "usual"
    assert api_token({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "given"}) == ""
    assert api_token({}) == ""


@pytest.mark.parametrize("data", [b"canary\nsecond", b"canary \xe2\x82\xac", b"canary\xff", b"canary\x00"])
def test_a_token_that_no_header_can_hold_is_refused_without_a_word_of_it(cluster: FakeCluster, tmp_path, data: bytes):
    file = tmp_path / "token"
    file.write_bytes(data)
    token = api_token({}, file)
    for ask in (lambda: Jobs(cluster.address, token), lambda: read_status(cluster.address, token)):
        with pytest.raises(TokenRefusedError, match="not one line of printable ASCII") as caught:
            ask()
        assert "canary" not in "".join(traceback.format_exception(caught.value))
    assert not cluster.asked


def test_an_upload_that_is_too_large_for_the_cluster_is_refused(cluster: FakeCluster):
    cluster.broken = lambda handler: handler.command == "PUT" and handler.answer(413, "too large") is None
    with pytest.raises(RequestRefusedError, match=r"HTTP 413 to PUT .*: too large"):
        jobs(cluster).upload({"a": b"1"})
