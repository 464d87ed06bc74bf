"""Filters: which advantages are set to zero.

A filtered token is zeroed, not clipped and not dropped: it stays in the loss's denominator, and nothing is
normalised again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steadyhelm.algorithms.shapes import active_tokens, check_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """What a filter leaves.

    ``values`` [N, T] are the advantages with the filtered ones 0, ``keep`` [N, T] bool the active tokens that
    passed. ``low``, ``high`` and ``nan`` are the numbers of active tokens that were too low, too high, or NaN:
    float64 of rank 0, sums that add over ranks.
    """

    values: Tensor
    keep: Tensor
    low: Tensor
    high: Tensor
    nan: Tensor


def _filtered(z: Tensor, active: Tensor, low: Tensor, high: Tensor, nan: Tensor) -> Filtered:
    keep = active & ~(low | high | nan)
    count = [(active & hits).sum().double() for hits in (low, high, nan)]
    return Filtered(values=torch.where(keep, z, 0.0), keep=keep, low=count[0], high=count[1], nan=count[2])


def paper(z: Tensor, mask: Tensor, valid: Tensor, *, k: float) -> Filtered:
    """The paper's filter: z where |z| ≤ k (boundary kept), 0 elsewhere; NaN stays NaN, so that it is seen.

    Args:
        z: normalised advantages [N, T].
        mask: completion tokens [N, T].
        valid: sequences that count [N].
        k: half-width of the kept interval in standard deviations.

    Source: R1-Reward (arXiv 2505.02835), §4.2.
    """
    check_tokens(mask, z)
    return _filtered(z, active_tokens(mask, valid), z < -k, z > k, torch.zeros_like(mask))


def release(z: Tensor, raw_mean: Tensor, mask: Tensor, valid: Tensor, *, k: float, guard: float) -> Filtered:
    """The released code's filter: 0 where z leaves raw mean ± k, or where |z| > guard, or where z is not finite.

    The bounds are in units of the raw advantage but applied to the normalised one, as the release does: with
    rewards {2.0, 0.5} it zeroes every wrong sample above an accuracy of 68.4562 %, where ``paper`` does from 90 %.

    Args:
        z: normalised advantages [N, T].
        raw_mean: mean of the advantages before normalisation, rank 0.
        mask: completion tokens [N, T].
        valid: sequences that count [N].
        k: half-width of the kept interval.
        guard: second bound of |z|.

    Source: R1-Reward's release, trainer/ppo_utils/replay_buffer.py, lines 265-276.
    """
    check_tokens(mask, z)
    low = (z < raw_mean - k) | (z < -guard)
    high = ~low & ((z > raw_mean + k) | (z > guard))
    return _filtered(z, active_tokens(mask, valid), low, high, z.isnan())
