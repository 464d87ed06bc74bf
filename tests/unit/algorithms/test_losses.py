import math

import pytest
import torch
from steadyhelm.algorithms.losses import (
    aggregate,
    cross_entropy,
    denominator,
    importance_weights,
    ppo_clip,
    pre_clip,
)

LOW, HIGH = math.log(1e-3), math.log(1e3)
TRUE = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("advantage", "loss", "gradient"),
    [
        (1.0, [-1.2, -0.001, -1.2, -0.001008, -1.0], [0.0, 0.0, 0.0, -0.001008, -1.0]),
        (-1.0, [1000.0, 0.8, 992.274716, 0.8, 1.0], [0.0, 0.0, 992.274716, 0.0, 1.0]),
    ],
)
def test_pre_clip_and_clip_of_the_worked_example(advantage, loss, gradient):
    logprobs = torch.tensor([[8.0, -8.0, 6.9, -6.9, 0.0]], dtype=torch.float64, requires_grad=True)
    clamped, hits = pre_clip(logprobs, LOW, HIGH)
    result, _ = ppo_clip(clamped.exp(), torch.full_like(logprobs, advantage), clip=0.2)
    result.sum().backward()
    assert result[0].tolist() == pytest.approx(loss, abs=1e-6)
    assert logprobs.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)
    assert hits.tolist() == [[True, True, False, False, False]]


def test_pre_clip_passes_the_gradient_at_its_bounds():
    d = torch.tensor([[LOW, HIGH]], dtype=torch.float64, requires_grad=True)
    clamped, hits = pre_clip(d, LOW, HIGH)
    clamped.sum().backward()
    assert d.grad.tolist() == [[1.0, 1.0]]
    assert not hits.any()


@pytest.mark.parametrize("bounds", [(LOW, HIGH), (-math.inf, math.inf)])
def test_pre_clip_never_hides_a_log_ratio_that_is_not_finite(bounds):
    clamped, _ = pre_clip(torch.tensor([[math.inf, -math.inf, math.nan, 1.0]]), *bounds)
    assert clamped.isnan().tolist() == [[True, True, True, False]]


def test_without_bounds_pre_clip_changes_nothing():
    clamped, hits = pre_clip(torch.tensor([[40.0, -40.0]]), -math.inf, math.inf)
    assert clamped.tolist() == [[40.0, -40.0]]
    assert not hits.any()


def test_clip_high_bounds_the_upper_side_only():
    ratio = torch.tensor([[0.7, 1.25, 1.4, 0.7, 1.4]])
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0]])
    loss, clipped = ppo_clip(ratio, advantages, clip=0.2, clip_high=0.28)
    assert loss[0].tolist() == pytest.approx([-0.7, -1.25, -1.28, 0.8, 1.4], abs=1e-6)
    assert clipped.tolist() == [[False, False, True, True, False]]


def test_inside_the_clip_the_whole_gradient_flows_though_both_branches_tie():
    ratio = torch.tensor([[1.0, 0.9]], requires_grad=True)
    ppo_clip(ratio, torch.tensor([[2.0, -3.0]]), clip=0.2)[0].sum().backward()
    assert ratio.grad.tolist() == [[-2.0, 3.0]]


def test_token_weights_are_truncated_from_above_only():
    proximal = torch.tensor([[0.0, 0.0, -90.0]], requires_grad=True)
    behaviour = torch.tensor([[-math.log(1.5), -400.0, -89.0]])
    weights, capped = importance_weights(proximal, behaviour, TRUE, mode="token", cap=2.0)
    assert weights[0].tolist() == pytest.approx([1.5, 2.0, math.exp(-1.0)], abs=1e-6)
    assert capped.tolist() == [[False, True, False]]
    assert not weights.requires_grad


def test_a_sequence_weight_is_the_product_of_its_tokens_ratios_before_the_cap():
    log_ratios = torch.tensor([[math.log(3.0), math.log(0.5), 50.0], [math.log(3.0), 0.0, 50.0]])
    mask = torch.tensor([[True, True, False]] * 2)
    weights, capped = importance_weights(log_ratios, torch.zeros(2, 3), mask, mode="sequence", cap=2.0)
    assert weights.flatten().tolist() == pytest.approx([1.5, 1.5, 1.0, 2.0, 2.0, 1.0], abs=1e-6)
    assert capped.tolist() == [[False, False, False], [True, True, False]]


