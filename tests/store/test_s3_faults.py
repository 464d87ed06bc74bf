"""The S3 store behind a server, or a way to it, that fails: nothing is lost, nothing half-read, one writer wins."""

import math
import multiprocessing
import os
import signal
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from steadyhelm.data.types import BatchManifest, PolicyVersion
from steadyhelm.errors import CorruptObjectError, FencedError, ObjectExistsError, ObjectMissingError, StoreError
from steadyhelm.store import open_store
from steadyhelm.store.log import CommitLog
from steadyhelm.store.probe import require_one_winner
from steadyhelm.store.s3 import S3Store
from steadyhelm.store.s3.transfer import PART_BYTES

from tests.store.faults import (
    Answer,
    FaultProxy,
    Stale,
    cut,
    fail_behind,
    fault_proxy,
    flip,
    lose,
    redirect,
    refuse,
    reset,
    shorten,
    stall,
    stall_behind,
    turned,
    twice,
    without,
)

pytestmark = [
    pytest.mark.store,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12 warns of threads
]
ON_FORK = multiprocessing.get_context("fork")
STALL_S = 10.0
BIG = np.random.default_rng(0).bytes(2 * PART_BYTES + 12345)


@pytest.fixture
def proxy(s3_endpoint):
    with fault_proxy(s3_endpoint) as made:
        yield made


@pytest.fixture
def store(proxy: FaultProxy, s3_bucket) -> S3Store:
    """Through the proxy. No answer that comes is late, so that requests can be counted; see ``impatient``."""
    found = open_store(f"s3://{s3_bucket}/{uuid.uuid4().hex}?endpoint={proxy.endpoint}&timeout_s=10&deadline_s=60")
    assert isinstance(found, S3Store)
    return found


def impatient(store: S3Store, *, timeout_s: float = 10, deadline_s: float = 60) -> S3Store:
    """The same place, soon given up: where nothing answers, or where what is wrong stays."""
    timed = store.uri.replace("timeout_s=10", f"timeout_s={timeout_s}")
    found = open_store(timed.replace("deadline_s=60", f"deadline_s={deadline_s}"))
    assert isinstance(found, S3Store)
    return found


IN_PASSING = {
    "500": refuse(500, "InternalError"),
    "503": refuse(503, "SlowDown"),
    "429": refuse(429, "TooManyRequests"),
    "529": refuse(529, "TooBusy"),
    "400 that passes": refuse(400, "ThrottlingException"),
    "reset": reset,
    "lost answer": lose,
    "failed behind": fail_behind,
    "stall": stall(STALL_S),
    "stall behind": stall_behind(STALL_S),
}


@pytest.mark.parametrize("fault", IN_PASSING)
def test_every_operation_outlives_failures_that_pass(store, proxy, fault):
    store = impatient(store, timeout_s=0.5) if "stall" in fault else store
    for operation in ("put", "create", "get", "range", "head", "list", "delete"):
        proxy.fail(operation, IN_PASSING[fault])
    ref = store.put("run/a", b"0123456789")
    assert store.put("run/b", b"9876543210", if_absent=True).num_bytes == 10
    assert bytes(store.read(ref)) == b"0123456789"
    assert store.get_range("run/b", 2, 3) == b"765"
    store.flush(["run/a", "run/b"])
    assert list(store.list("run/")) == ["run/a", "run/b"]
    store.delete("run/a")
    assert not store.exists("run/a")
    assert all(proxy.seen[operation] >= 2 for operation in ("put", "create", "get", "range", "head", "list", "delete"))


@pytest.mark.parametrize("fault", IN_PASSING)
def test_every_part_of_a_large_object_outlives_failures_that_pass(store, proxy, fault):
    store = impatient(store, timeout_s=0.5) if "stall" in fault else store
    for operation in ("begin", "part", "complete", "range"):
        proxy.fail(operation, IN_PASSING[fault])
    ref = store.put("run/big", BIG)
    assert store.read(ref) == BIG
    assert proxy.seen["part"] > 3
    assert proxy.seen["range"] > 3


ANSWER_LOST = {
    "lost answer": lose,
    "failed behind": fail_behind,
    "twice": twice,
    "stall behind": stall_behind(STALL_S),
    "409": refuse(409, "ConditionalRequestConflict"),
}


@pytest.mark.parametrize("fault", ANSWER_LOST)
def test_a_creation_whose_answer_is_lost_is_ours_when_our_bytes_are_there(store, proxy, fault):
    store = impatient(store, timeout_s=0.5) if "stall" in fault else store
    proxy.fail("create", ANSWER_LOST[fault])
    store.put("run/log/1", b"mine", if_absent=True)
    assert bytes(store.get("run/log/1")) == b"mine"
    with pytest.raises(ObjectExistsError):
        store.put("run/log/1", b"another's", if_absent=True)


