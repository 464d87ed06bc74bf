"""Clean-up of runs: histories that real loops make, broken off anywhere; what is left goes on as if untouched."""

import contextlib
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steadyhelm.config import RunFile
from steadyhelm.data.types import BatchManifest, CheckpointRecord, ObjectRef, PolicyVersion, ShardRecord, WeightsRecord
from steadyhelm.errors import ConfigError, FatalError, ObjectMissingError
from steadyhelm.loop import IterationReport, Loop, Services
from steadyhelm.store import LocalStore, ObjectStore
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.lease import leased
from steadyhelm.store.liveness import held
from steadyhelm.store.log import CommitLog, LogView
from steadyhelm.store.records import object_refs
from steadyhelm.store.retention import REPLACED, Keep, collect, remove, unneeded
from steadyhelm.telemetry import metrics as names
from steadyhelm.testing.fake_services import FakeLearner, FakePrompts, FakeReward, FakeRollout
from steadyhelm.testing.memory_store import InjectedCrash, MemoryStore

RUN = RunFile.model_validate(
    {
        "name": "fake",
        "model": {"path": "unused"},
        "data": {"train": "unused.py:pairs"},
        "rollout": {"engine": {"type": "transformers", "batch": 2}},
        "learner": {"train_batch": 4},
        "schedule": {"iterations": 5, "prompts_per_iteration": 4, "checkpoint_every": 2},
    }
)
KEEP = Keep(checkpoints=1, weights=1)


def silent(_: object) -> None:
    pass


async def drive(store: ObjectStore, reports: list[IterationReport], run: RunFile = RUN) -> FakeLearner:
    learner = FakeLearner(store=store)
    services = Services(
        prompts=FakePrompts(run=run), rollout=FakeRollout(store=store), learner=learner, reward=FakeReward(store=store)
    )
    loop = Loop(services, CommitLog.take_over(store, run.name, "test"), RunLayout(run.name), run, silent)
    async for report in loop.iterations():
        reports.append(report)
    return learner


def exact(reports: list[IterationReport]) -> dict[int, dict[str, float]]:
    return {r.iteration: names.exact(r.metrics) for r in reports if r.metrics}


def tidy(store: ObjectStore) -> None:
    remove(store, unneeded(store, LogView(store, RUN.name), KEEP))


@settings(max_examples=60, deadline=None)
@given(
    crashes=st.lists(st.tuples(st.integers(1, 12), st.sampled_from(["before", "after"])), max_size=5),
    staleness=st.sampled_from([0, 2]),
)
async def test_a_run_that_is_broken_off_anywhere_and_tidied_up_goes_on_as_if_nothing_was(crashes, staleness):
    run = RUN.model_copy(update={"schedule": RUN.schedule.model_copy(update={"max_staleness": staleness})})
    undisturbed: list[IterationReport] = []
    expected = await drive(MemoryStore(), undisturbed, run)
    store, disturbed = MemoryStore(), []
    for nth, when in crashes:
        store = store.copy()
        store.fail("*", nth=nth, when=when)
        with contextlib.suppress(InjectedCrash):
            await drive(store, disturbed, run)
        tidy(store)
    learner = await drive(store.copy(), disturbed, run)
    if staleness == 0:  # beyond that the moment at which weights arrive decides what is sampled
        assert exact(disturbed) == exact(undisturbed)
        assert learner.number == expected.number
    assert sorted(learner.applied) == sorted(expected.applied)
    assert len(set(learner.applied)) == 20


async def test_after_a_clean_up_everything_that_is_needed_is_there_and_little_else():
    store = MemoryStore()
    await drive(store, [])
    CommitLog.take_over(store, "fake", "again")
    before = set(store.list(""))
    tidy(store)
    log = LogView(store, "fake")
    needed = {ref.key for manifest in log.batches() for ref in object_refs(manifest)}
    needed |= {ref.key for ref in log.checkpoint().objects} | {ref.key for ref in log.latest_weights().objects}
    needed |= set(store.list("fake/log/"))
    assert set(store.list("")) == needed
    assert {key.rsplit("/", 1)[0] for key in before - needed} == {
        "fake/checkpoints/000002.1",
        "fake/checkpoints/000004.1",
        *(f"fake/weights/00000{iteration}.1" for iteration in range(5)),
    }
    tidy(store)
    assert set(store.list("")) == needed


