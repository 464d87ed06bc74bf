"""What a run asks of its S3 store: the probe, the lease, processes that open it by its URI, a loop that resumes."""

import json
import subprocess
import sys

import pytest
from steadyhelm import driver
from steadyhelm.config import RunFile
from steadyhelm.errors import FatalError, StoreError
from steadyhelm.loop import IterationReport, Loop, Services
from steadyhelm.store import ObjectStore, open_run, open_store, run_uri
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.liveness import held
from steadyhelm.store.log import CommitLog
from steadyhelm.store.probe import require_one_winner
from steadyhelm.telemetry import MetricsLog
from steadyhelm.telemetry import metrics as names
from steadyhelm.testing.fake_services import FakeLearner, FakePrompts, FakeReward, FakeRollout
from steadyhelm.testing.memory_store import MemoryStore
from steadyhelm.testing.s3_server import make_bucket, s3_server
from steadyhelm.watch import Watcher

from tests.store.faults import fault_proxy, lose, pretend, refuse, reset

pytestmark = pytest.mark.store
RUN = RunFile.model_validate(
    {
        "name": "fake",
        "model": {"path": "unused"},
        "data": {"train": "unused.py:pairs"},
        "rollout": {"engine": {"type": "transformers", "batch": 4}},
        "learner": {"train_batch": 4},
        "schedule": {"iterations": 4, "prompts_per_iteration": 8, "checkpoint_every": 2},
    }
)


def test_a_server_that_keeps_its_word_passes_the_probe_and_keeps_nothing_of_it(s3_uri):
    store = open_store(s3_uri)
    require_one_winner(store, "run")
    assert list(store.list("")) == []


def test_a_server_that_loses_races_is_refused(versitygw, s3_endpoint, tmp_path):
    """Versitygw as it comes; in one of two races it lets several win, and a probe has twenty."""
    with s3_server(versitygw, tmp_path / "buckets") as endpoint:
        make_bucket(endpoint, "racy")
        with pytest.raises(StoreError, match=r"[2-8] of 8 writers created the same object.*--concurrency 1"):
            require_one_winner(open_store(f"s3://racy?endpoint={endpoint}"), "run")


def test_a_server_that_does_not_know_the_condition_is_refused(s3_endpoint, s3_bucket):
    with fault_proxy(s3_endpoint) as proxy:
        proxy.fail("create", pretend, times=float("inf"))
        store = open_store(f"s3://{s3_bucket}/ignorant?endpoint={proxy.endpoint}")
        with pytest.raises(StoreError, match="8 of 8 writers created the same object"):
            require_one_winner(store, "run")
        assert proxy.seen["create"] == 8
        assert list(store.list("")) == []


def test_a_second_driver_is_told_who_holds_the_run(s3_uri):
    store = open_store(s3_uri)
    with held(store, "run") as locked:
        assert locked
        with pytest.raises(FatalError, match=r"another driver is running run 'run'"), held(open_store(s3_uri), "run"):
            pass
    assert list(store.list("")) == []


def test_a_run_is_watched_out_of_its_bucket_alone_and_a_lease_shows_its_driver(s3_uri):
    log = driver.take_over(RUN, open_store(s3_uri), "fake", False)
    watcher = Watcher(*open_run(run_uri(open_store(s3_uri), "fake")))
    assert watcher.sure().drive == "driven by nobody"
    with held(open_store(s3_uri), "fake"):
        lines = MetricsLog(open_store(s3_uri).put, "fake/metrics", log.attempt)
        lines.append(1, {"reward/mean": 0.5}, notes=["engines 1 → 2"])
        lines.flush()
        status = watcher.sure()
        assert status.drive.startswith("driven by pid ")
    assert (status.metrics_of, status.metrics, status.notes) == (1, {"reward/mean": 0.5}, ((1, "engines 1 → 2"),))
    assert watcher.sure().drive == "driven by nobody"


