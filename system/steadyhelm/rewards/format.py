"""The format reward: whether a completion has exactly the asked shape."""

from __future__ import annotations

from steadyhelm.rewards.response import response_text

_START, _MIDDLE, _END = "<think>", "</think><answer>", "</answer>"


def format_reward(completion: str) -> float:
    r"""1.0 where the response is ``<think>…</think><answer>…</answer>`` and nothing else, 0.0 otherwise.

    The same language as a full match of ``<think>.*</think><answer>.*</answer>`` with DOTALL, plus exactly one
    ``<think>`` and exactly one ``<answer>`` (spec §2.1, §2.2): empty bodies and extra closing tags pass. Written as
    string search, since the regular expression backtracks quadratically on hostile text.
    """
    text = response_text(completion)
    if text.count("<think>") != 1 or text.count("<answer>") != 1:
        return 0.0
    middle = text.find(_MIDDLE)  # unique, since <answer> is
    fits = (
        text.startswith(_START)
        and text.endswith(_END)
        and middle >= len(_START)
        and middle + len(_MIDDLE) <= len(text) - len(_END)
    )
    return 1.0 if fits else 0.0
