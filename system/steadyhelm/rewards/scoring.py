"""Scoring samples with all terms of a run file."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steadyhelm.config.reward import ChoiceTerm, ConsistencyTerm, CustomTerm, FormatTerm, Reward, Term
from steadyhelm.data.types import FinishReason, Rewards
from steadyhelm.rewards.choice import choice_reward
from steadyhelm.rewards.composition import combine, component_name
from steadyhelm.rewards.consistency import Judge, consistency_rewards
from steadyhelm.rewards.format import format_reward
from steadyhelm.rewards.interface import Sample, Scope, Score, units


class UnitRunner(Protocol):
    """Runs custom terms, in processes of their own or here."""

    async def run(self, name: str, unit: Sequence[Sample]) -> list[Score]:
        """The scores of the term ``name`` for one unit of its scope, in order; failures are scores, never raised."""
        ...


async def score_samples(
    samples: Sequence[Sample],
    config: Reward,
    *,
    judge: Judge,
    scopes: Mapping[str, Scope],
    runner: UnitRunner | None = None,
    group_size: int = 1,
) -> Rewards:
    """The rewards of ``samples``, in their order; nothing fails open, and no sample's failure touches another's.

    Args:
        samples: N completions; for a term of a wider scope than ``sample``, whole units of them.
        config: terms and combination.
        judge: who compares thought and answer.
        scopes: the scope of each custom term, by name.
        runner: who runs custom terms; may be None where there are none.
        group_size: samples of a complete prompt group; a term of scope ``group`` leaves incomplete ones unscored.
    """
    scored = await asyncio.gather(
        *(_term_scores(term, samples, judge, scopes, runner, group_size) for term in config.terms)
    )
    names = [component_name(term) for term in config.terms]
    components = {
        name: np.array([np.nan if score.value is None else score.value for score in scores], dtype=np.float32)
        for name, scores in zip(names, scored, strict=True)
    }
    aborted = np.array([sample.finish is FinishReason.ABORT for sample in samples], dtype=np.bool_)
    total = combine(components, config)
    valid = np.isfinite(total) & ~aborted
    total[~valid] = np.nan
    detail = tuple(
        _detail(names, [scores[position] for scores in scored], aborted=bool(aborted[position]), valid=bool(is_valid))
        for position, is_valid in enumerate(valid)
    )
    return Rewards(total=total, valid=valid, components=components, detail=detail)


def means(rewards: Rewards) -> dict[str, float]:
    """Mean total and mean of each component over the valid samples, by ``mean`` and component name; NaN without any."""
    values: dict[str, NDArray[np.float32]] = {"mean": rewards.total, **rewards.components}
    if not rewards.valid.any():
        return dict.fromkeys(values, float("nan"))
    return {name: float(value[rewards.valid].mean(dtype=np.float64)) for name, value in values.items()}


async def _term_scores(
    term: Term,
    samples: Sequence[Sample],
    judge: Judge,
    scopes: Mapping[str, Scope],
    runner: UnitRunner | None,
    group_size: int,
) -> list[Score]:
    match term:
        case FormatTerm():
            return [Score(value=format_reward(sample.completion_text)) for sample in samples]
        case ChoiceTerm():
            return [choice_reward(sample, term.mode) for sample in samples]
        case ConsistencyTerm():
            return await consistency_rewards(samples, judge, lines=term.lines, values=term.values, mode=term.mode)
        case CustomTerm():
            assert runner is not None
            return await _custom_scores(term.name, samples, scopes[term.name], runner, group_size)


async def _custom_scores(
    name: str, samples: Sequence[Sample], scope: Scope, runner: UnitRunner, group_size: int
) -> list[Score]:
    """Scores [N] of a custom term, its units in parallel."""
    scores = [Score(value=None, error="its prompt's group is incomplete in this shard")] * len(samples)
    whole = [unit for unit in units(samples, scope) if scope != "group" or len(unit) == group_size]
    answers = await asyncio.gather(*(runner.run(name, [samples[position] for position in unit]) for unit in whole))
    for unit, answer in zip(whole, answers, strict=True):
        for position, score in zip(unit, answer, strict=True):
            scores[position] = score
    return scores


def _detail(names: Sequence[str], scores: Sequence[Score], *, aborted: bool, valid: bool) -> dict[str, Any]:
    """What a report shows of a sample: the terms' details, and under ``error`` why it is unscored."""
    detail: dict[str, Any] = {}
    errors = ["the engine aborted this completion"] if aborted else []
    for name, score in zip(names, scores, strict=True):
        detail |= score.detail
        if score.value is None:
            errors.append(f"{name}: {score.error}")
    if not valid:
        detail["error"] = "; ".join(errors) or "the weighted sum is not a finite float32"
    return detail
