"""One iteration's optimiser steps on one rank, in lock-step with the others.

Losses carry the global denominators of their optimiser step, and gradients are summed over micro-batches and ranks: the
result does not depend on how rows are cut into micro-batches, padded or dealt to ranks beyond the order of floats.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from steadyhelm.algorithms.minibatches import minibatches
from steadyhelm.algorithms.objective import LossParts, denominator
from steadyhelm.config.algorithm import Sft
from steadyhelm.config.run import RunFile
from steadyhelm.data.types import ImageKey
from steadyhelm.errors import NonFiniteError
from steadyhelm.models.batch import ModelBatch, TokenSequence, collate
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.services.learner import collectives, plan
from steadyhelm.services.learner.batch import IterationBatch
from steadyhelm.services.learner.engine import TrainEngine
from steadyhelm.services.learner.prefetch import prefetched
from steadyhelm.services.learner.rates import learning_rate
from steadyhelm.services.learner.targets import PolicyTarget, Target, TraceTarget, batch_metrics, prompt_ids
from steadyhelm.telemetry import metrics as names
from steadyhelm.telemetry import span

_SUMS = (
    "tokens",
    "entropy",
    "pre_clip_hits",
    "clip_hits",
    "ratio",
    "approx_kl",
    "weight",
    "weight_capped",
    "gap",
)
"""What is summed over tokens, micro-batches, optimiser steps and ranks; ``entropy`` is added here to ``LossParts``'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserStep:
    """The rows of one optimiser step, its loss's denominator over all ranks, and this rank's micro-batches.

    A micro-batch is its rows and which of them count; borrowed ones do not.
    """

    epoch: int
    rows: NDArray[np.int64]
    denominator: float
    micro_batches: list[tuple[list[int], list[bool]]]


def _scored_first(target: Target, steps: Sequence[OptimiserStep]) -> list[OptimiserStep]:
    """The steps whose rows need proximal log-probs from a pass of their own, before the first optimiser step.

    The first step's do not: its forward passes run under the iteration's first parameters anyway.
    """
    if not isinstance(target, PolicyTarget):
        return []
    return [step for step in steps[0 if target.needs_proximal_first else 1 :] if step.epoch == 0]


def _images(batch: IterationBatch, rows: Iterable[int]) -> set[ImageKey]:
    return {key for row in set(rows) for key in batch.trajectories[row].prompt.images}


@dataclass(slots=True)
class Tally:
    """What this rank has summed up in the iteration so far."""

    sums: dict[str, torch.Tensor | float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))
    loss: torch.Tensor | float = 0.0
    grad_norms: list[float] = field(default_factory=list)
    lr: float = 0.0

    def add(self, parts: LossParts, entropy: torch.Tensor) -> None:
        """Adds a micro-batch."""
        self.loss = self.loss + parts.loss.detach().double()
        for name, value in {**parts.sums, "entropy": entropy}.items():
            if name in self.sums:
                self.sums[name] = self.sums[name] + value


