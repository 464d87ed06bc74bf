"""What an iteration's rows are trained towards: a policy-gradient objective, or the traces themselves.

Both answer ``loss`` for the rows of a micro-batch; borrowed rows count as not valid, so that their gradient is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from steadyhelm.algorithms.objective import LossParts, advantages, policy_loss, reward_divergence, sft_loss
from steadyhelm.config.algorithm import PolicyGradient, Sft
from steadyhelm.errors import NonFiniteError
from steadyhelm.services.learner import collectives
from steadyhelm.services.learner.batch import IterationBatch
from steadyhelm.telemetry import metrics as names


class Target(Protocol):
    """The loss of an iteration."""

    def loss(
        self, rows: Sequence[int], current: torch.Tensor, *, counted: Sequence[bool], fresh: bool, denominator: float
    ) -> LossParts:
        """The micro-batch's share of the optimiser step's loss.

        Args:
            rows: its positions in the iteration's batch.
            current: log-probs [n, T] under the parameters now, differentiable.
            counted: [n], False for a borrowed row, which has no say.
            fresh: whether the parameters are still those that the iteration started with.
            denominator: of the whole optimiser step.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What is known once per iteration; the same on all ranks."""
        ...


class TraceTarget:
    """Cross-entropy on the traces."""

    def __init__(self, algorithm: Sft, batch: IterationBatch) -> None:
        self._algorithm = algorithm
        self._batch = batch

    def loss(
        self, rows: Sequence[int], current: torch.Tensor, *, counted: Sequence[bool], fresh: bool, denominator: float
    ) -> LossParts:
        """The micro-batch's share of the mean cross-entropy."""
        picked = torch.tensor(rows)
        mask = self._batch.mask[picked, : current.shape[1]].to(current.device)
        valid = (self._batch.valid[picked] & torch.tensor(counted)).to(current.device)
        return sft_loss(self._algorithm, current, mask, valid, denominator)

    def metrics(self) -> dict[str, float]:
        """None: cross-entropy is all there is."""
        return {}


