"""The rule that rewards completions on both sides of vs_trl: it costs next to nothing and differs between samples."""

from __future__ import annotations

from typing import Any


def share(text: str) -> float:
    """Share of ``text`` that is the letter e; 0 for an empty one."""
    return text.count("e") / max(1, len(text))


def term(sample: Any) -> float:
    """``share`` of a Steadyhelm sample's completion; untyped, since TRL's environment has no Steadyhelm."""
    return share(sample.completion_text)
