import numpy as np
import pytest
from steadyhelm.algorithms.minibatches import minibatches


def test_the_order_is_a_fixed_function_of_seed_iteration_and_epoch():
    assert [chunk.tolist() for chunk in minibatches(8, 3, seed=0, iteration=1, epoch=0)] == [
        [3, 5, 6],
        [0, 7, 1],
        [4, 2],
    ]


def test_every_trajectory_comes_once_and_only_the_last_chunk_is_smaller():
    chunks = minibatches(130, 64, seed=5, iteration=7, epoch=1)
    assert [len(chunk) for chunk in chunks] == [64, 64, 2]
    assert sorted(np.concatenate(chunks).tolist()) == list(range(130))


@pytest.mark.parametrize("other", [(6, 7, 1), (5, 8, 1), (5, 7, 2)])
def test_another_seed_iteration_or_epoch_has_another_order(other):
    one = np.concatenate(minibatches(64, 64, 5, 7, 1))
    assert not np.array_equal(one, np.concatenate(minibatches(64, 64, *other)))


def test_no_trajectories_make_no_minibatch():
    assert minibatches(0, 4, 0, 1, 0) == []


def test_each_place_gets_each_trajectory_about_equally_often():
    counts = np.zeros((4, 4))
    for iteration in range(4000):
        counts[np.arange(4), minibatches(4, 4, 0, iteration, 0)[0]] += 1
    assert np.abs(counts - 1000).max() < 120  # 4.4 standard deviations


@pytest.mark.parametrize("wrong", [(-1, 4, 0, 1, 0), (4, 0, 0, 1, 0), (4, 4, -1, 1, 0)])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="must not be negative"):
        minibatches(*wrong)
