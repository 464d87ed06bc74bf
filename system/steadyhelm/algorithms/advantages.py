"""Advantages: from one reward per sequence to one advantage per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steadyhelm.algorithms.shapes import active_tokens, check_sequences, check_tokens

Reduce = Callable[[Tensor], Tensor]
"""Sum over all learner ranks of a small float64 vector; every rank gets the same result and calls it equally often."""

EPSILON = 1.0e-8
"""Keeps a division by σ finite; small against any σ above ``FLAT``."""

FLAT = 1.0e-6
"""A σ of at most this times max(1, |μ|) is rounding, not signal: all advantages are then 0."""


def one_rank(sums: Tensor) -> Tensor:
    """The ``Reduce`` of a single rank: the identity."""
    return sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Mean and population standard deviation over all ranks, with the count they were taken over.

    Each is a float64 tensor of rank 0; ``count`` is the number of active tokens (weighting ``token``) or of valid
    sequences with at least one token (weighting ``sequence``). A count of 0 goes with mean 0 and deviation 0.
    """

    mean: Tensor
    std: Tensor
    count: Tensor

    @property
    def flat(self) -> Tensor:
        """Whether the values are equal but for rounding: σ ≤ 1e-6·max(1, |μ|); bool of rank 0."""
        return self.std <= FLAT * self.mean.abs().clamp(min=1.0)


def token_rewards(rewards: Tensor, kl: Tensor | None, mask: Tensor, *, beta: float, clip: float) -> Tensor:
    """Reward per token: r_t = −β·kl_t, plus clip(R, ±clip) at the sequence's last token.

    Args:
        rewards: R [N].
        kl: estimate of the divergence from the reference policy [N, T]; None where β = 0.
        mask: completion tokens [N, T]; a sequence without any gets its reward nowhere.
        beta: weight of the divergence.
        clip: bound of |R|; ``math.inf`` clamps nothing.

    Returns:
        [N, T] in the type of ``rewards``, 0 outside ``mask``.

    Source: Reinforce++ as in R1-Reward's release (openrlhf/models/utils.py).
    """
    check_tokens(mask, *(() if kl is None else (kl,)))
    assert rewards.shape == mask.shape[:1], f"rewards {tuple(rewards.shape)} do not go with mask {tuple(mask.shape)}"
    tokens_from_here = mask.flip(-1).cumsum(-1).flip(-1)
    last = mask & (tokens_from_here == 1)
    result = torch.where(last, rewards.clamp(-clip, clip)[:, None], 0.0)
    if kl is not None:
        result = result - torch.where(mask, beta * kl.to(result.dtype), 0.0)
    return result


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Returns G_t = r_t + γ·G_{t+1}, where t counts the masked tokens only.

    Args:
        rewards: reward per token [N, T].
        mask: completion tokens [N, T]; positions outside take no part and cost no discount.
        gamma: discount per token, in (0, 1].

    Returns:
        [N, T] in the type of ``rewards``, 0 outside ``mask``.
    """
    check_tokens(mask, rewards)
    rewards = torch.where(mask, rewards, 0.0)
    if gamma == 1.0:
        return torch.where(mask, rewards.flip(-1).cumsum(-1).flip(-1), 0.0)
    following = rewards.new_zeros(rewards.shape[0])
    columns = []
    for column, here in zip(reversed(rewards.unbind(-1)), reversed(mask.unbind(-1)), strict=True):
        following = torch.where(here, column + gamma * following, following)
        columns.append(torch.where(here, following, 0.0))
    return torch.stack(columns[::-1], dim=-1) if columns else rewards


def moments(
    values: Tensor,
    mask: Tensor,
    valid: Tensor,
    *,
    weighting: Literal["token", "sequence"] = "token",
    reduce: Reduce = one_rank,
) -> Moments:
    """Mean and population deviation of ``values`` over the active tokens of all ranks, in two passes in float64.

    ``token``: μ = Σ_it x_it / Σ_i T_i, the denominator is the number of active tokens.
    ``sequence``: μ = Σ_i (Σ_t x_it / T_i) / S, the denominator S is the number of valid sequences with T_i ≥ 1.
    σ² is the same mean of (x − μ)².

    Args:
        values: [N, T].
        mask: completion tokens [N, T].
        valid: sequences that count [N].
        weighting: whether every token or every sequence counts once.
        reduce: sum over ranks; called twice.
    """
    check_tokens(mask, values)
    active = active_tokens(mask, valid)
    lengths = active.sum(-1)
    counted = lengths.sum() if weighting == "token" else (lengths > 0).sum()

    def total(terms: Tensor) -> Tensor:
        per_sequence = torch.where(active, terms, 0.0).sum(-1)
        return (per_sequence if weighting == "token" else per_sequence / lengths.clamp(min=1)).sum()

    exact = values.double()
    first = reduce(torch.stack((total(exact), counted.double())))
    count = first[1]
    mean = first[0] / count.clamp(min=1.0)
    variance = reduce(total((exact - mean) ** 2)[None])[0] / count.clamp(min=1.0)
    return Moments(mean=mean, std=variance.sqrt(), count=count)


def normalize(
    values: Tensor, of: Moments, mask: Tensor, valid: Tensor, *, mode: Literal["paper", "release"] = "paper"
) -> Tensor:
    """Standardised values; all 0 where the moments are flat (σ ≤ 1e-6·max(1, |μ|)).

    ``paper``: z = (x − μ)/(σ + 1e-8). ``release``: z = (x − μ)·rsqrt(max(σ², 1e-8)) + 1e-8.

    Args:
        values: [N, T].
        of: moments of ``values``.
        mask: completion tokens [N, T].
        valid: sequences that count [N].
        mode: which of the two formulas.

    Returns:
        [N, T] float64, 0 outside the active tokens. Non-finite moments give non-finite values.
    """
    check_tokens(mask, values)
    centred = values.double() - of.mean
    if mode == "paper":
        z = centred / (of.std + EPSILON)
    else:
        z = centred * torch.rsqrt((of.std**2).clamp(min=EPSILON)) + EPSILON
    return torch.where(active_tokens(mask, valid) & ~of.flat, z, 0.0)


def _grouped(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per sample: the reward centred in its group (0 where not valid), the group's mean and its valid size; float64."""
    check_sequences(valid, rewards, group_ids)
    assert not group_ids.is_floating_point(), f"group ids must be whole numbers, not {group_ids.dtype}"
    groups, index = torch.unique(group_ids, return_inverse=True)
    exact = torch.where(valid, rewards.double(), 0.0)
    empty = exact.new_zeros(groups.shape[0])
    sizes = empty.index_add(0, index, valid.double())
    means = empty.index_add(0, index, exact) / sizes.clamp(min=1.0)
    return torch.where(valid, exact - means[index], 0.0), means[index], sizes[index]


