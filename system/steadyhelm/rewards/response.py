"""Reading a completion: thought, answer, choice. Plain string search, linear in the text's length."""

from __future__ import annotations

_OPEN, _CLOSE = "<answer>", "</answer>"
_END_MARKS = ("<|im_end|>", "<|endoftext|>", "<｜end▁of▁sentence｜>")


def response_text(completion: str) -> str:
    """The completion, stripped, without the end marks behind it, which are text where they are no end token (§2.1)."""
    end = len(completion)
    while end:
        mark = next((mark for mark in _END_MARKS if completion.endswith(mark, 0, end)), " ")
        if mark == " " and not completion[end - 1].isspace():
            break
        end -= len(mark)
    return completion[:end].lstrip()


def answer_text(completion: str) -> str | None:
    """The inner text of the first ``<answer>…</answer>``, None where there is none (spec §2.3)."""
    start = completion.find(_OPEN)
    if start < 0:
        return None
    end = completion.find(_CLOSE, start + len(_OPEN))
    return None if end < 0 else completion[start + len(_OPEN) : end]


def strict_choice(completion: str) -> int | None:
    """1 or 2 where the first answer's text, stripped, is exactly that; None for anything else."""
    inner = answer_text(completion)
    return {"1": 1, "2": 2}.get(inner.strip()) if inner is not None else None


def shown_thought(completion: str, lines: int) -> str:
    """What a judge sees of the thought: the text before ``<answer>``, stripped (spec §2.4).

    Args:
        completion: the whole text; without ``<answer>`` all of it is thought.
        lines: how many of its last lines are kept, joined with ``;``; 0 keeps all as they are.
    """
    thought = response_text(completion).partition(_OPEN)[0].strip()
    return ";".join(thought.split("\n")[-lines:]) if lines else thought
