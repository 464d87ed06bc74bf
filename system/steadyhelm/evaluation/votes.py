"""From answers to one choice: majority voting over several samples of a prompt."""

from __future__ import annotations

from collections.abc import Sequence


def majority(votes: Sequence[int | None]) -> int | None:
    """1 or 2: what most votes say; None on a tie, or where none could be read.

    None among ``votes`` is an unparsable answer: no vote (spec §5.5).
    """
    first, second = votes.count(1), votes.count(2)
    if first == second:
        return None
    return 1 if first > second else 2
