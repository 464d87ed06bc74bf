"""The judge of parity tests: one iteration in one process, in plain PyTorch, written to be obviously right.

It shares no formula with ``algorithms``: sequences are lists without padding or mask, advantages are Python floats,
means are sums divided by counts. Only the order of the mini-batches is the learner's own function. Weights are
float32; there is no Ray, no DeepSpeed and no store.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steadyhelm.algorithms.minibatches import minibatches
from steadyhelm.config.algorithm import GROUPED, DrGrpo, Grpo, PolicyGradient, ReinforcePP, Sft, StableReinforce
from steadyhelm.config.run import RunFile
from steadyhelm.data.types import Rewards, Trajectory
from steadyhelm.models.batch import TokenSequence, collate
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.logprobs import completion_logprobs

Logprobs = Callable[[torch.nn.Module, Trajectory], Tensor]
"""Log-probs [T] of a trajectory's completion under the model, differentiable."""


def unpadded_logprobs(encoder: PromptEncoder, temperature: float) -> Logprobs:
    """Log-probs of one trajectory at a time: rows of a batch of one know no padding.

    Args:
        encoder: of the model's folder; it fetches images by key.
        temperature: the run's.
    """

    def logprobs(model: torch.nn.Module, trajectory: Trajectory) -> Tensor:
        batch = collate([TokenSequence.of(trajectory)], encoder)
        return completion_logprobs(model, batch, temperature=temperature, banned_ids=encoder.banned_ids)[0][0]

    return logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleIteration:
    """What an iteration came to.

    ``losses``, ``grad_norms`` (before clipping) and ``rates`` have one number per optimiser step. ``advantages`` has
    one list per trajectory with one number per token (all 0 for an unscored one), ``mean`` and ``std`` are those of
    the raw advantages. The counts are tokens, those of the clips summed over steps. In supervised fine-tuning all
    but the first three are empty or 0.
    """

    losses: list[float]
    grad_norms: list[float]
    rates: list[float]
    advantages: list[list[float]]
    mean: float
    std: float
    filtered_low: int
    filtered_high: int
    pre_clip_hits: int
    clip_hits: int


@dataclass(slots=True)
class _Batch:
    """An iteration's sequences; ``advantages`` and ``proximal`` are made before the first step."""

    trajectories: Sequence[Trajectory]
    valid: list[bool]
    reference: Sequence[NDArray[np.float32]] | None
    proximal: list[Tensor]
    advantages: list[list[float]]
    pre_clip_hits: int = 0
    clip_hits: int = 0