def put(store: ObjectStore, key: str) -> ObjectRef:
    return store.put(key, key.encode())


def weights(store: ObjectStore, iteration: int, attempt: int, base: PolicyVersion | None = None) -> WeightsRecord:
    version = PolicyVersion(iteration=iteration, attempt=attempt)
    ref = put(store, f"{RunLayout('fake').weights(version)}/part-0000")
    return WeightsRecord(version=version, objects=(ref,), checksum=str(version), base=base)


def batch(store: ObjectStore, iteration: int, attempt: int) -> BatchManifest:
    layout = RunLayout("fake")
    shard = ShardRecord(
        shard=0,
        rollout=put(store, layout.shard(iteration, attempt, 0, "rollout")),
        reward=put(store, layout.shard(iteration, attempt, 0, "reward")),
        reference=put(store, layout.shard(iteration, attempt, 0, "reference")),
        prompt_ids=(f"0:{iteration}",),
        num_tokens=1,
        min_version=0,
        max_version=0,
        attempt=1,
        valid=(False,),
    )
    policy = PolicyVersion(iteration=iteration - 1, attempt=attempt)
    return BatchManifest(iteration=iteration, policy=policy, shards=(shard,), outcomes={f"0:{iteration}": "dropped:x"})


def checkpoint(store: ObjectStore, iteration: int, attempt: int) -> CheckpointRecord:
    version = PolicyVersion(iteration=iteration, attempt=attempt)
    return CheckpointRecord(
        version=version, objects=(put(store, f"{RunLayout('fake').checkpoint(version)}/state.json"),)
    )


@pytest.fixture
def store() -> MemoryStore:
    found = MemoryStore()
    found.put("fake/run.json", json.dumps({"format": 1, "run": RUN.model_dump(mode="json")}).encode())
    return found


def gone(store: ObjectStore, keep: Keep = KEEP) -> dict[str, str]:
    found = unneeded(store, LogView(store, "fake"), keep)
    return {item.key.removeprefix("fake/"): item.why for item in found}


def test_deltas_keep_what_they_stand_on_back_to_the_anchor(store):
    log = CommitLog.take_over(store, "fake", "start")
    anchors = {1: None, 2: 1, 3: None, 4: 3, 5: 4}
    for iteration, base in anchors.items():
        log.commit_batch(batch(store, iteration, 1))
        version = None if base is None else PolicyVersion(iteration=base, attempt=1)
        log.commit_weights(weights(store, iteration, 1, version))
    replaced = "replaced by newer weights"
    assert gone(store) == {"weights/000001.1/part-0000": replaced, "weights/000002.1/part-0000": replaced}
    assert gone(store, Keep(checkpoints=1, weights=4)) == {}


def test_weights_of_a_dead_lineage_go_and_a_base_in_another_attempt_stays(store):
    log = CommitLog.take_over(store, "fake", "start")
    for iteration in (1, 2):
        log.commit_batch(batch(store, iteration, 1))
        log.commit_weights(weights(store, iteration, 1))
    log = CommitLog.take_over(store, "fake", "resume")
    log.commit_weights(weights(store, 2, 2, PolicyVersion(iteration=1, attempt=1)))
    assert gone(store) == {"weights/000002.1/part-0000": "replaced by newer weights"}


def test_what_an_attempt_left_uncommitted_goes_once_nobody_can_commit_it(store):
    log = CommitLog.take_over(store, "fake", "start")
    log.commit_batch(batch(store, 1, 1))
    for key in ("batches/000001/1-0007.rollout", "batches/000002/1-0000.rollout", "weights/000001.1/part-0000"):
        put(store, f"fake/{key}")
    put(store, "fake/checkpoints/000001.1/state.json")
    put(store, "fake/eval/000001/1-0000.rollout")
    aside = {"batches/000001/1-0007.rollout": "not in the batch of iteration 1"}
    assert gone(store) == aside
    log = CommitLog.take_over(store, "fake", "resume")
    left = "left by attempt 1, which was taken over"
    aside |= dict.fromkeys(
        ("checkpoints/000001.1/state.json", "weights/000001.1/part-0000", "eval/000001/1-0000.rollout"), left
    )
    assert gone(store) == aside
    log.commit_batch(batch(store, 2, 2))
    assert gone(store) == aside | {"batches/000002/1-0000.rollout": "not in the batch of iteration 2"}


