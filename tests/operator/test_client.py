"""The servers' answers and what they mean, on real sockets."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import kopf
import pytest
from steadyhelm.errors import RequestRefusedError, TokenRefusedError, UnreachableError
from steadyhelm_operator.api import Attempt
from steadyhelm_operator.client import ConflictError, Heads, Kubernetes, MissingError
from steadyhelm_operator.state import ClusterView, Submit
from steadyhelm_operator.testing import FakeHeads, MemoryKubernetes

CLUSTER = ClusterView(name="rl", namespace="ns", uid="u", host="rl-head-svc.ns.svc", secret="rl", head_ready=True)
ATTEMPT = Attempt(number=1, submission_id="digits.1", payload="p", started_at="2026-01-01T00:00:00Z", submitted=True)
REQUEST = Submit(
    submission_id="digits.1", entrypoint="true", files={"run.yaml": b"{}"}, metadata={"run": "digits", "attempt": "1"}
)


@contextmanager
def answering(status: int, body: Any) -> Iterator[tuple[str, list[Any]]]:
    """A server with one answer; the list gets each request's method, path, content type, token and body."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization")
            seen.append((self.command, self.path, self.headers.get("Content-Type"), token, json.loads(sent or b"null")))
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def at(url: str, token: str = "t") -> Kubernetes:
    return Kubernetes(lambda: kopf.ConnectionInfo(server=url, token=token))


def test_a_status_is_written_under_the_condition_of_its_version():
    with answering(200, {"metadata": {}}) as (url, seen):
        at(url).write_status("ns", "digits", "41", {"phase": "Running"})
    ((method, path, kind, token, body),) = seen
    assert (method, path) == ("PATCH", "/apis/steadyhelm.dev/v1alpha1/namespaces/ns/trainingruns/digits/status")
    assert (kind, token) == ("application/merge-patch+json", "Bearer t")
    assert body == {"metadata": {"resourceVersion": "41"}, "status": {"phase": "Running"}}


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, MissingError), (409, ConflictError), (403, RequestRefusedError), (422, RequestRefusedError),
     (401, UnreachableError), (429, UnreachableError), (500, UnreachableError)],
)  # fmt: skip
def test_what_the_api_server_refuses_is_told_in_its_words(status: int, error: type[Exception]):
    with answering(status, {"message": "its words"}) as (url, _), pytest.raises(error, match="its words"):
        at(url).run("ns", "digits")


def test_a_patch_whose_test_does_not_hold_is_a_conflict():
    with answering(422, {"message": "test failed"}) as (url, _), pytest.raises(ConflictError):
        at(url).patch_cluster(CLUSTER, [])


def test_a_cluster_is_deleted_by_its_uid_and_one_that_is_gone_is_gone():
    with answering(200, {}) as (url, seen):
        at(url).delete_cluster(CLUSTER)
    assert seen[0][4] == {"preconditions": {"uid": "u"}, "propagationPolicy": "Foreground"}
    for gone in (404, 409):
        with answering(gone, {}) as (url, _):
            at(url).delete_cluster(CLUSTER)


def test_a_cluster_that_is_not_there_is_none():
    with answering(404, {}) as (url, _):
        assert at(url).cluster("ns", "rl") is None


def test_nobody_there_is_an_error_to_be_tried_again():
    with answering(200, {}) as (url, _):
        pass
    with pytest.raises(UnreachableError, match="does not answer"):
        at(url).run("ns", "digits")


def test_a_token_is_read_anew_when_it_is_refused():
    tokens = iter(["old", "new"])
    with answering(401, {"message": "expired"}) as (url, seen):
        found = Kubernetes(lambda: kopf.ConnectionInfo(server=url, token=next(tokens)))
        for _ in range(2):
            with pytest.raises(UnreachableError):
                found.run("ns", "digits")
    assert [request[3] for request in seen] == ["Bearer old", "Bearer new"]


def test_a_secret_without_the_key_is_missing():
    with answering(200, {"data": {"auth_token": "dG9r"}}) as (url, _):
        assert at(url).secret("ns", "rl", "auth_token") == "tok"
        with pytest.raises(MissingError, match="has no 'other'"):
            at(url).secret("ns", "rl", "other")


def test_every_request_is_counted():
    counted: list[tuple[Any, ...]] = []
    with answering(404, {}) as (url, _):
        found = Kubernetes(lambda: kopf.ConnectionInfo(server=url), lambda *call: counted.append(call))
        found.cluster("ns", "rl")
    assert [call[:3] for call in counted] == [("GET", "rayclusters", 404)]
    assert counted[0][3] > 0


@pytest.fixture
def fake() -> Iterator[tuple[FakeHeads, Heads]]:
    kubernetes = MemoryKubernetes()
    kubernetes.secrets["ns", "rl", "auth_token"] = "secret"
    heads = FakeHeads(token="secret")
    with heads.served() as url:
        yield heads, Heads(kubernetes, url, url)  # type: ignore[arg-type]


