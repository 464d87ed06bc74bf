import dataclasses

import numpy as np
import pytest
from steadyhelm.data.types import (
    BatchManifest,
    FinishReason,
    PolicyVersion,
    Prompt,
    PromptId,
    Rewards,
    ShardRecord,
    Trajectory,
)
from steadyhelm.errors import CorruptObjectError, DataError
from steadyhelm.services.learner.batch import read_batch
from steadyhelm.services.learner.targets import batch_metrics
from steadyhelm.store import open_store
from steadyhelm.store.codec import encode_reference, encode_rewards, encode_rollout
from steadyhelm.telemetry import metrics as names


def trajectory(number, length, finish=FinishReason.STOP, iteration=4):
    prompt = Prompt(
        prompt_id=PromptId(f"0:{number}"),
        group_id=f"0:{number // 2}",
        text="",
        images=(),
        label=1,
        swapped=False,
        seed=1,
    )
    return Trajectory(
        prompt=prompt,
        prompt_tokens=np.arange(3, dtype=np.int32),
        tokens=np.arange(length, dtype=np.int32),
        logprobs=np.full(length, -0.5, np.float32),
        versions=np.full(length, iteration, np.int32),
        attempt=1,
        finish=finish,
        completion_text="",
    )


ROWS = [
    trajectory(0, 2),
    trajectory(1, 4, FinishReason.LENGTH, iteration=3),
    trajectory(2, 3, FinishReason.ABORT),
    trajectory(3, 1),
]


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def put(store, rows=ROWS, totals=(2.0, 0.5, 1.0, np.nan), reference=None):
    count = len(totals)
    rewards = Rewards(
        total=np.array(totals, np.float32),
        valid=np.isfinite(totals),
        components={},
        detail=tuple({} for _ in range(count)),
    )
    shard = ShardRecord(
        shard=0,
        rollout=store.put("r/0.rollout", encode_rollout(rows)),
        prompt_ids=tuple(row.prompt.prompt_id for row in rows),
        num_tokens=10,
        min_version=3,
        max_version=4,
        attempt=1,
        reward=store.put("r/0.reward", encode_rewards(rewards)),
        reference=None if reference is None else store.put("r/0.reference", encode_reference(reference)),
    )
    return BatchManifest(iteration=5, policy=PolicyVersion(iteration=4, attempt=1), shards=(shard,), outcomes={})


def test_rows_count_where_they_are_scored_not_aborted_and_not_empty(store):
    batch = read_batch(store, put(store), with_rewards=True, with_reference=False)
    assert batch.valid.tolist() == [True, True, False, False]
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    assert batch.mask.sum(1).tolist() == [2, 4, 3, 1]
    assert batch.behaviour[0].tolist() == [-0.5, -0.5, 0.0, 0.0]
    assert batch.ages[1].tolist() == [1, 1, 1, 1]
    assert batch.ages[0].tolist() == [0, 0, 0, 0]
    assert batch.lengths.tolist() == [5, 7, 6, 4]
    assert batch.valid_rows(np.array([3, 1, 0])).tolist() == [1, 0]
    assert batch.reference is None


def test_rows_that_the_manifest_drops_do_not_count_and_their_age_does_not_either(store):
    manifest = put(store)
    kept = dataclasses.replace(manifest.shards[0], valid=(True, False, True, False))
    batch = read_batch(store, dataclasses.replace(manifest, shards=(kept,)), with_rewards=True, with_reference=False)
    assert batch.valid.tolist() == [True, False, False, False]
    assert batch_metrics(batch)[names.STALENESS_MAX] == 0.0
    all_of_them = read_batch(store, manifest, with_rewards=True, with_reference=False)
    assert batch_metrics(all_of_them)[names.STALENESS_MEAN] == pytest.approx(4 / 6)


def test_traces_need_no_rewards(store):
    manifest = put(store)
    bare = dataclasses.replace(manifest, shards=(dataclasses.replace(manifest.shards[0], reward=None),))
    batch = read_batch(store, bare, with_rewards=False, with_reference=False)
    assert batch.valid.tolist() == [True, True, False, True]
    with pytest.raises(DataError, match=r"r/0\.rollout has no reward object"):
        read_batch(store, bare, with_rewards=True, with_reference=False)


def test_reference_log_probs_stand_at_their_tokens(store):
    reference = [np.full(len(row.tokens), -float(n + 1), np.float32) for n, row in enumerate(ROWS)]
    batch = read_batch(store, put(store, reference=reference), with_rewards=True, with_reference=True)
    assert batch.reference[1].tolist() == [-2.0, -2.0, -2.0, -2.0]
    assert batch.reference[3].tolist() == [-4.0, 0.0, 0.0, 0.0]


def test_parts_that_do_not_fit_are_refused(store):
    with pytest.raises(DataError, match="4 trajectories but 3 rewards"):
        read_batch(store, put(store, totals=(1.0, 1.0, 1.0)), with_rewards=True, with_reference=False)
    short = [np.zeros(1, np.float32)] * 4
    with pytest.raises(DataError, match="0:0 has 2 tokens but 1 reference log-probs"):
        read_batch(store, put(store, reference=short), with_rewards=True, with_reference=True)
    with pytest.raises(DataError, match="has no reference object"):
        read_batch(store, put(store), with_rewards=True, with_reference=True)


def test_a_shard_that_is_not_the_manifests_is_never_trained_on(store):
    manifest = put(store)
    data = bytearray(store.get("r/0.rollout"))
    data[len(data) // 2] ^= 4
    store.put("r/0.rollout", bytes(data))
    with pytest.raises(CorruptObjectError):
        read_batch(store, manifest, with_rewards=True, with_reference=False)