class PolicyTarget:
    """A policy-gradient objective on sampled completions.

    The proximal log-probs are filled in by ``remember`` before the first optimiser step, or by ``loss`` itself where
    the parameters are still those of the iteration's start: then current and proximal are one and the same. Advantages
    are computed on all rows by every rank alike, so their statistics are global without a collective.
    """

    def __init__(self, objective: PolicyGradient, batch: IterationBatch) -> None:
        self._objective = objective
        self._batch = batch
        self._proximal = torch.zeros_like(batch.behaviour)
        self._mine = torch.zeros(len(batch), dtype=torch.bool)  # rows whose log-probs this rank computed
        _check_finite(batch)
        if not self.needs_proximal_first:
            self.set_advantages()

    @property
    def needs_proximal_first(self) -> bool:
        """Whether advantages depend on proximal log-probs: the divergence from the reference is in the reward."""
        return self._objective.beta > 0.0 and self._objective.kl.placement == "reward"

    def remember(self, rows: Sequence[int], logprobs: torch.Tensor, counted: Sequence[bool]) -> None:
        """Takes the proximal log-probs [n, T] of those of ``rows`` that count."""
        kept = torch.tensor(counted)
        picked = torch.tensor(rows)[kept]
        self._proximal[picked, : logprobs.shape[1]] = logprobs.detach().cpu()[kept]
        self._mine[picked] = True

    def share_proximal(self) -> None:
        """Gives every rank the proximal log-probs of all rows, of which each rank remembers its own."""
        self._proximal = collectives.summed(torch.where(self._mine[:, None], self._proximal, 0.0))

    def set_advantages(self) -> None:
        """Computes the advantages of all rows."""
        batch = self._batch
        kl = reward_divergence(self._objective, self._proximal, batch.reference)
        self._advantages = advantages(self._objective, batch.rewards, kl, batch.group_ids, batch.mask, batch.valid)

    def loss(
        self, rows: Sequence[int], current: torch.Tensor, *, counted: Sequence[bool], fresh: bool, denominator: float
    ) -> LossParts:
        """The micro-batch's share of the policy loss."""
        if fresh:
            self.remember(rows, current, counted)
        batch = self._batch
        picked = torch.tensor(rows)
        width = current.shape[1]
        mask, proximal, behaviour, values = (
            tensor[picked, :width].to(current.device)
            for tensor in (batch.mask, self._proximal, batch.behaviour, self._advantages.values)
        )
        reference = None if batch.reference is None else batch.reference[picked, :width].to(current.device)
        valid = (batch.valid[picked] & torch.tensor(counted)).to(current.device)
        return policy_loss(
            self._objective,
            current,
            current.detach() if fresh else proximal,
            behaviour,
            reference,
            values,
            mask,
            valid,
            denominator,
        )

    def metrics(self) -> dict[str, float]:
        """Advantages, filter and the gap to the engine, of the rows that count."""
        found = self._advantages
        tokens = max(1.0, float(found.sums["tokens"]))
        mine = self._batch.mask & (self._batch.valid & self._mine)[:, None]
        gap = torch.where(mine, self._proximal - self._batch.behaviour, 0.0).abs()
        metrics: dict[str, float] = {
            names.ADVANTAGE_MEAN: found.mean,
            names.ADVANTAGE_STD: found.std,
            names.FILTER_LOW: float(found.sums["filter_low"]) / tokens,
            names.FILTER_HIGH: float(found.sums["filter_high"]) / tokens,
            names.LOGPROB_GAP_MAX: collectives.largest(float(gap.max()) if gap.numel() else 0.0),
        }
        if self._batch.reference is not None:
            total = torch.where(mine, self._proximal - self._batch.reference, 0.0).double().sum()
            metrics[names.KL] = float(collectives.summed(total)) / tokens
        return metrics


def _check_finite(batch: IterationBatch) -> None:
    """Raises NonFiniteError where a row that counts has a reward or a log-prob that is not finite."""
    given = {"reward": (batch.rewards[:, None], "correct the reward term")}
    given["engine's log-probs"] = (batch.behaviour, "look at the engine that sampled them")
    if batch.reference is not None:
        given["reference log-probs"] = (batch.reference, "look at the reference model")
    for what, (values, remedy) in given.items():
        broken = torch.nonzero(batch.valid & ~values.isfinite().all(1)).flatten().tolist()
        if broken:
            raise NonFiniteError(
                f"iteration {batch.iteration}: the {what} of prompts {prompt_ids(batch, broken)} are not finite; "
                f"nothing was applied and the last checkpoint is kept: {remedy}"
            )


def prompt_ids(batch: IterationBatch, rows: Sequence[int], limit: int = 8) -> str:
    """The prompt ids of ``rows`` for a message, the first ``limit`` of them."""
    shown = ", ".join(str(batch.trajectories[row].prompt.prompt_id) for row in rows[:limit])
    return shown if len(rows) <= limit else f"{shown} and {len(rows) - limit} more"


def batch_metrics(batch: IterationBatch) -> Mapping[str, float]:
    """Lengths and truncation of all the iteration's completions, and the age of those that count."""
    lengths = batch.mask.sum(1).double()
    count = max(1, len(batch))
    ages = torch.where(batch.valid[:, None], batch.ages, 0)
    tokens = max(1.0, float(lengths[batch.valid].sum()))
    return {
        names.LENGTH_MEAN: float(lengths.sum()) / count,
        names.LENGTH_MAX: float(lengths.max()) if len(batch) else 0.0,
        names.TRUNCATED_RATE: sum(row.finish == "length" for row in batch.trajectories) / count,
        names.STALENESS_MEAN: float(ages.sum()) / tokens,
        names.STALENESS_MAX: float(ages.max()) if ages.numel() else 0.0,
    }