def grpo(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> Tensor:
    """GRPO: A_i = (R_i − mean)/(s + 1e-8) within the group of one prompt's valid samples.

    ``mean`` divides by the group's number n of valid samples, the variance s² by n − 1. A group with n = 1, or
    with equal rewards but for rounding (s ≤ 1e-6·max(1, |mean|)), compares nothing: its advantages are 0.

    Args:
        rewards: [N], whole groups.
        group_ids: whole numbers [N]; equal ids are one group, in any order.
        valid: samples that count [N]; the others get 0.

    Returns:
        [N] float64.

    Source: Shao et al., DeepSeekMath (arXiv 2402.03300), §4.1.
    """
    centred, means, sizes = _grouped(rewards, group_ids, valid)
    groups, index = torch.unique(group_ids, return_inverse=True)
    squares = centred.new_zeros(groups.shape[0]).index_add(0, index, centred**2)[index]
    deviation = (squares / (sizes - 1.0).clamp(min=1.0)).sqrt()
    return torch.where(deviation <= FLAT * means.abs().clamp(min=1.0), 0.0, centred / (deviation + EPSILON))


def dr_grpo(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> Tensor:
    """Dr.GRPO: A_i = R_i − mean within the group, not scaled; the mean divides by the group's valid samples.

    Arguments and result as for ``grpo``.

    Source: Liu et al., "Understanding R1-Zero-like training" (arXiv 2503.20783).
    """
    return _grouped(rewards, group_ids, valid)[0]


def rloo(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> Tensor:
    """RLOO: A_i = R_i − mean of the group's other valid samples, which is n/(n − 1)·(R_i − mean).

    The baseline's mean divides by n − 1; a group with n = 1 has no baseline and its advantage is 0.
    Arguments and result as for ``grpo``.

    Source: Ahmadian et al., "Back to Basics" (arXiv 2402.14740).
    """
    centred, _, sizes = _grouped(rewards, group_ids, valid)
    return centred * sizes / (sizes - 1.0).clamp(min=1.0)
