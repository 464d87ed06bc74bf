import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steadyhelm.algorithms.advantages import (
    discounted_returns,
    dr_grpo,
    grpo,
    moments,
    normalize,
    rloo,
    token_rewards,
)

NAN = math.nan


def returns(reward, kl, beta, gamma=1.0):
    mask = torch.ones(1, len(kl), dtype=torch.bool)
    rewards = token_rewards(torch.tensor([reward]), torch.tensor([kl]), mask, beta=beta, clip=10.0)
    return discounted_returns(rewards, mask, gamma)[0].tolist()


@pytest.mark.parametrize(
    ("beta", "gamma", "expected"),
    [
        (0.0, 1.0, [2.0, 2.0, 2.0, 2.0]),
        (0.1, 1.0, [1.94, 1.95, 1.93, 1.96]),
        (0.1, 0.9, [1.41254, 1.5806, 1.734, 1.96]),
    ],
)
def test_returns_of_the_worked_example(beta, gamma, expected):
    assert returns(2.0, [0.1, -0.2, 0.3, 0.4], beta, gamma) == pytest.approx(expected, abs=1e-6)


def test_rewards_are_clamped_on_both_sides():
    mask = torch.ones(3, 1, dtype=torch.bool)
    rewards = token_rewards(torch.tensor([12.0, -11.0, 3.0]), None, mask, beta=0.0, clip=10.0)
    assert rewards.tolist() == [[10.0], [-10.0], [3.0]]


def test_the_reward_lands_on_the_last_token_whatever_the_padding():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    rewards = token_rewards(torch.ones(4), None, mask, beta=0.0, clip=10.0)
    assert rewards.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_positions_outside_the_mask_cost_no_discount():
    mask = torch.tensor([[True, False, False, True]])
    result = discounted_returns(torch.tensor([[0.0, NAN, 5.0, 1.0]]), mask, 0.5)
    assert result.tolist() == [[0.5, 0.0, 0.0, 1.0]]


def test_batches_without_any_token_give_empty_tensors():
    mask = torch.zeros(2, 0, dtype=torch.bool)
    valid = torch.ones(2, dtype=torch.bool)
    rewards = token_rewards(torch.ones(2), None, mask, beta=0.0, clip=10.0)
    assert discounted_returns(rewards, mask, 1.0).shape == (2, 0)
    assert discounted_returns(rewards, mask, 0.9).shape == (2, 0)
    for weighting in ("token", "sequence"):
        of = moments(rewards, mask, valid, weighting=weighting)
        assert (of.mean.item(), of.std.item(), of.count.item()) == (0.0, 0.0, 0.0)
        assert normalize(rewards, of, mask, valid).shape == (2, 0)


