import numpy as np
import torch
from steadyhelm.models.sampling import draw, uniforms


def test_uniforms_are_those_of_splitmix64() -> None:
    # SplitMix64 (Steele, Lea, Flood 2014) started from state 0 gives 0xe220a8397b1dcdaf first; mix(0) is 0.
    found = uniforms(np.asarray([0], np.uint64), 3)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    np.testing.assert_array_equal(found[0], [(word >> 11) / 2**53 for word in expected])


def test_uniforms_depend_on_seed_and_place_only() -> None:
    seeds = np.asarray([7, 2**63 - 1, 12345], np.uint64)
    long, short = uniforms(seeds, 100), uniforms(seeds[1:2], 10)
    np.testing.assert_array_equal(long[1, :10], short[0])
    assert len(np.unique(long)) == 300
    assert 0 <= long.min() <= long.max() < 1


def test_uniforms_are_uniform_and_neighbouring_seeds_are_not_correlated() -> None:
    drawn = uniforms(np.arange(2000, dtype=np.uint64), 50)
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-square with 19 degrees of freedom at 0.1 %
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.02


def test_the_drawn_token_is_where_the_cdf_first_exceeds_the_uniform() -> None:
    logprobs = torch.tensor([0.5, 0.25, 0.0, 0.25]).log()[None].repeat(6, 1)
    uniform = torch.tensor([0.0, 0.49999, 0.5, 0.75, 0.9, 1 - 2**-53], dtype=torch.float64)
    assert draw(logprobs, uniform).tolist() == [0, 0, 1, 3, 3, 3]


def test_a_token_of_probability_zero_is_never_drawn_at_either_end() -> None:
    logprobs = torch.tensor([0.0, 1.0, 0.0]).log()[None].repeat(2, 1)
    assert draw(logprobs, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 1]


def test_drawn_tokens_follow_the_distribution() -> None:
    p = np.asarray([0.4, 0.05, 0.25, 0.3])
    uniform = torch.from_numpy(uniforms(np.arange(20000, dtype=np.uint64), 1)[:, 0])
    tokens = draw(torch.from_numpy(np.log(p)).float()[None].repeat(20000, 1), uniform)
    counts = np.bincount(tokens.numpy(), minlength=4)
    assert ((counts - 20000 * p) ** 2 / (20000 * p)).sum() < 16.3  # 3 degrees of freedom at 0.1 %