@pytest.mark.parametrize("fault", [lose, reset, fail_behind, twice])
def test_a_creation_that_met_a_rival_is_no_success_however_it_was_answered(store, proxy, fault):
    store.put("run/log/1", b"rival")
    proxy.fail("create", fault)
    with pytest.raises(ObjectExistsError, match="another writer was first"):
        store.put("run/log/1", b"mine", if_absent=True)
    assert bytes(store.get("run/log/1")) == b"rival"


def test_a_rival_that_comes_between_two_tries_wins(store, proxy):
    def rival(exchange):
        direct = store_at(proxy.upstream, store)
        direct.put("run/log/1", b"rival")
        exchange.reset()

    proxy.fail("create", rival)
    with pytest.raises(ObjectExistsError):
        store.put("run/log/1", b"mine", if_absent=True)


def store_at(upstream, like: S3Store) -> S3Store:
    """The same place without the proxy."""
    host, port = upstream
    return open_store(f"s3://{like.address.bucket}/{like.address.prefix}?endpoint=http://{host}:{port}")


DAMAGE = {"cut": cut, "shortened": shorten, "flipped": flip}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("operation", ["get", "range"])
def test_damage_on_the_way_is_read_again(store, proxy, operation, damage):
    data = BIG if operation == "range" else b"0123456789" * 1000
    ref = store.put("run/a", data)
    proxy.fail(operation, DAMAGE[damage])
    assert store.read(ref) == data
    proxy.fail(operation, DAMAGE[damage])
    if (operation, damage) != ("range", "flipped"):  # the server keeps no checksum of a range
        assert store.get("run/a") == data


@pytest.mark.parametrize("operation", ["get", "range"])
def test_damage_that_stays_is_an_error_and_no_data(store, proxy, operation):
    ref = store.put("run/a", BIG if operation == "range" else b"0123456789" * 1000)
    store = impatient(store, deadline_s=1)
    for damage in DAMAGE.values():
        proxy.heal()
        proxy.fail(operation, damage, times=float("inf"))
        with pytest.raises((CorruptObjectError, StoreError), match="run/a"):
            store.read(ref)


def test_an_object_that_was_cut_off_in_the_store_is_corrupt(store):
    ref = store.put("run/big", BIG)
    for rest in (BIG[:-1], BIG[: PART_BYTES + 5], BIG[:100], b""):
        store.put("run/big", rest)
        with pytest.raises(CorruptObjectError, match=f"{len(rest)} bytes instead of {len(BIG)}"):
            store.read(ref)


def test_an_object_that_is_replaced_while_it_is_read_in_parts_is_never_a_mixture(store, proxy):
    store.put("run/big", b"1" * len(BIG))

    def replace(exchange):
        store_at(proxy.upstream, store).put("run/big", b"2" * len(BIG))
        exchange.reply(exchange.ask())

    proxy.fail("range", replace)
    assert set(bytes(store.get("run/big"))) == {ord("2")}


def test_a_store_that_never_answers_ends_the_call_at_its_deadline(store, proxy):
    proxy.fail("*", stall(STALL_S), times=float("inf"))
    store = impatient(store, timeout_s=0.5, deadline_s=1.5)
    calls = (
        lambda: store.put("run/a", b"1"),
        lambda: store.put("run/a", b"1", if_absent=True),
        lambda: store.get("run/a"),
        lambda: list(store.list("run/")),
    )
    for call in calls:
        with pytest.raises(StoreError, match=r"no success in \d+ s, the last try ended with ReadTimeoutError.*resume"):
            call()


def test_a_server_that_is_not_there_is_told_with_what_to_look_at(s3_bucket, monkeypatch):
    monkeypatch.setattr("steadyhelm.store.s3.requests.FIRST_ANSWER_S", 0.3)
    with pytest.raises(StoreError, match="EndpointConnectionError: see whether the server is up"):
        open_store(f"s3://{s3_bucket}/x?endpoint=http://127.0.0.1:9").exists("run/a")


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "AccessDenied", "grant them"),
        (403, "ExpiredToken", "renew them"),
        (403, "RequestTimeTooSkewed", "clock"),
        (404, "NoSuchBucket", "create it"),
        (404, "XAdminUserNotFound", "give right credentials"),
        (507, "XMinioStorageFull", "full: free some space"),
        (507, "InsufficientStorage", "full: free some space"),
        (501, "NotImplemented", "conditional creation .* above all: use a server that keeps it"),
        (505, "HTTPVersionNotSupported", "HTTP 505"),
        (400, "Novelty", "HTTP 400 Novelty"),
    ],
)
def test_what_no_retry_helps_is_told_at_once_with_its_remedy(store, proxy, status, code, remedy):
    for operation in ("put", "create"):
        proxy.fail(operation, refuse(status, code))
        with pytest.raises(StoreError, match=rf"cannot write 'run/a' in s3://.*{remedy}"):
            store.put("run/a", b"1", if_absent=operation == "create")
    assert proxy.seen == {"put": 1, "create": 1}