def test_a_driver_is_submitted_with_its_files_and_seen_by_what_it_says(fake: tuple[FakeHeads, Heads]):
    heads, client = fake
    assert client.view(CLUSTER, ATTEMPT, "digits").job is None
    client.submit(CLUSTER, REQUEST)
    client.submit(CLUSTER, REQUEST)
    (job,) = heads.head("ns", "rl").jobs.values()
    assert job.working_dir.startswith("gcs://_ray_pkg_")
    assert len(heads.head("ns", "rl").packages) == 1
    heads.head("ns", "rl").iteration = 7
    found = client.view(CLUSTER, ATTEMPT, "digits")
    assert (found.reachable, found.job.status, found.document.iteration) == (True, "RUNNING", 7)


def test_a_living_driver_costs_one_request(fake: tuple[FakeHeads, Heads]):
    heads, client = fake
    client.submit(CLUSTER, REQUEST)
    client.view(CLUSTER, ATTEMPT, "digits")
    before = heads.requests
    client.view(CLUSTER, ATTEMPT, "digits")
    assert heads.requests - before == 1


def test_another_runs_document_is_not_taken_for_this_one(fake: tuple[FakeHeads, Heads]):
    _, client = fake
    client.submit(CLUSTER, REQUEST)
    found = client.view(CLUSTER, ATTEMPT, "letters")
    assert (found.job.status, found.document) == ("RUNNING", None)


def test_the_last_words_of_a_driver_are_in_the_jobs_message(fake: tuple[FakeHeads, Heads]):
    heads, client = fake
    client.submit(CLUSTER, REQUEST)
    document = heads.document(heads.head("ns", "rl")).model_copy(update={"phase": "failed", "reason": "NonFinite"})
    heads.end("ns", "rl", "FAILED", 1, f"failed with exit code 1, last available logs:\nx\n{document.line()}\n")
    found = client.view(CLUSTER, ATTEMPT, "digits")
    assert (found.job.exit_code, found.document.reason) == (1, "NonFinite")


def test_a_head_that_refuses_the_token_is_out_of_reach_until_the_secret_has_the_right_one(
    fake: tuple[FakeHeads, Heads],
):
    heads, client = fake
    heads.token = "rotated"
    found = client.view(CLUSTER, ATTEMPT, "digits")
    assert (found.reachable, "token" in found.problem, "secret" in found.problem) == (False, True, False)
    assert found.refused
    client._kubernetes.secrets["ns", "rl", "auth_token"] = "rotated"
    assert client.view(CLUSTER, ATTEMPT, "digits").reachable


def test_a_head_without_a_secret_is_out_of_reach_and_says_which(fake: tuple[FakeHeads, Heads]):
    _, client = fake
    client._kubernetes.secrets.clear()
    found = client.view(CLUSTER, ATTEMPT, "digits")
    assert (found.reachable, found.refused, "Secret 'rl' in ns" in found.problem) == (False, True, True)


def test_a_secret_that_is_no_token_is_out_of_reach_and_in_no_message(fake: tuple[FakeHeads, Heads]):
    heads, client = fake
    client._kubernetes.secrets["ns", "rl", "auth_token"] = "canary\nsecond"
    with pytest.raises(TokenRefusedError) as caught:
        client.submit(CLUSTER, REQUEST)
    assert "canary" not in str(caught.value)
    found = client.view(CLUSTER, ATTEMPT, "digits")
    assert (found.reachable, found.refused, "canary" in found.problem) == (False, True, False)
    assert "printable ASCII" in found.problem
    client._kubernetes.secrets["ns", "rl", "auth_token"] = heads.token
    assert client.view(CLUSTER, ATTEMPT, "digits").reachable


def test_a_figure_that_is_no_number_is_none(fake: tuple[FakeHeads, Heads]):
    heads, client = fake
    client.submit(CLUSTER, REQUEST)
    heads.document = lambda head: StrangeDocument()
    found = client.view(CLUSTER, ATTEMPT, "digits").document
    assert (found.iteration, found.reward, found.staleness) == (3, None, 0.5)


class StrangeDocument:
    """What another server says of a run, with a word that JSON has not."""

    def model_dump(self, mode: str) -> dict[str, Any]:
        said = {"run": "digits", "submission_id": "digits.1", "phase": "running", "iteration": 3}
        return said | {"reward": float("nan"), "staleness": 0.5}


def test_a_head_that_is_down_is_out_of_reach(fake: tuple[FakeHeads, Heads]):
    heads, client = fake
    heads.head("ns", "rl").up = False
    assert client.view(CLUSTER, ATTEMPT, "digits").reachable is False


def test_jobs_are_stopped_and_forgotten(fake: tuple[FakeHeads, Heads]):
    heads, client = fake
    client.submit(CLUSTER, REQUEST)
    client.stop(CLUSTER, "digits.1")
    assert client.view(CLUSTER, ATTEMPT, "digits").job.status == "STOPPED"
    client.forget(CLUSTER, "digits.1")
    assert heads.head("ns", "rl").jobs == {}
