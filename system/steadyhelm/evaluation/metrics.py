"""Metrics of a pairwise judge on held-out pairs, both orders of each unless told otherwise.

Pure functions of prompts and trajectories. An answer is read strictly (the first ``<answer>`` must hold 1 or 2); what
cannot be read is no vote, a prompt without a majority has no choice, and no choice is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from steadyhelm.data.types import FinishReason, Prompt, Trajectory
from steadyhelm.evaluation.intervals import clustered, wilson
from steadyhelm.evaluation.votes import majority
from steadyhelm.rewards.consistency import compare, judge_case
from steadyhelm.rewards.format import format_reward
from steadyhelm.rewards.response import strict_choice
from steadyhelm.telemetry import metrics as names

RULE = "strict <answer>1|2</answer>; unparsable answers are no vote, a tie or no vote is wrong"
"""How answers were counted; stands in every result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One pair in one order, as it was answered.

    ``votes`` has one entry per sample: 1, 2, or None where the answer could not be read. ``choice`` is their
    majority, None where there is none.

    Example: ``Item(pair_id="eval-3", swapped=True, label=2, votes=(2,), choice=2, correct=True)``
    """

    pair_id: str
    swapped: bool
    label: int
    votes: tuple[int | None, ...]
    choice: int | None
    correct: bool
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """The metrics of an evaluation; all rates are shares in [0, 1], intervals are 95 %.

    ``accuracy``: share of right choices over both orders. ``accuracy_unswapped`` and ``accuracy_swapped``: over the
    data set's own order and the opposite one. ``both_orders``: share of pairs right in both. Where the data set's own
    order alone was asked, ``accuracy`` is over that one, and what needs the other is None. ``first_slot``: share of
    "1" among the choices that were made (None without any); 0.5 is unbiased. ``always_first``: the accuracy
    that a judge that always says "1" gets on these prompts. ``unparsable``: share of completions without a readable
    answer. ``format`` and ``consistency``: share of completions in the asked format, and whose thought concludes what
    the answer says (no conclusion counts as not). ``truncated``: share cut at the token limit.
    """

    num_pairs: int
    votes_per_prompt: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    accuracy_unswapped: float
    accuracy_swapped: float | None
    both_orders: float | None
    both_orders_interval: tuple[float, float] | None
    first_slot: float | None
    always_first: float
    unparsable: float
    format: float
    consistency: float
    truncated: float
    length_mean: float
    items: tuple[Item, ...] = ()
    rule: str = RULE

    def to_json(self) -> dict[str, Any]:
        """The result as mappings, sequences, numbers and strings, ready for ``json.dumps``."""
        return asdict(self)

    @property
    def metrics(self) -> dict[str, float]:
        """The result under the metric names of ``telemetry``."""
        found = {
            names.EVAL_ACCURACY: self.accuracy,
            names.EVAL_ACCURACY_LOW: self.accuracy_interval[0],
            names.EVAL_ACCURACY_HIGH: self.accuracy_interval[1],
            names.EVAL_ALWAYS_FIRST: self.always_first,
            names.EVAL_UNPARSABLE: self.unparsable,
            names.EVAL_FORMAT: self.format,
            names.EVAL_CONSISTENCY: self.consistency,
            names.EVAL_TRUNCATED: self.truncated,
            names.EVAL_PAIRS: float(self.num_pairs),
        }
        if self.first_slot is not None:
            found[names.EVAL_FIRST_SLOT] = self.first_slot
        if self.both_orders is not None and self.both_orders_interval is not None:
            found[names.EVAL_BOTH_ORDERS] = self.both_orders
            found[names.EVAL_BOTH_ORDERS_LOW], found[names.EVAL_BOTH_ORDERS_HIGH] = self.both_orders_interval
        return found


def evaluate(
    prompts: Sequence[Prompt], trajectories: Iterable[Trajectory], *, lines: int = 0, orders: Literal[1, 2] = 2
) -> EvalResult:
    """The metrics of ``trajectories``, in any order, for ``prompts``: each pair in both orders, or in its own (1).

    Several prompts of the same pair and order are samples to vote over; their number K must be odd and the same
    everywhere. ``lines`` is the consistency term's.

    Raises ValueError for no prompts, a prompt without or with two trajectories, a trajectory of another prompt, a pair
    without one of its orders, or an even or uneven K.
    """
    answered = _by_prompt(prompts, trajectories)
    items = _items(prompts, answered)
    completions = [answered[prompt.prompt_id] for prompt in prompts]
    texts = [trajectory.completion_text for trajectory in completions]
    pairs = _pairs(items, orders)
    scores = [_mean(item.correct for item in pair) for pair in pairs]
    both = _mean(score == 1.0 for score in scores)
    choices = [item.choice for item in items if item.choice is not None]
    cases = [judge_case(text, lines) for text in texts]
    return EvalResult(
        num_pairs=len(pairs),
        votes_per_prompt=len(items[0].votes),
        accuracy=_mean(scores),
        accuracy_interval=clustered(scores, orders),
        accuracy_unswapped=_mean(item.correct for item in items if not item.swapped),
        accuracy_swapped=_mean(item.correct for item in items if item.swapped) if orders == 2 else None,
        both_orders=both if orders == 2 else None,
        both_orders_interval=wilson(both, len(pairs)) if orders == 2 else None,
        first_slot=_mean(choice == 1 for choice in choices) if choices else None,
        always_first=_mean(item.label == 1 for item in items),
        unparsable=_mean(strict_choice(text) is None for text in texts),
        format=_mean(format_reward(text) for text in texts),
        consistency=_mean(case is not None and compare(case) == 1 for case in cases),
        truncated=_mean(trajectory.finish is FinishReason.LENGTH for trajectory in completions),
        length_mean=_mean(len(trajectory.tokens) for trajectory in completions),
        items=items,
    )


def _by_prompt(prompts: Sequence[Prompt], trajectories: Iterable[Trajectory]) -> dict[str, Trajectory]:
    """Trajectories by prompt id, exactly one per prompt."""
    if not prompts:
        raise ValueError("there are no prompts to evaluate")
    answered: dict[str, Trajectory] = {}
    for trajectory in trajectories:
        prompt_id = trajectory.prompt.prompt_id
        if prompt_id in answered:
            raise ValueError(f"prompt {prompt_id!r} has two trajectories; each prompt is answered once")
        answered[prompt_id] = trajectory
    asked = {prompt.prompt_id for prompt in prompts}
    if len(asked) != len(prompts):
        raise ValueError("two prompts share an id; give each its own")
    if missing := asked - answered.keys():
        raise ValueError(f"{len(missing)} prompts have no trajectory, {min(missing)!r} among them")
    if surplus := answered.keys() - asked:
        raise ValueError(f"{len(surplus)} trajectories belong to no prompt, {min(surplus)!r} among them")
    return answered


def _items(prompts: Sequence[Prompt], answered: Mapping[str, Trajectory]) -> tuple[Item, ...]:
    """One item per pair and order, in the order of the prompts."""
    asked: dict[tuple[str, bool], list[Prompt]] = {}
    for prompt in prompts:
        asked.setdefault((prompt.pair_id, prompt.swapped), []).append(prompt)
    counts = {len(group) for group in asked.values()}
    if len(counts) > 1 or min(counts) % 2 == 0:
        raise ValueError(f"samples per prompt are {sorted(counts)}; voting needs the same odd number everywhere")
    items = []
    for (pair_id, swapped), group in asked.items():
        votes = tuple(strict_choice(answered[prompt.prompt_id].completion_text) for prompt in group)
        choice, label = majority(votes), group[0].label
        items.append(
            Item(
                pair_id=pair_id,
                swapped=swapped,
                label=label,
                votes=votes,
                choice=choice,
                correct=choice == label,
                meta=dict(group[0].meta),
            )
        )
    return tuple(items)


def _pairs(items: Sequence[Item], orders: Literal[1, 2]) -> list[list[Item]]:
    """The orders of each pair that were asked."""
    pairs: dict[str, list[Item]] = {}
    for item in items:
        pairs.setdefault(item.pair_id, []).append(item)
    for pair_id, asked in pairs.items():
        if len(asked) < orders:
            raise ValueError(f"pair {pair_id!r} was asked in one order only; evaluation needs both")
        if len(asked) > orders or (orders == 1 and asked[0].swapped):
            raise ValueError(f"pair {pair_id!r} was asked in the swapped order; evaluation is of the data set's own")
    return list(pairs.values())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
