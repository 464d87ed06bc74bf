"""The choice reward (the paper's result reward): whether the answer names the better response."""

from __future__ import annotations

import re
from typing import Any, Literal

from steadyhelm.rewards.interface import Sample, Score
from steadyhelm.rewards.response import answer_text, strict_choice

_LEAD_IN = re.compile(r"(?:the\s)?(?:final\s|correct\s)?answer\sis:?", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?!\w)")
_WRAPPING = re.compile(r"\\boxed|\\text|[\s${}()\[\]]")


def choice_reward(sample: Sample, mode: Literal["strict", "release"] = "strict") -> Score:
    """1.0 where the answer names ``sample.label``, 0.0 otherwise; the detail has the choice that was read.

    ``strict``: the first ``<answer>``'s text, stripped, must be ``1`` or ``2``; without tags the result is 0.
    ``release``: see ``release_reward``; it fails open, as R1-Reward's released scorer does.
    """
    if mode == "strict":
        choice = strict_choice(sample.completion_text)
        return Score(value=float(choice == sample.label), detail={"choice": choice})
    value, detail = release_reward(sample.completion_text, sample.label)
    return Score(value=value, detail=detail)


def release_reward(completion: str, label: int) -> tuple[float, dict[str, Any]]:
    r"""The result reward as R1-Reward's released scorer gives it, as far as two possible labels need it (spec §2.3).

    Reproduced: the prediction is the first ``<answer>`` text, or the *whole completion* where there is none; lead-ins
    such as "The answer is" are cut; it counts where it equals the label as a normalised string (``$``, ``\boxed``,
    brackets, spaces, a final full stop ignored), as a number (``2.0``), or where the last number in it is the label,
    which stands for math-verify's extraction from free text; and *any failure counts 1.0*.
    Not reproduced: math-verify's LaTeX and symbolic equality (``\frac{4}{2}`` is not read as 2).
    """
    try:
        prediction = answer_text(completion)
        if prediction is None:
            prediction = completion
        prediction = _LEAD_IN.sub("", prediction).strip()
        if _WRAPPING.sub("", prediction).rstrip(".") == str(label):
            return 1.0, {"choice": label}
        numbers = _NUMBER.findall(prediction)
        if not numbers:
            return 0.0, {"choice": None}
        # int() refuses more than 4300 digits: such an answer is one way into the failing branch.
        last = float(numbers[-1]) if "." in numbers[-1] else int(numbers[-1])
        return float(last == label), {"choice": last}
    except Exception as error:  # the released scorer's fail-open rule is what this mode reproduces
        return 1.0, {"choice": None, "failed_open": repr(error)}