def test_moments_weighted_by_token_and_by_sequence():
    # one sequence of three tokens 1.0, one of one token 5.0
    values = torch.tensor([[1.0, 1.0, 1.0], [5.0, NAN, NAN]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    valid = torch.tensor([True, True])
    by_token = moments(values, mask, valid, weighting="token")
    by_sequence = moments(values, mask, valid, weighting="sequence")
    assert (by_token.mean.item(), by_token.std.item(), by_token.count.item()) == pytest.approx((2.0, math.sqrt(3), 4))
    assert (by_sequence.mean.item(), by_sequence.std.item(), by_sequence.count.item()) == pytest.approx((3.0, 2.0, 2))


def test_a_sequence_counts_by_the_mean_of_its_tokens_where_sequences_count_once():
    values = torch.tensor([[1.0, 3.0], [4.0, 0.0]])
    mask = torch.tensor([[1, 1], [1, 0]], dtype=torch.bool)
    of = moments(values, mask, torch.tensor([True, True]), weighting="sequence")
    assert of.mean.item() == pytest.approx(3.0)
    assert of.std.item() == pytest.approx(math.sqrt(1.5))  # ((4 + 0)/2 + 1)/2


def test_unscored_sequences_leave_the_statistics_though_they_hold_nan():
    values = torch.tensor([[1.0], [NAN], [3.0]])
    mask = torch.ones(3, 1, dtype=torch.bool)
    valid = torch.tensor([True, False, True])
    of = moments(values, mask, valid)
    assert (of.mean.item(), of.std.item(), of.count.item()) == (2.0, 1.0, 2.0)
    assert normalize(values, of, mask, valid).flatten().tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-7)


def test_both_passes_keep_digits_that_a_sum_of_squares_would_lose():
    values = torch.tensor([[1e8 + 1], [1e8 + 3]], dtype=torch.float64)
    of = moments(values, torch.ones(2, 1, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    assert (of.mean.item(), of.std.item()) == (1e8 + 2, 1.0)


def test_the_released_normalisation_bounds_the_variance_and_adds_epsilon_to_the_result():
    # sigma = 5e-5, so sigma² = 2.5e-9 is below the bound of 1e-8
    values = torch.tensor([[1.0 - 5e-5], [1.0 + 5e-5]], dtype=torch.float64)
    mask, valid = torch.ones(2, 1, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    of = moments(values, mask, valid)
    release = normalize(values, of, mask, valid, mode="release").flatten().tolist()
    assert release == pytest.approx([-0.5 + 1e-8, 0.5 + 1e-8], abs=1e-10)
    paper = normalize(values, of, mask, valid, mode="paper").flatten().tolist()
    assert paper == pytest.approx([-0.99980004, 0.99980004], abs=1e-8)


@pytest.mark.parametrize("mode", ["paper", "release"])
@pytest.mark.parametrize(("base", "spread", "flat"), [(1.0, 0.9e-6, True), (1.0, 1.1e-6, False), (50.0, 45e-6, True)])
def test_a_deviation_of_rounding_size_makes_all_advantages_zero(mode, base, spread, flat):
    values = torch.tensor([[base - spread], [base + spread]], dtype=torch.float64)
    mask, valid = torch.ones(2, 1, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    z = normalize(values, moments(values, mask, valid), mask, valid, mode=mode)
    assert (z == 0).all().item() == flat


def test_equal_rewards_give_no_advantage():
    values = torch.full((7, 3), 0.1)
    mask, valid = torch.ones(7, 3, dtype=torch.bool), torch.ones(7, dtype=torch.bool)
    assert normalize(values, moments(values, mask, valid), mask, valid).abs().max().item() == 0.0


def test_grouped_advantages_of_two_interleaved_groups():
    rewards = torch.tensor([1.0, 10.0, 2.0, 10.0, 6.0])
    groups = torch.tensor([7, 3, 7, 3, 7])
    valid = torch.ones(5, dtype=torch.bool)
    # group 7: 1, 2, 6, mean 3, sample variance 7; group 3: no spread
    root = math.sqrt(7)
    assert grpo(rewards, groups, valid).tolist() == pytest.approx([-2 / root, 0, -1 / root, 0, 3 / root], abs=1e-7)
    assert dr_grpo(rewards, groups, valid).tolist() == pytest.approx([-2, 0, -1, 0, 3])
    assert rloo(rewards, groups, valid).tolist() == pytest.approx([-3, 0, -1.5, 0, 4.5])


def test_one_right_sample_of_eight_has_the_largest_grpo_advantage_that_eight_allow():
    rewards = torch.tensor([1.0] + [0.0] * 7)
    result = grpo(rewards, torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.bool))
    assert result[0].item() == pytest.approx(7 / math.sqrt(8), abs=1e-6)  # 2.4748737
    assert result[1].item() == pytest.approx(-1 / math.sqrt(8), abs=1e-6)


@pytest.mark.parametrize("rule", [grpo, dr_grpo, rloo])
def test_unscored_samples_leave_their_group_though_they_hold_nan(rule):
    groups = torch.zeros(4, dtype=torch.long)
    valid = torch.tensor([True, False, True, True])
    some = rule(torch.tensor([1.0, NAN, 2.0, 6.0]), groups, valid)
    without = rule(torch.tensor([1.0, 2.0, 6.0]), groups[:3], valid[[0, 2, 3]])
    assert some[1].item() == 0.0
    assert some[[0, 2, 3]].tolist() == without.tolist()


@pytest.mark.parametrize("rule", [grpo, dr_grpo, rloo])
def test_a_sample_alone_in_its_group_has_no_advantage(rule):
    result = rule(torch.tensor([5.0, NAN, 3.0]), torch.tensor([0, 0, 1]), torch.tensor([True, False, True]))
    assert result.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rule", [grpo, dr_grpo, rloo])
def test_a_nan_of_a_scored_sample_stays_visible_in_its_group(rule):
    result = rule(torch.tensor([NAN, 1.0, 2.0]), torch.tensor([0, 0, 1]), torch.ones(3, dtype=torch.bool))
    assert result.isnan().tolist() == [True, True, False]


@given(
    rewards=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]), min_size=2, max_size=12),
    kinds=st.integers(1, 4),
    data=st.data(),
)
def test_grouped_advantages_follow_their_samples_and_sum_to_zero(rewards, kinds, data):
    n = len(rewards)
    groups = torch.tensor(data.draw(st.lists(st.integers(0, kinds), min_size=n, max_size=n)))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    values = torch.tensor(rewards)
    for rule in (grpo, dr_grpo, rloo):
        result = rule(values, groups, valid)
        assert torch.allclose(rule(values[order], groups[order], valid[order]), result[order], atol=1e-12)
        assert torch.allclose(rule(values + 3.0, groups, valid), result, atol=1e-6)
        for group in groups.unique():
            assert abs(result[groups == group].sum().item()) < 1e-6


@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_moments_are_the_same_on_one_rank_and_on_three_with_unequal_shares(on_ranks, weighting):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(10, 6, generator=generator)
    mask = torch.arange(6)[None] < torch.randint(0, 7, (10, 1), generator=generator)
    valid = torch.tensor([True] * 7 + [False] * 3)  # the last rank has no valid sequence
    shares = [slice(0, 2), slice(2, 7), slice(7, 10)]
    alone = moments(values, mask, valid, weighting=weighting)
    spread = on_ranks(
        3,
        lambda rank, reduce: moments(
            values[shares[rank]], mask[shares[rank]], valid[shares[rank]], weighting=weighting, reduce=reduce
        ),
    )
    for of in spread:
        assert of.mean.item() == pytest.approx(alone.mean.item(), abs=1e-14)
        assert of.std.item() == pytest.approx(alone.std.item(), abs=1e-14)
        assert of.count.item() == alone.count.item()


def test_a_mask_that_is_not_bool_is_refused():
    with pytest.raises(AssertionError, match="bool"):
        moments(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, dtype=torch.bool))
