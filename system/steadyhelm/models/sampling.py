"""Drawing of tokens by inverse CDF from counter-based uniforms: what a sample is depends on its seed alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: NDArray[np.uint64], num: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) for the first ``num`` tokens of each seed, [N, num]; each is a hash of (seed, token index).

    u = ⌊mix(mix(seed) + γ·(index + 1)) / 2¹¹⌋ / 2⁵³ with SplitMix64's mix and γ.

    Args:
        seeds: [N] uint64, one for each sequence.
        num: number of token indices, from 0.
    """
    steps = np.arange(1, num + 1, dtype=np.uint64) * _GOLDEN
    words = _mix(_mix(seeds.astype(np.uint64))[:, None] + steps[None])
    drawn: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn


def draw(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the distribution's CDF first exceeds ``uniform``, [N] int64; never one of probability 0.

    Args:
        logprobs: [N, V] float32, normalised, -∞ where a token is excluded.
        uniform: [N] float64 in [0, 1).
    """
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1]
    wanted = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, wanted[:, None], right=True).squeeze(-1)