def test_equal_policies_weigh_one_and_off_weighs_one_whatever_the_policies():
    same = torch.tensor([[-1.0, -2.0, -3.0]])
    for mode in ("token", "sequence"):
        assert importance_weights(same, same, TRUE, mode=mode, cap=2.0)[0].tolist() == [[1.0, 1.0, 1.0]]
    assert importance_weights(same, same * 5, TRUE, mode="off", cap=2.0)[0].tolist() == [[1.0, 1.0, 1.0]]


def test_masked_weights_are_zero_outside_both_bounds_and_untouched_between_them():
    ratios = torch.tensor([[1.9, 2.1, 0.4], [0.6, 1.0, 1.0]])
    weights, outside = importance_weights(
        ratios.log(), torch.zeros(2, 3), TRUE.expand(2, 3), mode="token", cap=2.0, beyond="mask"
    )
    assert weights.flatten().tolist() == pytest.approx([1.9, 0.0, 0.0, 0.6, 1.0, 1.0], abs=1e-6)
    assert outside.tolist() == [[False, True, True], [False, False, False]]
    weights, outside = importance_weights(
        ratios.log(), torch.zeros(2, 3), TRUE.expand(2, 3), mode="sequence", cap=1.6, beyond="mask"
    )
    assert weights.flatten().tolist() == pytest.approx([1.596] * 3 + [0.0] * 3, abs=1e-6)
    assert outside.tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("mode", ["token", "sequence"])
@pytest.mark.parametrize("beyond", ["truncate", "mask"])
def test_a_weight_of_a_log_prob_that_is_not_finite_is_nan(mode, bad, beyond):
    behaviour = torch.tensor([[0.0, bad, 0.0]])
    weights, _ = importance_weights(torch.zeros(1, 3), behaviour, TRUE, mode=mode, cap=2.0, beyond=beyond)
    assert weights[0, 1].isnan().item()


def test_aggregations_of_the_worked_example():
    losses = torch.tensor([[1.0] * 6, [4.0] * 2 + [math.nan] * 4])
    mask = torch.arange(6)[None] < torch.tensor([[6], [2]])
    valid = torch.tensor([True, True])

    def mean(mode):
        numerator = aggregate(losses, mask, valid, mode)
        return (numerator / denominator(mask, valid, mode, max_new_tokens=10)).item()

    assert mean("sequence") == pytest.approx(2.5, abs=1e-6)
    assert mean("token") == pytest.approx(1.75, abs=1e-6)
    assert mean("constant") == pytest.approx(0.7, abs=1e-6)


def test_empty_and_unscored_sequences_add_nothing_and_only_valid_ones_count():
    losses = torch.tensor([[3.0, 5.0], [math.nan, math.nan], [math.nan, math.nan]])
    mask = torch.tensor([[True, True], [False, False], [True, True]])
    valid = torch.tensor([True, True, False])
    assert aggregate(losses, mask, valid, "sequence").item() == 4.0
    assert aggregate(losses, mask, valid, "token").item() == 8.0
    counts = [denominator(mask, valid, mode, 5).item() for mode in ("sequence", "token", "constant")]
    assert counts == [2.0, 2.0, 10.0]


def test_a_batch_without_any_token_has_a_loss_of_zero():
    mask, valid = torch.zeros(2, 0, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    for mode in ("sequence", "token", "constant"):
        assert aggregate(torch.zeros(2, 0), mask, valid, mode).item() == 0.0


def test_cross_entropy_is_the_negative_log_prob_of_active_tokens():
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, math.nan], [math.nan, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    result = cross_entropy(logprobs, mask, torch.tensor([True, True, False]))
    result.sum().backward()
    assert result.tolist() == [[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]]
    assert logprobs.grad.tolist() == [[-1.0, -1.0], [-1.0, 0.0], [0.0, 0.0]]