class Oracle:
    """Steps ``model`` in place, as the learner of ``run`` must.

    Args:
        model: float32, on the CPU.
        run: the run file.
        logprobs: how a trajectory is scored.
    """

    def __init__(self, model: torch.nn.Module, run: RunFile, logprobs: Logprobs) -> None:
        for name, parameter in model.named_parameters():
            if name.startswith(run.learner.freeze):
                parameter.requires_grad_(False)
        self.model = model
        self.run = run
        self.logprobs = logprobs
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=run.learner.lr,
            betas=run.learner.betas,
            eps=run.learner.eps,
            weight_decay=run.learner.weight_decay,
        )

    def iterate(
        self,
        iteration: int,
        trajectories: Sequence[Trajectory],
        rewards: Rewards | None = None,
        reference: Sequence[NDArray[np.float32]] | None = None,
    ) -> OracleIteration:
        """All optimiser steps of ``iteration`` (from 1).

        Args:
            iteration: decides the order of the mini-batches.
            trajectories: the batch in the manifest's order.
            rewards: their scores; None in supervised fine-tuning, where all are valid.
            reference: log-probs [T] of the reference policy for each, where β > 0.
        """
        algorithm = self.run.algorithm if self.run.is_sft else self.run.objective
        count = len(trajectories)
        valid = [True] * count if rewards is None else [bool(flag) for flag in rewards.valid]
        batch = _Batch(trajectories, valid, reference, [], [])
        mean = std = 0.0
        low = high = 0
        if not isinstance(algorithm, Sft):
            assert rewards is not None
            with torch.no_grad():
                batch.proximal = [self.logprobs(self.model, trajectory) for trajectory in trajectories]
            raw = _raw_advantages(algorithm, batch, [float(total) for total in rewards.total])
            mean, std = _moments(algorithm, raw, valid)
            batch.advantages, low, high = _final_advantages(algorithm, raw, valid, mean, std)
        losses: list[float] = []
        norms: list[float] = []
        rates: list[float] = []
        for epoch in range(1 if isinstance(algorithm, Sft) else algorithm.epochs):
            for chosen in minibatches(count, self.run.learner.train_batch, self.run.seed, iteration, epoch):
                members = [int(i) for i in chosen if valid[int(i)]]
                if members:
                    loss = self._loss(batch, members)
                    norm, rate = self._step(loss, (iteration - 1) * self.run.steps_per_iteration + len(losses))
                    losses.append(loss.item())
                    norms.append(norm)
                    rates.append(rate)
        return OracleIteration(
            losses=losses,
            grad_norms=norms,
            rates=rates,
            advantages=batch.advantages,
            mean=mean,
            std=std,
            filtered_low=low,
            filtered_high=high,
            pre_clip_hits=batch.pre_clip_hits,
            clip_hits=batch.clip_hits,
        )

    def _loss(self, batch: _Batch, members: list[int]) -> Tensor:
        """The mean loss of a mini-batch's valid trajectories."""
        algorithm = self.run.algorithm if self.run.is_sft else self.run.objective
        per_sequence: list[Tensor] = []
        for i in members:
            current = self.logprobs(self.model, batch.trajectories[i])
            per_sequence.append(-current if isinstance(algorithm, Sft) else _policy_loss(algorithm, batch, i, current))
        if algorithm.aggregation == "token":
            everything = torch.cat(per_sequence)
            return everything.sum() / len(everything)
        if algorithm.aggregation == "constant":
            return _total([part.sum() / self.run.rollout.max_new_tokens for part in per_sequence]) / len(members)
        return _total([part.mean() for part in per_sequence if len(part)]) / len(members)

    def _step(self, loss: Tensor, place: int) -> tuple[float, float]:
        """Backward, norm, clip, update; returns the norm and the learning rate.

        ``place`` counts the run's optimiser steps from 0; iterations whose mini-batches were not all stepped (nothing
        valid in one) leave gaps.
        """
        learner = self.run.learner
        total = self.run.schedule.iterations * self.run.steps_per_iteration
        if place < learner.warmup_steps:
            rate = learner.lr * (place + 1) / learner.warmup_steps
        else:
            progress = (place - learner.warmup_steps) / max(1, total - learner.warmup_steps)
            lowest = learner.min_lr_ratio * learner.lr
            share = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
            rate = lowest + (learner.lr - lowest) * share[learner.schedule]
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, learner.max_norm))
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return norm, rate


def _total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum() if parts else torch.zeros((), requires_grad=True)


def _kl(objective: PolicyGradient, logprobs: Tensor, reference: NDArray[np.float32]) -> Tensor:
    gap = logprobs - torch.from_numpy(np.array(reference))
    return gap if objective.kl.estimator == "k1" else torch.exp(-gap) - 1 + gap


def _raw_advantages(objective: PolicyGradient, batch: _Batch, totals: list[float]) -> list[list[float]]:
    """Per trajectory and token, before normalisation; empty for unscored trajectories."""
    heads = _heads(objective, batch, totals)
    gamma = objective.gamma if isinstance(objective, StableReinforce | ReinforcePP) else 1.0
    raw: list[list[float]] = []
    for i, valid in enumerate(batch.valid):
        if not valid:
            raw.append([])
            continue
        rewards = [0.0] * len(batch.proximal[i])
        if objective.beta > 0 and objective.kl.placement == "reward":
            assert batch.reference is not None
            rewards = [-objective.beta * float(k) for k in _kl(objective, batch.proximal[i], batch.reference[i])]
        if rewards:
            rewards[-1] += heads[i]
        advantages = [sum(gamma**j * reward for j, reward in enumerate(rewards[t:])) for t in range(len(rewards))]
        raw.append(advantages)
    return raw