def test_a_missing_bucket_is_no_missing_object(s3_endpoint):
    store = open_store(f"s3://no-such-bucket/x?endpoint={s3_endpoint}")
    for ask in (lambda: store.exists("run/a"), lambda: store.flush(["run/a"])):
        with pytest.raises(StoreError, match="NoSuchBucket: there is no such bucket: create it"):
            ask()


def test_a_server_that_redirects_without_end_is_told_with_what_to_mend(store, proxy):
    proxy.fail("*", redirect, times=math.inf)
    for call in (lambda: store.put("run/a", b"1"), lambda: store.get("run/a"), lambda: list(store.list("run/"))):
        with pytest.raises(StoreError, match=r"elsewhere without end: mend endpoint .* or region in store\.uri"):
            call()


def test_a_server_that_refuses_the_condition_is_refused_with_what_to_use_instead(store, proxy):
    proxy.fail("create", refuse(501, "NotImplemented"), times=float("inf"))
    with pytest.raises(StoreError, match=r"HTTP 501 NotImplemented: .*use a server that keeps it"):
        require_one_winner(store, "run")


def test_an_object_that_comes_in_chunks_is_read_to_its_end(store, proxy):
    ref = store.put("run/a", b"0123456789")
    proxy.fail("get", without("Content-Length"), times=2)
    assert bytes(store.get("run/a")) == b"0123456789"
    assert bytes(store.read(ref)) == b"0123456789"
    proxy.fail("head", without("Content-Length"), times=3)
    assert store.exists("run/a")
    store.flush(["run/a"])


def test_answers_that_lack_what_is_needed_are_errors_that_name_it(store, proxy):
    store.put("run/a", b"0123456789")

    def page(exchange):
        answer = exchange.ask()
        body = answer.body.replace(b"<IsTruncated>false", b"<IsTruncated>true")
        exchange.reply(Answer(answer.status, [h for h in answer.headers if h[0] != "Content-Length"], body))

    cases = [
        ("head", without("Content-Length"), lambda: store.get_range("run/a", 0, 0), "ContentLength"),
        ("list", page, lambda: list(store.list("run/")), "NextContinuationToken"),
        ("uploads", without("Date"), lambda: store.sweep("run/"), "date"),
        ("begin", without("UploadId"), lambda: store.put("run/big", BIG), "UploadId"),
        ("part", without("ETag", "Etag"), lambda: store.put("run/big", BIG), "ETag"),
    ]
    for operation, fault, call, name in cases:
        proxy.fail(operation, fault)
        with pytest.raises(StoreError, match=f"answers without {name} about 'run/.*use another"):
            call()


def test_a_listing_out_of_order_is_an_error_and_no_list(store, proxy):
    for name in ("run/a", "run/b"):
        store.put(name, b"")
    proxy.fail("list", turned)
    with pytest.raises(StoreError, match=r"run/a' behind '.*run/b': the order of keys is not that of their bytes"):
        list(store.list("run/"))
    assert list(store.list("run/")) == ["run/a", "run/b"]


def test_an_upload_that_fails_for_good_leaves_nothing_behind(store, proxy):
    proxy.fail("complete", refuse(403, "AccessDenied"))
    with pytest.raises(StoreError, match="AccessDenied"):
        store.put("run/big", BIG)
    assert not store.exists("run/big")
    assert store.sweep("run/", older_s=-1) == ()


def test_an_upload_that_a_sweep_aborts_is_made_again(store, proxy):
    def sweep(exchange):
        assert store_at(proxy.upstream, store).sweep("run/", older_s=-1) == ("run/big",)
        exchange.reply(exchange.ask())

    proxy.fail("part", sweep)
    ref = store.put("run/big", BIG)
    assert store.read(ref) == BIG
    assert proxy.seen["begin"] == 2


