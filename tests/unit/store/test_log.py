import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from steadyhelm.data.types import BatchManifest, CheckpointRecord, PolicyVersion, WeightsRecord
from steadyhelm.errors import CorruptObjectError, DeadlineError, FencedError, HeldError, ObjectMissingError, StoreError
from steadyhelm.store import LocalStore
from steadyhelm.store.liveness import held
from steadyhelm.store.log import CommitLog, entry_bytes, make_entry
from steadyhelm.testing.memory_store import InjectedCrash, MemoryStore

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
ON_FORK = multiprocessing.get_context("fork")


def batch(iteration, outcome="trained"):
    policy = PolicyVersion(iteration=iteration - 1, attempt=1)
    return BatchManifest(iteration=iteration, policy=policy, shards=(), outcomes={f"0:{iteration}": outcome})


def weights(iteration, attempt, checksum="c"):
    version = PolicyVersion(iteration=iteration, attempt=attempt)
    return WeightsRecord(version=version, objects=(), checksum=checksum)


def checkpoint(iteration, attempt):
    return CheckpointRecord(version=PolicyVersion(iteration=iteration, attempt=attempt), objects=())


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "root")


def test_a_run_that_does_not_exist_has_an_empty_log(store):
    log = CommitLog.read(store, "run")
    assert (log.attempt, log.last_iteration, log.entries, log.checkpoint(), log.finished()) == (0, 0, (), None, None)
    assert log.latest("batch") is None


def test_entries_are_read_back_in_order(store):
    log = CommitLog.take_over(store, "run", "start")
    log.commit_weights(weights(0, 1))
    log.commit_batch(batch(1))
    log.commit_weights(weights(1, 1))
    log.commit_checkpoint(checkpoint(1, 1))
    log.append("eval", {"iteration": 1, "accuracy": 0.75})
    log.commit_batch(batch(2))
    log.finish({"iterations": 2})
    assert list(store.list("run/log/"))[0::6] == ["run/log/00000001", "run/log/00000007"]
    for found in (log, CommitLog.read(store, "run")):
        assert [entry.kind for entry in found.entries] == [
            "attempt",
            "weights",
            "batch",
            "weights",
            "checkpoint",
            "eval",
            "batch",
            "finished",
        ]
        assert found.attempt == 1
        assert found.batches() == (batch(1), batch(2))
        assert found.batches(after=1) == (batch(2),)
        assert found.last_iteration == 2
        assert found.weights(1) == weights(1, 1)
        assert found.weights(2) is None
        assert found.latest_weights() == weights(1, 1)
        assert found.checkpoint() == checkpoint(1, 1)
        assert found.finished() == {"iterations": 2, "model": []}
        assert found.latest("eval").payload == {"iteration": 1, "accuracy": 0.75}
        assert [entry.seq for entry in found.entries] == list(range(1, 9))
    assert log.entries == CommitLog.read(store, "run").entries


def test_a_view_reads_on(store):
    log = CommitLog.take_over(store, "run", "start")
    view = CommitLog.read(store, "run")
    log.commit_batch(batch(1))
    assert [entry.kind for entry in view.refresh()] == ["batch"]
    assert view.refresh() == ()
    assert view.last_iteration == 1


def test_a_stale_driver_is_fenced_off_and_told_by_whom(store):
    first = CommitLog.take_over(store, "run", "start")
    first.commit_batch(batch(1))
    second = CommitLog.take_over(store, "run", "resume")
    assert (first.attempt, second.attempt) == (1, 2)
    for _ in range(2):
        with pytest.raises(FencedError, match=rf"attempt 2.*pid {os.getpid()} on .*this is attempt 1"):
            first.commit_batch(batch(2))
    with pytest.raises(FencedError):
        first.check_fence()
    with pytest.raises(FencedError):
        first.renew("a rank was lost")
    second.check_fence()
    second.commit_batch(batch(2))
    assert CommitLog.read(store, "run").last_iteration == 2


def test_a_fenced_driver_says_what_its_user_can_do_and_names_existing_commands_only(store):
    first = CommitLog.take_over(store, "run", "start")
    CommitLog.take_over(store, "run", "resume")
    with pytest.raises(FencedError, match=r"under 'run/metrics/' show .* with --take-over takes") as raised:
        first.commit_batch(batch(1))
    assert "'steadyhelm" not in str(raised.value)


