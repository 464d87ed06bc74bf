"""Advantages of a committed batch, worked out again from its rewards and lengths with numpy alone.

The formulas are those of ``steadyhelm.algorithms``, whose tensors would cost the driver an import of torch; a test
holds the two together. A divergence inside the reward (β > 0) is left out: its proximal log-probs are not stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from steadyhelm.config.algorithm import DrGrpo, Filter, Grpo, PolicyGradient, ReinforcePP, Rloo, StableReinforce

EPSILON = 1e-8
FLAT = 1e-6

Array = NDArray[np.float64]


def batch_advantages(
    objective: PolicyGradient,
    rewards: NDArray[np.float32],
    valid: NDArray[np.bool_],
    lengths: Sequence[int],
    groups: Sequence[str],
) -> tuple[list[Array], list[bool]]:
    """Per sample the advantages [T] that entered the loss, and whether the filter zeroed any; 0 where not valid.

    Args:
        objective: the run file's ``algorithm``.
        rewards: R [N]; NaN where not valid.
        valid: samples that count [N].
        lengths: completion tokens T of each sample.
        groups: the group of each sample.
    """
    exact = np.where(valid, rewards, 0.0).astype(np.float64)
    returns = objective if isinstance(objective, StableReinforce | ReinforcePP) else None
    if returns is not None:
        scores = np.clip(exact, -returns.reward_clip, returns.reward_clip)
    else:
        scores = _grouped(objective, exact, valid, groups)
    gamma = returns.gamma if returns else 1.0
    raw = [
        score * gamma ** np.arange(t - 1, -1, -1, dtype=np.float64) for score, t in zip(scores, lengths, strict=True)
    ]
    by_token = returns.weighting == "token" if returns else True
    mean, deviation = _moments([a for a, ok in zip(raw, valid, strict=True) if ok and len(a)], by_token)
    values, filtered = [], []
    for sample, ok in zip(raw, valid, strict=True):
        if not ok or deviation <= FLAT * max(1.0, abs(mean)):
            z = np.zeros_like(sample)
        elif returns is not None and returns.normalization == "release":
            z = (sample - mean) / np.sqrt(max(deviation**2, EPSILON)) + EPSILON
        else:
            z = (sample - mean) / (deviation + EPSILON)
        keep = _kept(objective.filter, z, mean)
        values.append(np.where(keep, z if returns is not None else sample, 0.0) * bool(ok))
        filtered.append(bool(ok) and not bool(keep.all()))
    return values, filtered


def _moments(samples: Sequence[Array], by_token: bool) -> tuple[float, float]:
    """Mean and population deviation, every token or every sequence counting once; (0, 0) of nothing."""
    if not samples:
        return 0.0, 0.0
    values = np.concatenate(samples)
    weights = np.concatenate([np.full(len(a), 1.0 if by_token else 1.0 / len(a)) for a in samples])
    mean = float(np.average(values, weights=weights))
    return mean, float(np.sqrt(np.average((values - mean) ** 2, weights=weights)))


def _kept(rule: Filter, z: Array, raw_mean: float) -> NDArray[np.bool_]:
    if rule.mode == "paper":
        return np.abs(z) <= rule.k
    if rule.mode == "release":
        return (np.abs(z - raw_mean) <= rule.k) & (np.abs(z) <= rule.guard)
    return np.ones(z.shape, dtype=np.bool_)


def _grouped(objective: PolicyGradient, rewards: Array, valid: NDArray[np.bool_], groups: Sequence[str]) -> Array:
    """GRPO, Dr.GRPO and RLOO: each valid sample against its group's valid samples."""
    result = np.zeros_like(rewards)
    for group in set(groups):
        members = np.array([g == group for g in groups]) & valid
        n, own = int(members.sum()), rewards[members]
        if n < 2:
            continue
        centred = own - own.mean()
        if isinstance(objective, Grpo):
            deviation = float(own.std(ddof=1))
            flat = deviation <= FLAT * max(1.0, abs(float(own.mean())))
            centred = np.zeros_like(own) if flat else centred / (deviation + EPSILON)
        elif isinstance(objective, Rloo):
            centred = centred * n / (n - 1)
        else:
            assert isinstance(objective, DrGrpo)
        result[members] = centred
    return result
