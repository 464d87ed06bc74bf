import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from steadyhelm.config.run import Learner
from steadyhelm.services.learner.plan import deal, padded
from steadyhelm.services.learner.rates import learning_rate


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    world_size=st.integers(1, 5),
    micro_batch=st.integers(1, 7),
    data=st.data(),
)
def test_every_row_is_dealt_once_and_all_ranks_make_equally_many_passes(lengths, world_size, micro_batch, data):
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    dealt = deal(np.array(chosen), np.array(lengths), world_size, micro_batch)
    assert len(dealt) == world_size
    assert sorted(int(row) for rank in dealt for rows in rank for row in rows) == sorted(chosen)
    assert {len(rank) for rank in dealt} == {-(-len(chosen) // (world_size * micro_batch))}
    assert max(len(rows) for rank in dealt for rows in rank) <= micro_batch
    counts = [sum(len(rows) for rows in rank) for rank in dealt]
    assert max(counts) - min(counts) <= 1


def test_rows_of_like_length_share_a_micro_batch():
    lengths = np.array([9, 1, 8, 2, 7, 3])
    one = deal(np.arange(6), lengths, 1, 2)
    assert [rows.tolist() for rows in one[0]] == [[1, 3], [5, 4], [2, 0]]
    two = deal(np.arange(6), lengths, 2, 2)
    assert [[rows.tolist() for rows in rank] for rank in two] == [[[1, 5], [2]], [[3, 4], [0]]]


def test_an_empty_micro_batch_borrows_a_row_that_does_not_count():
    assert padded(np.array([], np.int64), 3, None) == ([3], [False])
    assert padded(np.array([4, 5]), 3, None) == ([4, 5], [True, True])


def test_a_micro_batch_without_images_borrows_one_where_each_needs_one():
    with_images = np.array([False, True, False])
    assert padded(np.array([0, 2]), 1, with_images) == ([0, 2, 1], [True, True, False])
    assert padded(np.array([0, 1]), 1, with_images) == ([0, 1], [True, True])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.8681980515, 0.55, 0.2318019485]),
    ],
)
def test_rates_by_hand(schedule, expected):
    learner = Learner(lr=1.0, schedule=schedule, warmup_steps=2, min_lr_ratio=0.1)
    assert [learning_rate(step, 6, learner) for step in range(6)] == pytest.approx(expected)


def test_steps_behind_the_plan_stay_at_the_lowest_rate():
    learner = Learner(lr=2.0, schedule="linear", min_lr_ratio=0.25)
    assert learning_rate(9, 6, learner) == 0.5
