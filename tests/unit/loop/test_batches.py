"""What a batch says of its shards: metrics as if it had been one shard."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from steadyhelm.batches import merge
from steadyhelm.data.types import Rewards
from steadyhelm.services.reward import _metrics
from steadyhelm.telemetry import metrics as names


def shard(*totals: float | None) -> Rewards:
    """A scored shard; None is an unscored sample."""
    total = np.array([np.nan if value is None else value for value in totals], dtype=np.float32)
    return Rewards(total=total, valid=np.isfinite(total), components={"choice": total / 2}, detail=({},) * len(totals))


def merged(*shards: Rewards) -> dict[str, float]:
    return merge(
        [_metrics(part) for part in shards],
        samples=[len(part.total) for part in shards],
        scored=[int(part.valid.sum()) for part in shards],
    )


def test_a_shard_with_few_valid_samples_counts_by_those_alone():
    metrics = merged(shard(2.0, None, None, None), shard(0.5, 0.5, 0.5, 0.5))
    assert metrics[names.REWARD_MEAN] == pytest.approx(0.8)
    assert metrics[names.REWARD_CHOICE] == pytest.approx(0.4)
    assert metrics[names.REWARD_STD] == pytest.approx(0.6)
    assert metrics[names.REWARD_VALID_RATE] == pytest.approx(5 / 8)


def test_the_deviation_between_shards_is_part_of_the_deviation():
    metrics = merged(shard(2.0, 2.0, 2.0, 2.0), shard(0.5, 0.5, 0.5, 0.5))
    assert metrics[names.REWARD_STD] == pytest.approx(0.75)


def test_a_shard_without_a_valid_sample_says_nothing_of_the_reward():
    metrics = merged(shard(None, None), shard(1.0, 3.0))
    assert (metrics[names.REWARD_MEAN], metrics[names.REWARD_STD]) == (2.0, 1.0)
    assert metrics[names.REWARD_VALID_RATE] == 0.5


@given(st.lists(st.lists(st.none() | st.floats(-4, 4, width=32), min_size=1, max_size=5), min_size=1, max_size=5))
def test_however_a_batch_is_cut_into_shards_its_reward_is_the_same(parts):
    found, whole = merged(*(shard(*part) for part in parts)), _metrics(shard(*(v for part in parts for v in part)))
    for name in (names.REWARD_MEAN, names.REWARD_STD, names.REWARD_CHOICE, names.REWARD_VALID_RATE):
        assert found.get(name, np.nan) == pytest.approx(whole.get(name, np.nan), rel=1e-9, abs=1e-9, nan_ok=True), name


def test_lengths_and_counts_are_over_all_samples():
    parts = [
        {"rollout/length_mean": 10.0, "rollout/length_max": 12.0, "rollout/tokens": 30.0},
        {"rollout/length_mean": 20.0, "rollout/length_max": 20.0, "rollout/tokens": 20.0},
    ]
    assert merge(parts, samples=[3, 1], scored=[0, 1]) == {
        "rollout/length_mean": 12.5,
        "rollout/length_max": 20.0,
        "rollout/tokens": 50.0,
    }
