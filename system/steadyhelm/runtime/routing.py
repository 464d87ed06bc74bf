"""Which member of a pool a call goes to: a pure choice over what each has in hand and has met lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import xxhash

from steadyhelm.data.types import Prompt

MARGIN = 0.5
"""How much more than the least loaded a member may have in hand, in shares of the new work, and still be chosen for
what it has met: at a half, between members with equally many whole orders only."""
REMEMBERED = 4096
"""Marks that are remembered of each member, the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a call asks for.

    ``samples`` are its completions, ``tokens`` how many they are expected to have together; ``marks`` say what an
    engine that has met them need not prepare again: images, and prompts as a whole.

    Example: ``Work(samples=16, tokens=3300.0, marks=frozenset({"images/9f", "prompt/5c0a…"}))``
    """

    samples: int = 1
    tokens: float = 1.0
    marks: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A member that may take a call: the tokens that it has in hand, and how much of the call it knows, in [0, 1]."""

    number: int
    tokens: float
    known: float


def choose(candidates: Sequence[Candidate], tokens: float) -> int:
    """The number of the member that a call of so many ``tokens`` goes to.

    Of those within ``MARGIN`` of the least loaded, the one that knows most of it; then the least loaded; then the
    lowest number. ``candidates`` must not be empty.
    """
    most = min(candidate.tokens for candidate in candidates) + MARGIN * tokens
    near = [candidate for candidate in candidates if candidate.tokens <= most]
    return min(near, key=lambda candidate: (-candidate.known, candidate.tokens, candidate.number)).number


def marks(prompts: Iterable[Prompt]) -> frozenset[str]:
    """What these prompts have in common with others: their images, and all samples of a prompt the prompt itself."""
    found: set[str] = set()
    for prompt in prompts:
        found.update(prompt.images)
        whole = "\0".join((*prompt.images, prompt.text))
        found.add(f"prompt/{xxhash.xxh3_64_hexdigest(whole.encode())}")
    return frozenset(found)


class Memory:
    """The marks that a member has met lately."""

    def __init__(self) -> None:
        self._met: OrderedDict[str, None] = OrderedDict()

    def meet(self, marks: Iterable[str]) -> None:
        """Takes them in, and forgets the oldest beyond ``REMEMBERED``."""
        for mark in marks:
            self._met[mark] = None
            self._met.move_to_end(mark)
        while len(self._met) > REMEMBERED:
            self._met.popitem(last=False)

    def known(self, marks: Collection[str]) -> float:
        """The share of ``marks`` that the member has met; 0 where there are none."""
        return sum(mark in self._met for mark in marks) / len(marks) if marks else 0.0