def _heads(objective: PolicyGradient, batch: _Batch, totals: list[float]) -> list[float]:
    """What arrives at each trajectory's last token: its clamped reward, or its advantage in its group."""
    if isinstance(objective, StableReinforce | ReinforcePP):
        return [min(max(total, -objective.reward_clip), objective.reward_clip) for total in totals]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, trajectory in enumerate(batch.trajectories):
        if batch.valid[i]:
            groups[trajectory.prompt.group_id].append(i)
    heads = [0.0] * len(totals)
    for members in groups.values():
        if len(members) == 1:
            continue
        mean = statistics.fmean(totals[i] for i in members)
        deviation = statistics.stdev(totals[i] for i in members)
        for i in members:
            if isinstance(objective, Grpo):
                heads[i] = (totals[i] - mean) / (deviation + 1e-8) if deviation > 1e-6 * max(1.0, abs(mean)) else 0.0
            elif isinstance(objective, DrGrpo):
                heads[i] = totals[i] - mean
            else:
                heads[i] = totals[i] - statistics.fmean(totals[j] for j in members if j != i)
    return heads


def _moments(objective: PolicyGradient, raw: list[list[float]], valid: list[bool]) -> tuple[float, float]:
    """Mean and population deviation over all tokens, or with every sequence counting once."""
    sequences = [advantages for advantages, counts in zip(raw, valid, strict=True) if counts and advantages]
    if not sequences:
        return 0.0, 0.0
    if isinstance(objective, StableReinforce | ReinforcePP) and objective.weighting == "sequence":
        mean = statistics.fmean(statistics.fmean(s) for s in sequences)
        return mean, math.sqrt(statistics.fmean(statistics.fmean((a - mean) ** 2 for a in s) for s in sequences))
    tokens = [advantage for sequence in sequences for advantage in sequence]
    mean = statistics.fmean(tokens)
    return mean, math.sqrt(statistics.fmean((a - mean) ** 2 for a in tokens))


def _final_advantages(
    objective: PolicyGradient, raw: list[list[float]], valid: list[bool], mean: float, std: float
) -> tuple[list[list[float]], int, int]:
    """Normalised and filtered advantages, and how many tokens the filter found too low and too high."""
    rule = objective.filter
    release = isinstance(objective, StableReinforce | ReinforcePP) and objective.normalization == "release"
    result: list[list[float]] = []
    low = high = 0
    for advantages, counts in zip(raw, valid, strict=True):
        kept: list[float] = []
        for advantage in advantages if counts else []:
            if std <= 1e-6 * max(1.0, abs(mean)):
                z = 0.0
            elif release:
                z = (advantage - mean) / math.sqrt(max(std**2, 1e-8)) + 1e-8
            else:
                z = (advantage - mean) / (std + 1e-8)
            if rule.mode == "paper":
                too_low, too_high = z < -rule.k, z > rule.k
            elif rule.mode == "release":
                too_low = z < max(mean - rule.k, -rule.guard)
                too_high = not too_low and z > min(mean + rule.k, rule.guard)
            else:
                too_low = too_high = False
            low += too_low
            high += too_high
            kept.append(0.0 if too_low or too_high else advantage if isinstance(objective, GROUPED) else z)
        result.append(kept)
    return result, low, high


def _policy_loss(objective: PolicyGradient, batch: _Batch, i: int, current: Tensor) -> Tensor:
    """Loss per token [T] of trajectory ``i``."""
    proximal, advantages = batch.proximal[i], torch.tensor(batch.advantages[i])
    log_ratio = current - proximal
    if objective.pre_clip.enabled:
        least, most = math.log(objective.pre_clip.min), math.log(objective.pre_clip.max)
        batch.pre_clip_hits += int(((log_ratio < least) | (log_ratio > most)).sum())
        log_ratio = torch.clip(log_ratio, least, most)
    ratio = torch.exp(log_ratio)
    highest = 1 + (objective.clip if objective.clip_high is None else objective.clip_high)
    bounded = torch.clip(ratio, 1 - objective.clip, highest)
    batch.clip_hits += int((bounded * advantages < ratio * advantages).sum())
    gain = torch.min(ratio * advantages, bounded * advantages)
    if objective.correction.mode != "off":
        drift = proximal - torch.from_numpy(np.array(batch.trajectories[i].logprobs))
        weight = torch.exp(drift.sum() if objective.correction.mode == "sequence" else drift)
        cap = objective.correction.cap
        if objective.correction.beyond == "mask":
            gain = gain * weight * ((weight >= 1 / cap) & (weight <= cap))
        else:
            gain = gain * torch.clip(weight, max=cap)
    if objective.beta > 0 and objective.kl.placement == "loss":
        assert batch.reference is not None
        return objective.beta * _kl(objective, current, batch.reference[i]) - gain
    return -gain