def test_committed_evaluations_stay(store):
    log = CommitLog.take_over(store, "fake", "start")
    put(store, "fake/eval/000000/1-0000.rollout")
    log.append("eval", {"iteration": 0, "attempt": 1, "metrics": {}})
    CommitLog.take_over(store, "fake", "resume")
    assert gone(store) == {}


def test_the_newest_checkpoints_stay_also_where_one_is_committed_again(store):
    log = CommitLog.take_over(store, "fake", "start")
    for iteration in (1, 2, 3):
        log.commit_batch(batch(store, iteration, 1))
        log.commit_checkpoint(checkpoint(store, iteration, 1))
    log.commit_checkpoint(checkpoint(store, 1, 1))
    why = "replaced by newer checkpoints"
    assert gone(store, Keep(checkpoints=2, weights=1)) == {"checkpoints/000002.1/state.json": why}
    assert gone(store, Keep(checkpoints=0, weights=1)) == {}


def test_nothing_goes_while_what_a_resume_needs_is_not_all_there(store):
    log = CommitLog.take_over(store, "fake", "start")
    for iteration in (1, 2):
        log.commit_batch(batch(store, iteration, 1))
        log.commit_checkpoint(checkpoint(store, iteration, 1))
    store.delete("fake/checkpoints/000002.1/state.json")
    before = list(store.list(""))
    with pytest.raises(ObjectMissingError, match=r"checkpoints/000002\.1"):
        tidy(store)
    assert list(store.list("")) == before


def test_names_of_another_origin_and_shared_images_stay(store):
    CommitLog.take_over(store, "fake", "start")
    CommitLog.take_over(store, "fake", "resume")
    kept = ["batches/notes.txt", "weights/mine/part", "eval/x", "metrics/1-0.jsonl", "model/a", "start/a", "report/r"]
    for key in kept:
        put(store, f"fake/{key}")
    put(store, "images/" + "0" * 64)
    put(store, "other/weights/000001.1/part-0000")
    put(store, "fake/probe/x/0")
    assert gone(store) == {"probe/x/0": "left by a race at a start"}


def test_a_run_in_progress_looks_only_where_much_is_left_behind(store):
    log = CommitLog.take_over(store, "fake", "start")
    for iteration in (1, 2):
        log.commit_batch(batch(store, iteration, 1))
        log.commit_weights(weights(store, iteration, 1))
    put(store, "fake/batches/000001/1-0007.rollout")
    found = [item.key for item in unneeded(store, log, KEEP, REPLACED)]
    assert found == ["fake/weights/000001.1/part-0000"]


def test_a_clean_up_lists_deletes_and_leaves_a_driven_run_alone(tmp_path):
    store = LocalStore(tmp_path)
    store.put("fake/run.json", json.dumps({"format": 1, "run": RUN.model_dump(mode="json")}).encode())
    log = CommitLog.take_over(store, "fake", "start")
    for iteration in range(1, 5):
        log.commit_batch(batch(store, iteration, 1))
        log.commit_weights(weights(store, iteration, 1))
    before = list(store.list(""))
    gc = [sys.executable, "-m", "steadyhelm.cli", "gc", str(tmp_path / "fake")]
    with held(store, "fake"):
        refused = subprocess.run(gc, capture_output=True, text=True, timeout=60)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "another driver is running run 'fake'" in refused.stderr
        listed = subprocess.run([*gc, "--dry-run"], capture_output=True, text=True, timeout=60)
    assert list(store.list("")) == before
    lines = [f"fake/weights/00000{n}.1/part-0000  replaced by newer weights" for n in (1, 2)]
    assert listed.stdout.splitlines() == [*lines, "would delete 2 objects"]
    done = subprocess.run(gc, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.splitlines()) == (0, [*lines, "deleted 2 objects"])
    assert [key for key in before if not store.exists(key)] == [line.split()[0] for line in lines]


def test_a_driver_with_a_lease_keeps_a_clean_up_away(store):
    CommitLog.take_over(store, "fake", "start")
    driver = leased(store, "fake", take_over=False, tell=silent, renew_s=0.01)
    with driver, pytest.raises(FatalError, match="another driver is running"):
        collect(store, "fake", silent)


def test_a_run_that_does_not_exist_is_told(store):
    with pytest.raises(ConfigError, match="there is no run 'other'"):
        collect(store, "other", silent, dry_run=True)
