"""The run file's ``algorithm`` part, turned into advantages and a loss.

The order of an iteration in the learner::

    scores             once, on the rewards of the whole batch (groups may be spread over ranks)
    token_advantages   once, on this rank's sequences; the reduction makes its statistics global
    denominator        per mini-batch, summed over micro-batches and ranks
    policy_loss        per micro-batch; gradients are summed over micro-batches and ranks

Three policies are told apart: *behaviour* (the engine's log-probs), *proximal* (the trainer's, before the iteration's
first optimiser step), *current*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from steadyhelm.algorithms import filters, losses
from steadyhelm.algorithms import kl as divergence
from steadyhelm.algorithms.advantages import (
    Moments,
    Reduce,
    discounted_returns,
    dr_grpo,
    grpo,
    moments,
    normalize,
    one_rank,
    rloo,
    token_rewards,
)
from steadyhelm.algorithms.shapes import active_tokens, check_sequences, check_tokens
from steadyhelm.config.algorithm import DrGrpo, Grpo, PolicyGradient, ReinforcePP, Rloo, Sft, StableReinforce
from steadyhelm.errors import NonFiniteError


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """One advantage per token, with what it was made of.

    ``values`` [N, T] float32 go into the loss, 0 outside the active tokens. ``raw`` [N, T] float32 are those before
    normalisation and filter, ``keep`` [N, T] bool the active tokens that passed the filter. ``mean`` and ``std`` of
    ``raw`` are global. ``sums`` are this rank's share, float64 of rank 0, and add over ranks: ``tokens``,
    ``filter_low``, ``filter_high``, ``filter_nan``.
    """

    values: Tensor
    raw: Tensor
    keep: Tensor
    mean: float
    std: float
    sums: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossParts:
    """The loss of a micro-batch, with its diagnostics.

    ``loss`` is float32 of rank 0: this micro-batch's share of the mini-batch's mean loss, so shares (and gradients)
    add over micro-batches and ranks. ``sums`` are float64 of rank 0 and add likewise:

    - ``tokens`` and ``sequences``: the active tokens and valid sequences that the others go with;
    - ``loss``: the numerator of the mean loss;
    - ``pre_clip_hits``, ``clip_hits``, ``nonfinite``: tokens outside the Pre-CLIP bounds, in PPO's clamped branch,
      with a non-finite log-ratio;
    - ``ratio``: Σ r; ``approx_kl``: Σ k3 of (proximal, current);
    - ``kl``: Σ k1 of (proximal, reference); 0 without a reference;
    - ``weight``, ``weight_capped``: Σ of the importance weights, and the tokens whose weight was out of bounds;
    - ``gap``: Σ |proximal − behaviour|, the gap between trainer and engine.

    The tensors per token [N, T] carry no gradient and hold 1 or False outside the active tokens; all are None in
    supervised fine-tuning.
    """

    loss: Tensor
    sums: Mapping[str, Tensor]
    ratio: Tensor | None = None
    pre_clipped: Tensor | None = None
    clipped: Tensor | None = None
    weights: Tensor | None = None


def reward_divergence(objective: PolicyGradient, proximal: Tensor, reference: Tensor | None) -> Tensor | None:
    """The divergence that enters the token rewards: k1 or k3 of (proximal, reference) [N, T] without gradient.

    None where β = 0 or where the divergence belongs to the loss.

    Raises:
        ValueError: it is needed and ``reference`` is None.
    """
    if objective.beta == 0.0 or objective.kl.placement == "loss":
        return None
    return _divergence(objective, proximal.detach(), reference)


def _divergence(objective: PolicyGradient, logprobs: Tensor, reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ValueError(f"algorithm.beta is {objective.beta}, but there are no reference log-probs: score them first")
    return (divergence.k1 if objective.kl.estimator == "k1" else divergence.k3)(logprobs, reference)


def scores(objective: PolicyGradient, rewards: Tensor, group_ids: Tensor, valid: Tensor) -> Tensor:
    """What each sequence's reward counts: the clamped reward, or its advantage within its group.

    A reward that is not finite stays what it is, so that ``token_advantages`` finds it.

    Args:
        objective: the run file's ``algorithm``.
        rewards: R [N] of the whole batch, or of whole groups; NaN where not valid.
        group_ids: whole numbers [N]; samples of one prompt share one.
        valid: sequences that count [N].

    Returns:
        [N] float64, 0 where not valid.
    """
    check_sequences(valid, rewards, group_ids)
    match objective:
        case Grpo():
            return grpo(rewards, group_ids, valid)
        case DrGrpo():
            return dr_grpo(rewards, group_ids, valid)
        case Rloo():
            return rloo(rewards, group_ids, valid)
        case StableReinforce() | ReinforcePP():
            bound = objective.reward_clip
            counted = torch.where(valid, rewards.double(), 0.0)
            return torch.where(counted.isfinite(), counted.clamp(-bound, bound), counted)


def token_advantages(
    objective: PolicyGradient,
    sequence_scores: Tensor,
    kl: Tensor | None,
    mask: Tensor,
    valid: Tensor,
    reduce: Reduce = one_rank,
) -> Advantages:
    """Advantages of this rank's tokens from the scores of its sequences.

    Returns with the divergence in the reward, then for StableReinforce and Reinforce++ the global normalisation,
    then the filter. The grouped objectives (GRPO, Dr.GRPO, RLOO) take γ = 1, add the divergence behind the group's
    baseline, and are not normalised again; where a filter is on, it judges their global z and zeroes them as they
    are.

    Args:
        objective: the run file's ``algorithm``.
        sequence_scores: of ``scores`` [N].
        kl: of ``reward_divergence`` [N, T], or None.
        mask: completion tokens [N, T].
        valid: sequences that count [N].
        reduce: sum over ranks.

    Raises:
        NonFiniteError: a score or a divergence of an active token is NaN or infinite; on every rank alike.
        ValueError: the divergence belongs to the reward and ``kl`` is None.
    """
    if kl is None and objective.beta > 0.0 and objective.kl.placement == "reward":
        raise ValueError(f"algorithm.beta is {objective.beta}, but kl is None: pass reward_divergence's result")
    active = active_tokens(mask, valid)
    cleared = torch.where(valid, sequence_scores.double(), 0.0)
    cost = None if kl is None else torch.where(active, kl.double(), 0.0)
    returns = objective if isinstance(objective, StableReinforce | ReinforcePP) else None
    per_token = token_rewards(cleared, cost, mask, beta=objective.beta, clip=math.inf)
    raw = discounted_returns(per_token, active, returns.gamma if returns else 1.0)
    of = moments(raw, mask, valid, weighting=returns.weighting if returns else "token", reduce=reduce)
    if not bool(torch.isfinite(of.std)):
        raise NonFiniteError(
            f"the advantages of {int(of.count)} tokens or sequences have mean {float(of.mean)} and deviation "
            f"{float(of.std)}: a reward or a reference log-prob is not finite; mark such samples as not valid"
        )
    z = normalize(raw, of, mask, valid, mode=returns.normalization if returns else "paper")
    kept = _filter(objective, z, of, mask, valid)
    values = torch.where(kept.keep, z if returns else raw, 0.0)
    return Advantages(
        values=values.float(),
        raw=raw.float(),
        keep=kept.keep,
        mean=float(of.mean),
        std=float(of.std),
        sums={
            "tokens": active.sum().double(),
            "filter_low": kept.low,
            "filter_high": kept.high,
            "filter_nan": kept.nan,
        },
    )


def _filter(objective: PolicyGradient, z: Tensor, of: Moments, mask: Tensor, valid: Tensor) -> filters.Filtered:
    rule = objective.filter
    if rule.mode == "release":
        return filters.release(z, of.mean, mask, valid, k=rule.k, guard=rule.guard)
    return filters.paper(z, mask, valid, k=rule.k if rule.mode == "paper" else math.inf)


def advantages(
    objective: PolicyGradient,
    rewards: Tensor,
    kl: Tensor | None,
    group_ids: Tensor,
    mask: Tensor,
    valid: Tensor,
    reduce: Reduce = one_rank,
) -> Advantages:
    """``scores`` and ``token_advantages`` in one, for a caller whose sequences are whole groups.

    Arguments, result and errors are theirs; [N] and [N, T] speak of the same sequences.
    """
    return token_advantages(objective, scores(objective, rewards, group_ids, valid), kl, mask, valid, reduce)


def denominator(algorithm: PolicyGradient | Sft, mask: Tensor, valid: Tensor, max_new_tokens: int) -> Tensor:
    """These sequences' part of the mean loss's denominator, by the algorithm's aggregation; see ``losses``.

    The caller sums it over the mini-batch's micro-batches and ranks and leaves out a step whose sum is 0: there is
    nothing to learn from.
    """
    return losses.denominator(mask, valid, algorithm.aggregation, max_new_tokens)


def policy_loss(
    objective: PolicyGradient,
    current: Tensor,
    proximal: Tensor,
    behaviour: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    valid: Tensor,
    denominator: float,
) -> LossParts:
    """The policy loss of a micro-batch: Σ of w·ℓ + β·kl by the aggregation, over the mini-batch's denominator.

    ℓ is PPO's clipped loss on r = exp(Pre-CLIP(current − proximal)). The importance weight w (proximal against
    behaviour) multiplies ℓ outside the clip and takes no part in Pre-CLIP; the divergence in the loss, where the
    run has it there, is differentiable through ``current`` and not weighted. No gradient flows for tokens outside
    Pre-CLIP's bounds or in the clamped branch of PPO's clip, but for the divergence's.

    Args:
        objective: the run file's ``objective``; a correction that is still ``auto`` is off.
        current: log π of the policy under training [N, T], differentiable.
        proximal: log-probs at the iteration's start [N, T].
        behaviour: the engine's log-probs [N, T].
        reference: log π_ref [N, T]; None without a reference policy.
        advantages: ``Advantages.values`` [N, T].
        mask: completion tokens [N, T].
        valid: sequences that count [N].
        denominator: of the whole mini-batch, over micro-batches and ranks: valid sequences (``sequence``), active
            tokens (``token``), or valid sequences times max_new_tokens (``constant``).

    Raises:
        ValueError: ``denominator`` is not above 0, or β > 0 in the loss without ``reference``.
    """
    check_tokens(mask, current, proximal, behaviour, advantages, *(() if reference is None else (reference,)))
    active = active_tokens(mask, valid)
    current, proximal, behaviour, advantages = (
        torch.where(active, values, 0.0) for values in (current, proximal.detach(), behaviour, advantages)
    )
    log_ratio = current - proximal
    clamped, outside = losses.pre_clip(log_ratio, *objective.pre_clip.log_bounds)
    ratio = clamped.exp()
    per_token, clipped = losses.ppo_clip(ratio, advantages, clip=objective.clip, clip_high=objective.clip_high)
    given = objective.correction
    weights, capped = losses.importance_weights(
        proximal, behaviour, active, mode=given.weighs(ahead=False), cap=given.cap, beyond=given.beyond
    )
    per_token = weights * per_token
    cleared = None if reference is None else torch.where(active, reference, 0.0)
    if objective.beta > 0.0 and objective.kl.placement == "loss":
        per_token = per_token + objective.beta * _divergence(objective, current, cleared)
    numerator = losses.aggregate(per_token, mask, valid, objective.aggregation)
    hits = {
        "pre_clip_hits": outside,
        "clip_hits": clipped,
        "nonfinite": ~log_ratio.isfinite(),
        "ratio": ratio,
        "approx_kl": divergence.k3(proximal, current),
        "kl": torch.zeros_like(proximal) if cleared is None else divergence.k1(proximal, cleared),
        "weight": weights,
        "weight_capped": capped,
        "gap": (proximal - behaviour).abs(),
    }
    return LossParts(
        loss=_share(numerator, denominator),
        sums=_sums(numerator, active, valid, hits),
        ratio=ratio.detach(),
        pre_clipped=outside,
        clipped=clipped,
        weights=weights,
    )


def _share(numerator: Tensor, denominator: float) -> Tensor:
    if not 0.0 < denominator < math.inf:
        raise ValueError(f"the loss's denominator is {denominator}: a mini-batch without valid sequences has no step")
    return (numerator / denominator).float()


def _sums(numerator: Tensor, active: Tensor, valid: Tensor, per_token: Mapping[str, Tensor]) -> dict[str, Tensor]:
    totals = {"tokens": active.sum().double(), "sequences": valid.sum().double(), "loss": numerator.detach()}
    for name, values in per_token.items():
        totals[name] = torch.where(active, values.detach().double(), 0.0).sum()
    return totals


def sft_loss(algorithm: Sft, current: Tensor, mask: Tensor, valid: Tensor, denominator: float) -> LossParts:
    """Cross-entropy of a micro-batch of traces by the aggregation, over the mini-batch's denominator.

    Args:
        algorithm: the run file's ``algorithm``.
        current: log π of the trace's tokens [N, T], differentiable.
        mask: completion tokens [N, T].
        valid: sequences that count [N].
        denominator: of the whole mini-batch: active tokens (``token``) or valid sequences (``sequence``).

    Returns:
        loss and sums as of ``policy_loss``; ``sums`` has ``tokens``, ``sequences``, ``loss`` and ``nonfinite``.

    Raises:
        ValueError: ``denominator`` is not above 0.
    """
    per_token = losses.cross_entropy(current, mask, valid)
    numerator = losses.aggregate(per_token, mask, valid, algorithm.aggregation)
    sums = _sums(numerator, active_tokens(mask, valid), valid, {"nonfinite": ~per_token.isfinite()})
    return LossParts(loss=_share(numerator, denominator), sums=sums)