def test_any_process_opens_the_store_by_its_uri_from_any_folder(s3_uri, tmp_path):
    store = open_store(s3_uri)
    store.put("run/a", b"from one process")
    script = "import sys; from steadyhelm.store import open_store; print(bytes(open_store(sys.argv[1]).get('run/a')))"
    done = subprocess.run([sys.executable, "-c", script, store.uri], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "b'from one process'\n", done.stderr
    again, run = open_run(run_uri(store, "digits"))
    assert (again.uri, run) == (store.uri, "digits")


def make(store: ObjectStore) -> tuple[Loop, FakeLearner]:
    learner = FakeLearner(store=store)
    services = Services(
        prompts=FakePrompts(run=RUN), rollout=FakeRollout(store=store), learner=learner, reward=FakeReward(store=store)
    )
    log = CommitLog.take_over(store, RUN.name, "test")
    return Loop(services, log, RunLayout(RUN.name), RUN, lambda event: None), learner


async def drive(store: ObjectStore, reports: list[IterationReport], stop_behind: int = 0) -> FakeLearner:
    loop, learner = make(store)
    async for report in loop.iterations():
        reports.append(report)
        if stop_behind and report.iteration == stop_behind:
            break
    return learner


def exact(reports: list[IterationReport]) -> dict[int, dict[str, float]]:
    return {r.iteration: names.exact(r.metrics) for r in reports if r.metrics}


async def test_a_loop_on_a_failing_server_resumes_with_the_numbers_of_an_undisturbed_one(s3_endpoint, s3_bucket):
    undisturbed: list[IterationReport] = []
    expected = await drive(MemoryStore(), undisturbed)
    with fault_proxy(s3_endpoint) as proxy:
        for fault in (refuse(503, "SlowDown"), lose, reset):
            proxy.fail("*", fault, times=float("inf"), chance=0.05)
        store = open_store(f"s3://{s3_bucket}/loop-{id(proxy)}?endpoint={proxy.endpoint}&timeout_s=5")
        disturbed: list[IterationReport] = []
        await drive(store, disturbed, stop_behind=3)
        learner = await drive(store, disturbed)
        assert CommitLog.read(store, RUN.name).last_iteration == 4
    assert exact(disturbed) == exact(undisturbed)
    assert (learner.number, learner.applied) == (expected.number, expected.applied)


def test_a_run_on_a_server_without_the_condition_is_refused_before_it_writes(s3_endpoint, s3_bucket, tmp_path):
    with fault_proxy(s3_endpoint) as proxy:
        proxy.fail("create", pretend, times=float("inf"))
        uri = f"s3://{s3_bucket}/refused?endpoint={proxy.endpoint}"
        model = {"factory": "task.py:build"}
        run = RunFile.model_validate(RUN.model_dump() | {"model": model, "store": {"uri": uri}})
        with pytest.raises(StoreError, match="8 of 8 writers created the same object"):
            driver.run(run, tmp_path, driver.RunOptions(), lambda _: None)
        assert list(open_store(uri).list("")) == []


def new_run(store: ObjectStore) -> str:
    record = {"format": 1, "steadyhelm": "0", "run": RUN.model_dump(mode="json")}
    store.put("fake/run.json", json.dumps(record).encode())
    return run_uri(store, "fake")


async def test_the_command_line_cleans_up_a_run(s3_uri):
    store = open_store(s3_uri)
    place = new_run(store)
    await drive(store, [])
    listed, done, again = (steadyhelm("gc", place, *more) for more in (["--dry-run"], [], []))
    assert listed.stdout.splitlines()[-1] == "would delete 3 objects"
    assert done.stdout.splitlines()[:-1] == listed.stdout.splitlines()[:-1]
    assert again.stdout == "deleted 0 objects\n"
    assert {key.split("/")[2] for key in store.list("fake/weights/")} == {"000003.1", "000004.1"}


def test_the_command_line_builds_a_report(s3_uri):
    store = open_store(s3_uri)
    place = new_run(store)
    CommitLog.take_over(store, "fake", "start")
    assert steadyhelm("report", place).stdout == f"wrote fake/report/report.html in {store.uri}\n"
    assert b"<html" in bytes(store.get("fake/report/report.html"))


def steadyhelm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "steadyhelm.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done
