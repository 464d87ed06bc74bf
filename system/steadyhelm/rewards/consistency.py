"""The consistency reward: whether the thought's conclusion is the answer that was given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from steadyhelm.rewards.conclusion import conclusion
from steadyhelm.rewards.interface import Sample, Score
from steadyhelm.rewards.response import answer_text, response_text, shown_thought, strict_choice

_WHOLE_NUMBER = re.compile(r"\s*[-+]?\d+\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCase:
    """What a judge compares: text only, no image, no question, no candidate responses (spec §2.4).

    Example: ``JudgeCase(thought="<think>... So Response 2 is better.</think>", answer="response 2 is better")``
    """

    thought: str
    answer: str


class Judge(Protocol):
    """Says whether thoughts conclude what their answers say; by rules, or a model behind a service."""

    async def judge(self, cases: Sequence[JudgeCase]) -> list[int | None]:
        """Per case, in order: 1 same meaning, −1 contradiction, 0 undecided, None where judging failed."""
        ...


class RulesJudge:
    """Judges by ``conclusion``: no conclusion, or no clear one, is 0 and never 1; it cannot fail."""

    async def judge(self, cases: Sequence[JudgeCase]) -> list[int | None]:
        """Per case: 1 where both texts conclude for the same response, −1 for opposite ones, 0 otherwise."""
        return [compare(case) for case in cases]


def compare(case: JudgeCase) -> int:
    """1, −1 or 0: the rules' verdict on one case."""
    concluded, answered = conclusion(case.thought), conclusion(case.answer)
    if concluded is None or answered is None:
        return 0
    return 1 if concluded == answered else -1


def judge_case(completion: str, lines: int = 0, mode: Literal["strict", "release"] = "strict") -> JudgeCase | None:
    """The case that a completion makes for a judge.

    ``lines``: how many of the thought's last lines are shown, 0 for all. ``strict``: None where the answer is not 1 or
    2. ``release``: never None; an answer of another kind is shown as R1-Reward's released scorer does (spec §2.4):
    another whole number as "two response are the same", other text as it is, and the whole response where there are no
    tags, so that a thought is compared with itself.
    """
    choice = strict_choice(completion)
    if choice is not None:
        answer = f"response {choice} is better"
    elif mode == "release":
        answer = _released_answer(completion)
    else:
        return None
    return JudgeCase(thought=shown_thought(completion, lines), answer=answer)


def _released_answer(completion: str) -> str:
    inner = answer_text(completion)
    if inner is None:
        return response_text(completion)
    return "two response are the same" if _WHOLE_NUMBER.fullmatch(inner) else inner


async def consistency_rewards(
    samples: Sequence[Sample],
    judge: Judge,
    *,
    lines: int = 0,
    values: Literal["pm1", "01"] = "pm1",
    mode: Literal["strict", "release"] = "strict",
) -> list[Score]:
    """One score per sample, in order: ``pm1`` gives +1, 0, −1; ``01`` gives 1 where consistent and 0 otherwise.

    ``lines`` and ``mode`` are those of ``judge_case``; a completion that makes no case is undecided (0) and not shown
    to the judge. A judge that fails on a case, or on the call, leaves its samples unscored.
    """
    cases = [judge_case(sample.completion_text, lines, mode) for sample in samples]
    asked = [case for case in cases if case is not None]
    error = "the judge gave no verdict"
    try:
        verdicts = await judge.judge(asked)
        if len(verdicts) != len(asked):
            raise ValueError(f"the judge gave {len(verdicts)} verdicts on {len(asked)} cases")
    except Exception as failure:  # a failed judge leaves its samples unscored, whatever the failure
        verdicts, error = [None] * len(asked), f"the judge failed: {failure!r:.200}"
    answers = iter(verdicts)
    return [
        Score(value=0.0, detail={"undecided": "no readable answer"})
        if case is None
        else _score(next(answers), values, error)
        for case in cases
    ]


def _score(verdict: int | None, values: Literal["pm1", "01"], error: str) -> Score:
    if verdict is None:
        return Score(value=None, error=error)
    if verdict not in (-1, 0, 1):
        return Score(value=None, error=f"the judge's verdict is {verdict!r:.40}; it must be 1, 0 or -1")
    return Score(value=float(max(verdict, 0) if values == "01" else verdict))