class Training:
    """Steps the engine through iterations' batches.

    Args:
        engine: around a ``models.logprobs.CompletionScorer``.
        encoder: of the model folder, with an image fetcher.
        run: the run file.
    """

    def __init__(self, engine: TrainEngine, encoder: PromptEncoder, run: RunFile) -> None:
        self._engine = engine
        self._encoder = encoder
        self._run = run
        self._device = collectives.device()

    def iteration(self, batch: IterationBatch) -> dict[str, float]:
        """All optimiser steps of the iteration; returns its metrics, the same on all ranks.

        Raises:
            NonFiniteError: a reward, a loss or a gradient is not finite, on all ranks alike; that optimiser step was
                not applied.
            DataError: a row cannot be passed through the model.
        """
        start = time.monotonic()
        steps = self._plan(batch)
        algorithm = self._run.algorithm
        target = (
            TraceTarget(algorithm, batch) if isinstance(algorithm, Sft) else PolicyTarget(self._run.objective, batch)
        )
        scored = _scored_first(target, steps)
        order = [rows for step in (*scored, *steps) for rows, _ in step.micro_batches]
        tally = Tally()
        with self._inputs(batch, order) as inputs:
            if isinstance(target, PolicyTarget):
                self._remember_proximal(target, scored, inputs)
            for number, step in enumerate(steps):
                if isinstance(target, PolicyTarget) and step.epoch == 1 and steps[number - 1].epoch == 0:
                    target.share_proximal()  # rows are dealt anew in each epoch
                self._optimiser_step(batch, target, step, inputs, number, tally)
        return {
            **batch_metrics(batch),
            **target.metrics(),
            **self._metrics(tally, len(steps), time.monotonic() - start),
        }

    @contextmanager
    def _inputs(self, batch: IterationBatch, order: Sequence[Sequence[int]]) -> Iterator[Iterator[ModelBatch]]:
        """The micro-batches of these rows, one after the other, with what can be done ahead done ahead.

        Beside a GPU that is all of it. On the CPU another thread would take its time from the forward pass: there only
        images are fetched and prepared ahead, which the encoder keeps.
        """
        collate = partial(self._collate, batch)
        if self._device.type == "cuda":
            with prefetched(collate, order) as inputs:
                yield inputs
        elif self._encoder.keeps(_images(batch, itertools.chain(*order))):
            yield (self._made(collate, rows) for rows in order)
        else:
            with prefetched(partial(self._prepare_images, batch), order) as ready:
                yield (self._made(collate, rows) for rows, _ in zip(order, ready, strict=True))

    @staticmethod
    def _made(collate: Callable[[Sequence[int]], ModelBatch], rows: Sequence[int]) -> ModelBatch:
        with span("learner", "input"):  # nothing computes meanwhile
            return collate(rows)

    def _prepare_images(self, batch: IterationBatch, rows: Sequence[int]) -> None:
        with span("learner", "images"):
            self._encoder.keep(_images(batch, rows))

    def _plan(self, batch: IterationBatch) -> list[OptimiserStep]:
        run, algorithm = self._run, self._run.algorithm
        if not bool(batch.valid.any()):
            return []  # nothing to learn from
        pad = self._padding(batch)
        epochs = 1 if isinstance(algorithm, Sft) else algorithm.epochs
        steps = []
        for epoch in range(epochs):
            for chosen in minibatches(len(batch), run.learner.train_batch, run.seed, batch.iteration, epoch):
                rows = batch.valid_rows(chosen)
                picked = torch.from_numpy(rows)
                total = float(
                    denominator(algorithm, batch.mask[picked], batch.valid[picked], run.rollout.max_new_tokens)
                )
                if total > 0:  # a step of unscored rows only has nothing to learn from
                    dealt = plan.deal(rows, batch.lengths, self._engine.world_size, run.learner.micro_batch)
                    mine = [pad(micro_batch) for micro_batch in dealt[self._engine.rank]]
                    steps.append(OptimiserStep(epoch=epoch, rows=rows, denominator=total, micro_batches=mine))
        return steps

    def _padding(self, batch: IterationBatch) -> Callable[[NDArray[np.int64]], tuple[list[int], list[bool]]]:
        """``plan.padded`` for this batch."""
        valid: NDArray[np.bool_] = batch.valid.numpy()
        with_images = np.array([len(row.prompt.images) > 0 for row in batch.trajectories], np.bool_)
        needed = self._engine.stage == 3 and self._engine.world_size > 1 and bool((with_images & valid).any())
        usable = with_images & valid if needed else valid
        filler = int(np.argmin(np.where(usable, batch.lengths, np.iinfo(np.int64).max)))
        return lambda micro_batch: plan.padded(micro_batch, filler, with_images if needed else None)

    def _remember_proximal(
        self, target: PolicyTarget, steps: Sequence[OptimiserStep], inputs: Iterator[ModelBatch]
    ) -> None:
        for step in steps:
            for rows, counted in step.micro_batches:
                part = next(inputs)
                with span("learner", "proximal", computes=True), torch.no_grad():
                    logprobs, _, _ = self._engine.forward(part)
                target.remember(rows, logprobs, counted)
        if target.needs_proximal_first:
            target.share_proximal()
            target.set_advantages()

    def _collate(self, batch: IterationBatch, rows: Sequence[int]) -> ModelBatch:
        with span("learner", "collate"):
            sequences = [TokenSequence.of(batch.trajectories[row]) for row in rows]
            return collate(sequences, self._encoder).to(self._device)

    def _optimiser_step(
        self,
        batch: IterationBatch,
        target: Target,
        step: OptimiserStep,
        inputs: Iterator[ModelBatch],
        number: int,
        tally: Tally,
    ) -> None:
        broken = torch.zeros((), dtype=torch.float64, device=self._device)
        suspects: list[tuple[Sequence[int], torch.Tensor]] = []
        for index, (rows, counted) in enumerate(step.micro_batches):
            part = next(inputs)
            with span("learner", "forward", computes=True):
                current, entropy, mask = self._engine.forward(part)
                parts = target.loss(rows, current, counted=counted, fresh=number == 0, denominator=step.denominator)
                counts = torch.tensor(counted, device=current.device)
                tally.add(parts, torch.where(mask & counts[:, None], entropy, 0.0).double().sum())
                broken = broken + ~parts.loss.detach().isfinite() + parts.sums["nonfinite"]
                suspects.append((rows, counts & ~current.detach().isfinite().all(1)))
                last = index == len(step.micro_batches) - 1
                failed = last and collectives.any_rank(float(broken) > 0)
            with span("learner", "backward", computes=True):
                # A failed step's gradient is made infinite on all ranks, so that the optimiser clears it unapplied
                self._engine.accumulate(parts.loss * math.nan if failed else parts.loss, last=last)
        tally.lr = self._rate(batch.iteration, number)
        with span("learner", "optimizer", computes=True):
            norm = self._engine.apply(tally.lr)
        if not math.isfinite(norm):
            raise self._not_finite(batch, step, suspects, "loss" if failed else "gradient")
        tally.grad_norms.append(norm)

    def _rate(self, iteration: int, number: int) -> float:
        """A function of the place in the run, so that a resumed run needs no counter."""
        steps = self._run.steps_per_iteration
        return learning_rate((iteration - 1) * steps + number, self._run.schedule.iterations * steps, self._run.learner)

    def _not_finite(
        self,
        batch: IterationBatch,
        step: OptimiserStep,
        suspects: Sequence[tuple[Sequence[int], torch.Tensor]],
        what: str,
    ) -> NonFiniteError:
        mine = [row for rows, bad in suspects for row, hit in zip(rows, bad.tolist(), strict=True) if hit]
        found = sorted({row for text in collectives.texts(json.dumps(mine)) for row in json.loads(text)})
        where = prompt_ids(batch, found or step.rows.tolist())
        return NonFiniteError(
            f"iteration {batch.iteration}: the {what} of the optimiser step on prompts {where} is not finite; the step "
            "was not applied and the last checkpoint is kept: go on from it with a lower "
            "learner.lr and --accept-changes, or look at these prompts"
        )

    def _metrics(self, tally: Tally, steps: int, seconds: float) -> dict[str, float]:
        total = collectives.sums({"loss": float(tally.loss), **{name: float(tally.sums[name]) for name in _SUMS}})
        tokens = max(1.0, total["tokens"])
        metrics = {
            names.LOSS: total["loss"] / max(1, steps),
            names.GRAD_NORM: sum(tally.grad_norms) / max(1, steps),
            names.LR: tally.lr,
            names.ENTROPY: total["entropy"] / tokens,
            names.LEARNER_STEPS: float(steps),
            names.LEARNER_TOKENS: total["tokens"],
            names.LEARNER_TOKENS_PER_S: total["tokens"] / seconds,
        }
        if not isinstance(self._run.algorithm, Sft):
            metrics |= {
                names.PRE_CLIP_HITS: total["pre_clip_hits"] / tokens,
                names.CLIP_FRACTION: total["clip_hits"] / tokens,
                names.RATIO_MEAN: total["ratio"] / tokens,
                names.POLICY_KL: total["approx_kl"] / tokens,
                names.LOGPROB_GAP_MEAN: total["gap"] / tokens,
                names.CORRECTION_MEAN: total["weight"] / tokens,
                names.CORRECTION_CAPPED: total["weight_capped"] / tokens,
            }
        return metrics