def test_a_writer_that_dies_between_two_parts_leaves_the_old_object_and_an_upload_to_sweep(store, proxy):
    ref = store.put("run/big", b"1" * len(BIG))
    reached = ON_FORK.Event()

    def hold(exchange):
        reached.set()
        exchange.stall(60)

    proxy.seen.clear()
    proxy.fail("part", hold, times=2)
    writer = ON_FORK.Process(target=lambda: store.put("run/big", BIG))
    writer.start()
    assert reached.wait(30)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(30)
    assert store.read(ref) == b"1" * len(BIG)
    assert store.sweep("run/") == ()
    assert store.sweep("run/", older_s=-1, dry_run=True) == ("run/big",)
    assert store.sweep("run/other", older_s=-1) == ()
    assert store.sweep("run/", older_s=-1) == ("run/big",)
    assert store.sweep("run/", older_s=-1) == ()
    assert store.read(ref) == b"1" * len(BIG)


def batch(iteration: int, outcome: str = "dropped:x") -> BatchManifest:
    policy = PolicyVersion(iteration=iteration - 1, attempt=1)
    return BatchManifest(iteration=iteration, policy=policy, shards=(), outcomes={f"0:{iteration}": outcome})


def test_of_eight_racing_committers_on_a_failing_server_one_wins(store, proxy):
    for fault in (refuse(503, "SlowDown"), lose, reset, fail_behind, twice):
        proxy.fail("*", fault, times=float("inf"), chance=0.05)
    start = threading.Barrier(8)

    def drive(number):
        start.wait()
        log = CommitLog.take_over(store, "run", f"race {number}")
        try:
            for iteration in range(log.last_iteration + 1, 4):
                log.commit_batch(batch(iteration, f"dropped:{number}"))
        except FencedError:
            return log.attempt, False
        return log.attempt, True

    with ThreadPoolExecutor(8) as threads:
        ended = dict(threads.map(drive, range(8)))
    proxy.heal()
    assert sorted(ended) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert ended[8]
    found = CommitLog.read(store, "run")
    assert found.attempt == 8
    assert [manifest.iteration for manifest in found.batches()] == [1, 2, 3]
    assert [entry.seq for entry in found.entries] == list(range(1, len(found.entries) + 1))


def test_a_log_read_behind_stale_listings_is_whole(store, proxy):
    proxy.fail("list", Stale(), times=float("inf"))
    first = CommitLog.take_over(store, "run", "start")
    for iteration in (1, 2, 3):
        first.commit_batch(batch(iteration))
    second = CommitLog.take_over(store, "run", "resume")
    assert (second.attempt, second.last_iteration) == (2, 3)
    with pytest.raises(FencedError):
        first.commit_batch(batch(4))


def test_listings_of_many_pages_are_whole_when_pages_fail(store, proxy, monkeypatch):
    keys = [f"run/{number:04d}" for number in range(1050)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda key: store_at(proxy.upstream, store).put(key, b""), keys))
    proxy.fail("list", cut)
    assert list(store.list("run/")) == keys
    assert proxy.seen["list"] == 3


def test_objects_that_vanish_between_refusal_and_reading_are_created(store, proxy):
    store.put("run/a", b"rival")

    def vanish(exchange):
        store_at(proxy.upstream, store).delete("run/a")
        exchange.reply(exchange.ask())

    proxy.fail("get", vanish)
    store.put("run/a", b"mine", if_absent=True)
    assert bytes(store.get("run/a")) == b"mine"


def test_wrong_credentials_are_told_without_them(store, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret-of-somebody")
    wrong = open_store(store.uri + "&region=us-west-2")  # another client, which reads the credentials anew
    with caplog.at_level("DEBUG", "steadyhelm"), pytest.raises(StoreError, match="SignatureDoesNotMatch") as raised:
        wrong.put("run/a", b"1")
    told = str(raised.value) + caplog.text
    assert "a-wrong-secret" not in told
    assert os.environ["AWS_ACCESS_KEY_ID"] not in told


def test_a_store_without_credentials_says_where_they_come_from(store, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(
        StoreError, match="there are no credentials: give right credentials in the environment, a profile"
    ):
        open_store(store.uri + "&region=us-west-1").exists("run/a")


def test_a_store_that_was_used_before_a_fork_works_in_the_child(store):
    store.put("run/a", b"1")
    with ON_FORK.Pool(1) as pool:
        assert pool.apply(S3Store.get_range, (store, "run/a", 0, 1)) == b"1"
        assert pool.apply(S3Store.exists, (open_store(store.uri), "run/a"))
    assert bytes(store.get("run/a")) == b"1"


def test_missing_objects_are_missing_also_behind_failures(store, proxy):
    proxy.fail("get", refuse(503, "SlowDown"), times=2)
    with pytest.raises(ObjectMissingError, match="run/none"):
        store.get("run/none")
    assert proxy.seen["get"] == 3
