"""Several publishers of one set of tensors: which part is whose, and how they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from steadyhelm.weights.layout import Block, Layout

Exchange = Callable[[Callable[[], str]], list[str]]
"""Runs some work on every rank and answers with all ranks' texts in order; where it fails on one, all raise."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of a set that one of ``count`` publishing ranks puts: the ``index``-th range of the layout's blocks.

    All ranks call ``publish`` together, each with the tensors in ``names``, and get the same record.
    """

    layout: Layout
    index: int = 0
    count: int = 1
    exchange: Exchange = field(default=lambda work: [work()])

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of this part."""
        mine = self.layout.part(self.index, self.count)
        return self.layout.blocks[mine.start : mine.stop]

    @cached_property
    def anchored(self) -> frozenset[str]:
        """The tensors that this part's anchors hold: whose first element is in its blocks. Empty ones are rank 0's."""
        begun = {segment.name for block in self.blocks for segment in block.segments if segment.start == 0}
        return frozenset(begun | {spec.name for spec in self.layout.specs if not self.index and 0 in spec.shape})

    @cached_property
    def names(self) -> frozenset[str]:
        """The tensors that this part's publisher needs."""
        return self.anchored | {segment.name for block in self.blocks for segment in block.segments}
