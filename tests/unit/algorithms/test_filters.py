import math

import pytest
import torch
from steadyhelm.algorithms import filters
from steadyhelm.algorithms.advantages import moments, normalize


def one_token_each(*counted):
    """Values [N, 1] of one-token responses from pairs (how many, value), with mask, valid, moments."""
    values = torch.cat([torch.full((count, 1), value) for count, value in counted])
    mask, valid = torch.ones_like(values, dtype=torch.bool), torch.ones(len(values), dtype=torch.bool)
    return values, mask, valid, moments(values, mask, valid)


def test_the_papers_filter_of_the_worked_example():
    values, mask, valid, of = one_token_each((255, 1.0), (1, 0.0))
    z = normalize(values, of, mask, valid)
    result = filters.paper(z, mask, valid, k=3.0)
    assert of.mean.item() == pytest.approx(0.99609375, abs=1e-9)
    assert of.std.item() == pytest.approx(0.06237781, abs=1e-8)
    assert z[0].item() == pytest.approx(0.06262243, abs=1e-6)
    assert z[-1].item() == pytest.approx(-15.96871942, abs=1e-5)  # the ε beside σ takes 2.6e-6 off
    assert result.values[0].item() == z[0].item()
    assert result.values[-1].item() == 0.0
    assert (result.low.item(), result.high.item(), result.nan.item()) == (1.0, 0.0, 0.0)
    assert result.keep.sum().item() == 255


def test_exactly_three_is_kept_and_the_next_number_is_not():
    beyond = math.nextafter(3.0, 4.0)
    z = torch.tensor([[3.0, -3.0, beyond, -beyond]], dtype=torch.float64)
    result = filters.paper(z, torch.ones(1, 4, dtype=torch.bool), torch.tensor([True]), k=3.0)
    assert result.values.tolist() == [[3.0, -3.0, 0.0, 0.0]]
    assert (result.low.item(), result.high.item()) == (1.0, 1.0)


def hits(mode, right, total=100_000):
    """Low and high hits with so many responses worth 2.0 and the others 0.5."""
    values, mask, valid, of = one_token_each((right, 2.0), (total - right, 0.5))
    z = normalize(values, of, mask, valid, mode=mode)
    if mode == "paper":
        result = filters.paper(z, mask, valid, k=3.0)
    else:
        result = filters.release(z, of.mean, mask, valid, k=3.0, guard=10.0)
    return int(result.low), int(result.high)


@pytest.mark.parametrize(
    ("mode", "right", "expected"),
    [
        ("release", 68_456, (0, 0)),
        ("release", 68_457, (31_543, 0)),  # every wrong sample goes above an accuracy of 68.4562 %
        ("paper", 90_000, (0, 0)),
        ("paper", 90_001, (9_999, 0)),
        ("release", 7_138, (0, 0)),
        ("release", 7_137, (0, 7_137)),  # every right one below 7.1373 %
        ("paper", 10_000, (0, 0)),
        ("paper", 9_999, (0, 9_999)),
    ],
)
def test_the_accuracy_at_which_each_filter_starts_to_drop_samples(mode, right, expected):
    assert hits(mode, right) == expected


def test_the_released_guard_zeroes_what_its_shifted_bounds_let_through():
    z = torch.tensor([[9.0, 10.0, 10.5, math.inf, -math.inf, math.nan, -1.0, -2.5]], dtype=torch.float64)
    mask, valid = torch.ones(1, 8, dtype=torch.bool), torch.tensor([True])
    result = filters.release(z, torch.tensor(8.0), mask, valid, k=10.0, guard=10.0)
    assert result.values.tolist() == [[9.0, 10.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0]]
    assert (result.low.item(), result.high.item(), result.nan.item()) == (2.0, 2.0, 1.0)


def test_the_papers_filter_leaves_nan_visible():
    z = torch.tensor([[math.nan, 1.0]])
    result = filters.paper(z, torch.ones(1, 2, dtype=torch.bool), torch.tensor([True]), k=3.0)
    assert result.values.isnan().tolist() == [[True, False]]


def test_padding_and_unscored_sequences_are_neither_kept_nor_counted():
    z = torch.tensor([[5.0, 1.0], [5.0, -5.0]])
    mask = torch.tensor([[False, True], [True, True]])
    result = filters.paper(z, mask, torch.tensor([True, False]), k=3.0)
    assert result.values.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert result.keep.tolist() == [[False, True], [False, False]]
    assert (result.low.item(), result.high.item()) == (0.0, 0.0)