def test_a_stale_driver_that_reads_on_is_fenced_off_all_the_same(store):
    first = CommitLog.take_over(store, "run", "start")
    CommitLog.take_over(store, "run", "resume")
    first.refresh()
    with pytest.raises(FencedError, match="this is attempt 1"):
        first.commit_batch(batch(1))


def test_a_driver_that_is_stopped_and_woken_commits_nothing(tmp_path):
    """SIGSTOP between two commits, a take-over meanwhile, SIGCONT: the sleeper's next commit is refused."""
    answers = ON_FORK.SimpleQueue()

    def drive():
        log = CommitLog.take_over(LocalStore(tmp_path), "run", "start")
        for iteration in range(1, 10_000):
            try:
                log.commit_batch(batch(iteration, "dropped:first"))
            except FencedError as error:
                answers.put(str(error))
                return
            time.sleep(0.001)

    sleeper = ON_FORK.Process(target=drive)
    sleeper.start()
    store = LocalStore(tmp_path)
    deadline = time.monotonic() + 30
    while CommitLog.read(store, "run").last_iteration < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(sleeper.pid, signal.SIGSTOP)
    log = CommitLog.take_over(store, "run", "resume")
    first = log.last_iteration
    log.commit_batch(batch(first + 1, "dropped:second"))
    os.kill(sleeper.pid, signal.SIGCONT)
    assert "attempt 2" in answers.get()
    sleeper.join(30)
    outcomes = [next(iter(m.outcomes.values())) for m in CommitLog.read(store, "run").batches()]
    assert outcomes == ["dropped:first"] * first + ["dropped:second"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_passing_error_is_retried_and_commits_once(when):
    store = MemoryStore()
    log = CommitLog.take_over(store, "run", "start")
    for _ in range(3):
        store.fail("run/log/*", when=when, error=DeadlineError("the store did not answer"))
    log.commit_batch(batch(1))
    log.commit_batch(batch(2))
    assert [entry.kind for entry in CommitLog.read(store, "run").entries] == ["attempt", "batch", "batch"]


@pytest.mark.parametrize("error", [StoreError("unreachable"), InjectedCrash("dead")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_same_commit_made_again_after_a_lost_answer_counts_once(when, error):
    store = MemoryStore()
    log = CommitLog.take_over(store, "run", "start")
    store.fail("run/log/*", when=when, error=error)
    with pytest.raises(type(error)):
        log.commit_batch(batch(1))
    log.commit_batch(batch(1))
    log.commit_weights(weights(1, 1))
    assert [entry.kind for entry in CommitLog.read(store, "run").entries] == ["attempt", "batch", "weights"]


def test_another_commit_after_a_lost_answer_finds_the_first_one_in_place():
    store = MemoryStore()
    log = CommitLog.take_over(store, "run", "start")
    store.fail("run/log/*", when="after", error=StoreError("unreachable"))
    with pytest.raises(StoreError):
        log.commit_batch(batch(1))
    with pytest.raises(StoreError, match="batch of iteration 1 where the log expects 2"):
        log.commit_batch(batch(1, "dropped:other"))
    log.commit_batch(batch(2))
    assert CommitLog.read(store, "run").batches() == (batch(1), batch(2))


def test_a_renewal_whose_answer_was_lost_counts_once():
    store = MemoryStore()
    log = CommitLog.take_over(store, "run", "start")
    store.fail("run/log/*", when="after", error=StoreError("unreachable"))
    with pytest.raises(StoreError):
        log.renew("a rank was lost")
    assert log.attempt == 1
    assert log.renew("a rank was lost") == 2
    log.commit_batch(batch(1))
    assert [entry.attempt for entry in CommitLog.read(store, "run").entries] == [1, 2, 2]


def test_eight_racing_take_overs_become_eight_attempts_and_the_last_one_commits(store):
    barrier = threading.Barrier(8)

    def take_over(_):
        barrier.wait()
        return CommitLog.take_over(store, "run", "race")

    with ThreadPoolExecutor(8) as pool:
        logs = sorted(pool.map(take_over, range(8)), key=lambda log: log.attempt)
    assert [log.attempt for log in logs] == [1, 2, 3, 4, 5, 6, 7, 8]
    for log in logs[:-1]:
        with pytest.raises(FencedError):
            log.commit_batch(batch(1))
    logs[-1].commit_batch(batch(1))
    assert len(CommitLog.read(store, "run").entries) == 9


def test_each_iteration_has_one_batch_in_order(store):
    log = CommitLog.take_over(store, "run", "start")
    with pytest.raises(StoreError, match="iteration 2 where the log expects 1"):
        log.commit_batch(batch(2))
    log.commit_batch(batch(1))
    log = CommitLog.take_over(store, "run", "resume")
    assert log.batches() == (batch(1),)
    with pytest.raises(StoreError, match="iteration 1 where the log expects 2"):
        log.commit_batch(batch(1, "dropped:other"))
    with pytest.raises(StoreError, match="a checkpoint of iteration 2"):
        log.commit_checkpoint(checkpoint(2, 2))
    with pytest.raises(StoreError, match="weights of iteration 2"):
        log.commit_weights(weights(2, 2))
    log.commit_batch(batch(2))


def test_weights_of_a_new_attempt_end_the_lineage_of_the_old_ones(store):
    log = CommitLog.take_over(store, "run", "start")
    for iteration in (1, 2):
        log.commit_batch(batch(iteration))
        log.commit_weights(weights(iteration, 1))
    log.commit_weights(weights(2, 1))
    assert len(log.entries) == 5
    log = CommitLog.take_over(store, "run", "resume")
    assert log.weights(2) == weights(2, 1)
    log.commit_weights(weights(2, 2, "other"))
    for found in (log, CommitLog.read(store, "run")):
        assert found.weights(2) == weights(2, 2, "other")
        assert found.weights(1) is None


def test_a_version_is_published_with_one_content(store):
    log = CommitLog.take_over(store, "run", "start")
    log.commit_weights(weights(0, 1, "a"))
    with pytest.raises(StoreError, match=r"policy version 0\.1 with checksum b where the log expects checksum a"):
        log.commit_weights(weights(0, 1, "b"))
    assert log.renew("a rank was lost") == 2
    log.commit_weights(weights(0, 2, "b"))


def test_a_batch_behind_the_end_reopens_a_finished_run(store):
    log = CommitLog.take_over(store, "run", "start")
    log.commit_batch(batch(1))
    log.finish({"iterations": 1})
    log = CommitLog.take_over(store, "run", "longer")
    assert log.finished() == {"iterations": 1, "model": []}
    log.commit_batch(batch(2))
    assert log.finished() is None


@pytest.mark.parametrize("kind", ["attempt", "note", ""])
def test_other_kinds_are_refused(kind):
    log = CommitLog.take_over(MemoryStore(), "run", "start")
    with pytest.raises(StoreError, match="batch, checkpoint, eval, finished, run_file, weights"):
        log.append(kind, {})


@pytest.mark.parametrize("keep", [0, 1, 40, 250])
def test_a_torn_last_entry_is_void_and_the_next_attempt_says_so(keep):
    store = MemoryStore()
    log = CommitLog.take_over(store, "run", "start")
    log.commit_batch(batch(1))
    log.commit_batch(batch(2))
    store.damage("run/log/00000003", keep_bytes=keep)
    view = CommitLog.read(store, "run")
    assert (view.torn, view.last_iteration) == (3, 1)
    second = CommitLog.take_over(store, "run", "resume")
    assert second.entries[-1].seq == 4
    assert second.entries[-1].payload["voided"] == [3]
    second.commit_batch(batch(2, "dropped:again"))
    found = CommitLog.read(store, "run")
    assert found.torn is None
    assert found.batches() == (batch(1), batch(2, "dropped:again"))
    with pytest.raises(FencedError):
        log.commit_batch(batch(3))


def test_damage_before_the_end_is_an_error_not_a_void():
    store = MemoryStore()
    log = CommitLog.take_over(store, "run", "start")
    log.commit_batch(batch(1))
    log.commit_batch(batch(2))
    for bit in range(0, 8 * len(store.get("run/log/00000002")), 101):
        damaged = store.copy()
        damaged.damage("run/log/00000002", flip_bit=bit)
        with pytest.raises(CorruptObjectError, match=r"run/log/00000002.* later entries build on it"):
            CommitLog.read(damaged, "run")


def test_a_long_log_reads_like_a_short_one():
    store = MemoryStore()
    log = CommitLog.take_over(store, "run", "start")
    for iteration in range(1, 60):
        log.commit_batch(batch(iteration))
    assert CommitLog.read(store, "run").entries == log.entries
    torn, damaged, gapped = store.copy(), store.copy(), store.copy()
    torn.damage("run/log/00000060", keep_bytes=9)
    assert (CommitLog.read(torn, "run").torn, CommitLog.read(torn, "run").last_iteration) == (60, 58)
    damaged.damage("run/log/00000030", flip_bit=99)
    with pytest.raises(CorruptObjectError, match=r"run/log/00000030.* later entries build on it"):
        CommitLog.read(damaged, "run")
    gapped.delete("run/log/00000030")
    with pytest.raises(CorruptObjectError, match=r"run/log/00000030.*is missing"):
        CommitLog.read(gapped, "run")


def test_a_voided_entry_that_becomes_readable_again_is_an_error():
    store = MemoryStore()
    CommitLog.take_over(store, "run", "start").commit_batch(batch(1))
    whole = bytes(store.get("run/log/00000002"))
    store.damage("run/log/00000002", keep_bytes=5)
    CommitLog.take_over(store, "run", "resume")
    store.put("run/log/00000002", whole)
    with pytest.raises(CorruptObjectError, match="was replaced"):
        CommitLog.read(store, "run")


def test_a_missing_entry_is_an_error():
    store = MemoryStore()
    log = CommitLog.take_over(store, "run", "start")
    log.commit_batch(batch(1))
    log.commit_batch(batch(2))
    store.delete("run/log/00000002")
    with pytest.raises(CorruptObjectError, match=r"run/log/00000002.*is missing"):
        CommitLog.read(store, "run")


def test_an_entry_from_another_log_is_an_error():
    store, other = MemoryStore(), MemoryStore()
    for each in (store, other):
        log = CommitLog.take_over(each, "run", "start")
        log.commit_batch(batch(1))
    store.put("run/log/00000002", other.get("run/log/00000002"))
    with pytest.raises(CorruptObjectError, match="follows another entry"):
        CommitLog.read(store, "run")


def test_an_entry_of_a_later_version_is_never_taken_for_a_torn_one(monkeypatch):
    store = MemoryStore()
    CommitLog.take_over(store, "run", "start")
    body = json.loads(entry_bytes(make_entry(2, "novelty", 1, "n", "p", {})))
    store.put("run/log/00000002", json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(StoreError, match="kind 'novelty', which this version does not know"):
        CommitLog.take_over(store, "run", "resume")


def test_files_that_are_no_entries_do_not_disturb():
    store = MemoryStore()
    CommitLog.take_over(store, "run", "start")
    store.put("run/log/.nfs0001", b"x")
    assert CommitLog.take_over(store, "run", "resume").attempt == 2


def test_a_commit_flushes_the_objects_that_it_names():
    store = MemoryStore()
    log = CommitLog.take_over(store, "run", "start")
    ref = store.put("run/checkpoints/000000.1/a", b"1")
    record = CheckpointRecord(version=PolicyVersion(iteration=0, attempt=1), objects=(ref,))
    store.delete(ref.key)
    with pytest.raises(ObjectMissingError, match=ref.key):
        log.commit_checkpoint(record)
    assert log.checkpoint() is None
    store.put(ref.key, b"1")
    log.commit_checkpoint(record)
    assert log.checkpoint() == record


def test_a_second_driver_is_told_who_holds_the_run_unless_it_takes_over(tmp_path):
    store = LocalStore(tmp_path)
    ready, done = ON_FORK.Event(), ON_FORK.Event()

    def hold():
        with held(store, "run"):
            ready.set()
            done.wait(30)

    holder = ON_FORK.Process(target=hold)
    holder.start()
    assert ready.wait(30)
    with pytest.raises(HeldError, match=rf"pid {holder.pid} on .*--take-over"), held(store, "run"):
        pass
    with held(store, "run", take_over=True) as locked:
        assert not locked
    with held(store, "other") as locked:
        assert locked
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(30)
    with held(store, "run") as locked:
        assert locked
    assert list(store.list("")) == []
