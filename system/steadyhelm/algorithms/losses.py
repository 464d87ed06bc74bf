"""Losses per token, their importance weights, and how they are summed up.

The functions here expect what inactive tokens hold to be finite; ``objective`` sees to that. A non-finite value of
an active token stays non-finite up to the loss, so that the caller can stop the run.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from steadyhelm.algorithms.shapes import active_tokens, check_pair, check_tokens

Aggregation = Literal["sequence", "token", "constant"]


def pre_clip(log_ratio: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Clamps the log-ratio before it is exponentiated: d̃ = clamp(d, low, high).

    It is a plain clamp: the gradient is 1 inside, bounds included, and 0 outside, for either sign of the advantage.
    A non-finite d gives NaN: a clamp would turn an infinite one into a harmless number.

    Args:
        log_ratio: d = log π − log π_old [N, T].
        low: ln δ_min; −inf clamps nothing.
        high: ln δ_max; inf clamps nothing.

    Returns:
        d̃ [N, T], and where d was outside [low, high] (bool [N, T]).

    Source: R1-Reward (arXiv 2505.02835), §4.1 and Algorithm 1.
    """
    check_pair(log_ratio, log_ratio)
    hits = (log_ratio < low) | (log_ratio > high)
    return torch.where(log_ratio.isfinite(), log_ratio.clamp(low, high), math.nan), hits


def ppo_clip(
    ratio: Tensor, advantages: Tensor, *, clip: float, clip_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss per token: ℓ = −min(r·A, clamp(r, 1 − ε, 1 + ε_high)·A).

    The gradient with respect to r is 0 where the clamped branch is the smaller one (A > 0 and r > 1 + ε_high, or
    A < 0 and r < 1 − ε) and −A elsewhere, also for A < 0 and a large r: there is no dual clip.

    Args:
        ratio: r = π/π_old [N, T].
        advantages: A [N, T].
        clip: ε.
        clip_high: ε_high; None takes ε.

    Returns:
        ℓ [N, T], and where the clamped branch was taken (bool [N, T]).

    Source: Schulman et al. (arXiv 1707.06347), eq. 7; ε_high: DAPO (arXiv 2503.14476), §3.1.
    """
    check_pair(ratio, advantages)
    plain = ratio * advantages
    clamped = ratio.clamp(1.0 - clip, 1.0 + (clip if clip_high is None else clip_high)) * advantages
    return -torch.minimum(plain, clamped), clamped < plain


def importance_weights(
    proximal: Tensor,
    behaviour: Tensor,
    mask: Tensor,
    *,
    mode: Literal["off", "token", "sequence"],
    cap: float,
    beyond: Literal["truncate", "mask"] = "truncate",
) -> tuple[Tensor, Tensor]:
    """Importance weights between the engine's policy and the trainer's: stop-grad min(exp(d), cap).

    ``token``: d_t = log π_proximal − log π_behaviour of the token. ``sequence``: d = Σ_t d_t over the masked tokens,
    the same weight for all of them. ``off``: 1. With ``beyond="mask"`` a weight outside [1/cap, cap] is 0 and nothing
    is truncated. Bounds apply in log space, so that exp cannot overflow; a non-finite d of a masked token gives NaN.

    Args:
        proximal: log π_proximal [N, T].
        behaviour: log π_behaviour [N, T].
        mask: tokens whose ratio counts [N, T].
        mode: token, sequence or off.
        cap: upper bound of the weight.
        beyond: what becomes of a weight that is out of bounds.

    Returns:
        weights [N, T] without gradient, 1 outside ``mask``; and where they were out of bounds (bool [N, T]).

    Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025); ``mask``:
    Ling team, "Every step evolves" (arXiv 2510.18855), IcePop.
    """
    check_tokens(mask, proximal, behaviour)
    if mode == "off":
        return torch.ones_like(proximal).detach(), torch.zeros_like(mask)
    log_weight = torch.where(mask, proximal.detach() - behaviour.detach(), 0.0)
    if mode == "sequence":
        log_weight = log_weight.sum(-1, keepdim=True).expand_as(mask)
    highest = math.log(cap)
    outside = log_weight > highest
    weights = torch.where(log_weight.isfinite(), log_weight, math.nan).clamp(max=highest).exp()
    if beyond == "mask":
        outside = outside | (log_weight < -highest)
        weights = torch.where(outside & log_weight.isfinite(), 0.0, weights)
    return torch.where(mask, weights, 1.0), mask & outside


def cross_entropy(logprobs: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
    """Supervised loss per token: ℓ = −log π, 0 outside the active tokens; [N, T].

    Args:
        logprobs: log π of the trace's tokens [N, T].
        mask: completion tokens [N, T].
        valid: sequences that count [N].
    """
    check_tokens(mask, logprobs)
    return torch.where(active_tokens(mask, valid), -logprobs, 0.0)


def aggregate(losses: Tensor, mask: Tensor, valid: Tensor, mode: Aggregation) -> Tensor:
    """The numerator of the mean loss: a sum over these sequences that adds over micro-batches and ranks.

    ``sequence``: Σ_i (1/T_i)·Σ_t ℓ_it, where T_i is the sequence's number of masked tokens (a sequence without any
    adds 0). ``token`` and ``constant``: Σ_it ℓ_it. The denominator is ``denominator`` summed over the whole
    mini-batch: micro-batches, ranks.

    Args:
        losses: ℓ [N, T].
        mask: completion tokens [N, T].
        valid: sequences that count [N].
        mode: how the mean is taken.

    Returns:
        float64 of rank 0, differentiable.
    """
    check_tokens(mask, losses)
    active = active_tokens(mask, valid)
    per_sequence = torch.where(active, losses, 0.0).sum(-1, dtype=torch.float64)
    if mode == "sequence":
        per_sequence = per_sequence / active.sum(-1).clamp(min=1)
    return per_sequence.sum()


def denominator(mask: Tensor, valid: Tensor, mode: Aggregation, max_new_tokens: int) -> Tensor:
    """What these sequences add to the mean loss's denominator.

    ``sequence``: the number of valid sequences, those without tokens included. ``token``: the number of active
    tokens. ``constant``: the number of valid sequences times ``max_new_tokens``.

    Args:
        mask: completion tokens [N, T].
        valid: sequences that count [N].
        mode: how the mean is taken.
        max_new_tokens: the run's limit of completion tokens; read by ``constant`` only.

    Returns:
        float64 of rank 0; a sum that adds over micro-batches and ranks.
    """
    active = active_tokens(mask, valid)
    if mode == "token":
        return active.sum().double()
    return valid.sum().double() * (max_new_tokens if mode == "constant" else 1)
