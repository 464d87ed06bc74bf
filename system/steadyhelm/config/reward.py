"""The ``reward`` part: terms, how they combine, and what happens to a sample that cannot be scored."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from steadyhelm.config.base import CodeRef, Count, Part, Seconds


class FormatTerm(Part):
    """1 where the completion is ``<think>…</think><answer>…</answer>`` and nothing else, 0 otherwise."""

    type: Literal["format"] = "format"
    """Discriminator."""
    weight: float = 0.5
    """Weight in the combination."""


class ChoiceTerm(Part):
    """1 where the answer names the better response, 0 otherwise."""

    type: Literal["choice"] = "choice"
    """Discriminator."""
    weight: float = 1.0
    """Weight in the combination."""
    mode: Literal["strict", "release"] = "strict"
    """``strict``: an answer without tags scores 0. ``release``: the whole response is searched for it, and a failure
    of the scorer counts 1, as R1-Reward's released scorer does."""


class RulesJudge(Part):
    """Judges by rules: finds the conclusion in the thought's last lines and compares it with the answer."""

    type: Literal["rules"] = "rules"
    """Discriminator."""


Judge = RulesJudge


class ConsistencyTerm(Part):
    """Whether the thought's conclusion is the answer that was given."""

    type: Literal["consistency"] = "consistency"
    """Discriminator."""
    weight: float = 0.5
    """Weight in the combination."""
    values: Literal["pm1", "01"] = "pm1"
    """``pm1``: +1 consistent, 0 undecided, −1 contradicting. ``01``: 1 consistent, 0 otherwise."""
    lines: Annotated[int, Field(ge=0)] = 0
    """How many of the thought's last lines the judge sees; 0 shows all (the release shows 3)."""
    mode: Literal["strict", "release"] = "strict"
    """``strict``: a completion without 1 or 2 between its tags is undecided. ``release``: the judge is shown such an
    answer as R1-Reward's released scorer does, the whole response where there are no tags; beside a ``choice`` in mode
    ``release`` it can earn as much as a tagged one, but for the format."""
    judge: Judge = RulesJudge()
    """Who compares."""


class CustomTerm(Part):
    """A reward term of the user's own code."""

    type: Literal["custom"] = "custom"
    """Discriminator."""
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name of the component in metrics and reports."""
    code: CodeRef
    """``file.py:name`` of a function ``(Sample) -> float``, or of a ``rewards.RewardTerm`` with a wider scope."""
    weight: float = 1.0
    """Weight in the combination."""


RESERVED_NAMES = ("mean", "std", "valid_rate", "format", "choice", "consistency")
"""Names that a custom term cannot have: metrics of the reward and the built-in terms use them."""

Term = Annotated[FormatTerm | ChoiceTerm | ConsistencyTerm | CustomTerm, Field(discriminator="type")]


class Reward(Part):
    """The reward service: terms, combination, deadlines."""

    terms: Annotated[tuple[Term, ...], Field(min_length=1)] = (FormatTerm(), ChoiceTerm(), ConsistencyTerm())
    """The reward's terms, each scored on its own."""
    combine: Literal["r1_reward", "sum"] = "r1_reward"
    """``r1_reward``: w_f·format + choice·(w_c + w_k·consistency) plus weighted custom terms. ``sum``: weighted sum."""
    on_unscored: Literal["neutral", "resample", "stop"] = "neutral"
    """A sample that cannot be scored: leaves statistics and loss, is replaced by another sample of its prompt, or
    ends the run."""
    replicas: Count = 1
    """Reward actors."""
    workers: Count = 1
    """Scoring processes in each actor."""
    sample_deadline_s: Seconds = 10.0
    """Longest time for one sample; past it the sample is unscored and its worker process replaced."""

    @model_validator(mode="after")
    def _terms_fit(self) -> Self:
        names: list[str] = []
        for index, term in enumerate(self.terms):
            name = term.name if isinstance(term, CustomTerm) else term.type
            if isinstance(term, CustomTerm) and name in RESERVED_NAMES:
                raise ValueError(f"reward.terms.{index}.name is {name!r}, which Steadyhelm uses itself: choose another")
            if name in names:
                raise ValueError(
                    f"reward.terms.{index} is a second {name!r} beside reward.terms.{names.index(name)}: remove one, "
                    "or give a custom term another name"
                )
            names.append(name)
        if self.combine == "r1_reward" and "consistency" in names and "choice" not in names:
            raise ValueError(
                "reward.combine is 'r1_reward', which multiplies consistency by choice, but reward.terms has no "
                "choice term: add one, or set reward.combine to 'sum'"
            )
        return self
