"""What a reward term is, and what it sees of a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from steadyhelm.data.types import FinishReason, ImageKey, PromptId, Trajectory

Scope = Literal["sample", "group", "linked", "batch"]
"""Which samples a term must see together: one; all of one prompt; all of prompts that share ``meta["link_id"]``; all
of the batch."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
LINK = "link_id"
"""The ``meta`` entry that ties prompts together for a term of scope ``linked``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A completion as reward terms see it: text and labels, no tokens.

    ``prompt_text`` is the user message (question and both responses, in the order that the policy saw);
    ``label`` is 1 or 2 in that order. ``completion_text`` keeps special tokens except the end-of-sequence token.

    Example: ``Sample(prompt_id=PromptId("0:17"), group_id="0:17", pair_id="train-17", prompt_text="Which ...",
    label=2, swapped=True, completion_text="<think>...</think><answer>2</answer>", finish=FinishReason.STOP,
    num_tokens=36)``
    """

    prompt_id: PromptId
    group_id: str
    pair_id: str
    prompt_text: str
    label: int
    swapped: bool
    completion_text: str
    finish: FinishReason
    num_tokens: int
    images: tuple[ImageKey, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, trajectory: Trajectory) -> Sample:
        """The sample that ``trajectory`` is."""
        prompt = trajectory.prompt
        return cls(
            prompt_id=prompt.prompt_id,
            group_id=prompt.group_id,
            pair_id=prompt.pair_id,
            prompt_text=prompt.text,
            label=prompt.label,
            swapped=prompt.swapped,
            completion_text=trajectory.completion_text,
            finish=trajectory.finish,
            num_tokens=len(trajectory.tokens),
            images=prompt.images,
            meta=dict(prompt.meta),
        )


class RewardTerm(Protocol):
    """A part of the reward of the user's own, where a function ``(Sample) -> float`` is not enough.

    ``score`` gets all samples of one unit of ``scope`` and returns one value per sample, in their order; None, NaN, an
    infinity or an exception leaves a sample unscored.
    """

    scope: Scope

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        """One value per sample of the unit, in its order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A term's verdict on one sample: a finite ``value``, or None with the ``error`` that prevented it.

    ``detail`` is JSON-able and goes into reports. Example: ``Score(value=1.0, detail={"choice": 2})``
    """

    value: float | None
    error: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def checked(cls, value: object) -> Score:
        """``value`` as a score where it is a finite number; otherwise an error that says what it was."""
        if value is None:
            return cls(value=None, error="it returned None: no score")
        if not hasattr(value, "__float__") or isinstance(value, str | bytes):
            return cls(value=None, error=f"it returned {value!r:.60} ({type(value).__name__}); a number is needed")
        number = float(value)
        if not math.isfinite(number):
            return cls(value=None, error=f"it returned {number}; a finite number is needed")
        return cls(value=number)


def units(samples: Sequence[Sample], scope: Scope) -> list[tuple[int, ...]]:
    """The units of ``scope`` among ``samples``, as positions [N] of first appearance order.

    A sample without a ``link_id`` is linked to its own prompt's samples only.
    """
    if scope == "batch":
        return [tuple(range(len(samples)))] if samples else []
    if scope == "sample":
        return [(position,) for position in range(len(samples))]
    found: dict[tuple[str, str], list[int]] = {}
    for position, sample in enumerate(samples):
        link = sample.meta.get(LINK) if scope == "linked" else None
        unit = ("prompt", sample.group_id) if link is None else ("link", link)
        found.setdefault(unit, []).append(position)
    return [tuple(unit) for unit in found.values()]
