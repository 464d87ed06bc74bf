"""A set of tensors as a row of blocks: the unit of coding, of checksums and of sharing the work.

::

    tensors in sorted order of name    a.bias │   a.weight    │ b.weight        │ c (int64)
    blocks of at most BLOCK elements   ├────── 0 ──────┼────── 1 ──────┼── 2 ──┤├─── 3 ───┤

A block may hold several small tensors, or a part of a large one, but never two types. Blocks follow from names, types
and shapes alone, so publisher and reader cut alike and need not tell each other.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from steadyhelm.errors import ModelError
from steadyhelm.weights.codec import DTYPE_NAMES, tensor_bytes

BLOCK = 1 << 20
"""Elements of a block at most."""


class TensorSpec(NamedTuple):
    """A tensor without its elements. Example: ``TensorSpec("lm_head.weight", torch.bfloat16, (512, 128))``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Segment(NamedTuple):
    """The elements ``[start, stop)`` of a tensor in row-major order."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Segments of one type, one behind the other."""

    dtype: torch.dtype
    segments: tuple[Segment, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its elements."""
        return sum(segment.stop - segment.start for segment in self.segments) * self.dtype.itemsize

    def views(self, flat: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Its segments of flat arrays [elements], without a copy."""
        return [flat[name][start:stop] for name, start, stop in self.segments]


@dataclass(frozen=True)
class Layout:
    """Names, types and shapes of a set of tensors, in sorted order of name."""

    specs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Layout:
        """The layout of ``tensors``."""
        return cls.from_specs((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())

    @classmethod
    def from_specs(cls, specs: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Layout:
        """The layout of tensors that are described in any order. Raises ModelError for types that no file here has."""
        specs = tuple(specs)
        if strange := [(name, dtype) for name, dtype, _ in specs if dtype not in DTYPE_NAMES]:
            name, dtype = strange[0]
            raise ModelError(
                f"tensor {name!r} is {dtype}, which weights are not published in: known are "
                f"{', '.join(str(known) for known in DTYPE_NAMES)}"
            )
        return cls(tuple(sorted((TensorSpec(*spec) for spec in specs), key=lambda spec: spec.name)))

    @cached_property
    def checksum(self) -> str:
        """xxh3-128 in hex over names, types and shapes."""
        lines = (f"{spec.name}\n{DTYPE_NAMES[spec.dtype]}\n{list(spec.shape)}\n" for spec in self.specs)
        return xxhash.xxh3_128_hexdigest("".join(lines).encode())

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in order. Empty tensors are in none."""
        blocks: list[Block] = []
        open_segments: list[Segment] = []
        filled = 0
        dtype: torch.dtype | None = None

        def close() -> None:
            if dtype is not None and open_segments:
                blocks.append(Block(dtype=dtype, segments=tuple(open_segments)))
                open_segments.clear()

        for spec in self.specs:
            if spec.dtype != dtype:
                close()
                dtype, filled = spec.dtype, 0
            size, start = math.prod(spec.shape), 0
            while start < size:
                stop = min(size, start + BLOCK - filled)
                open_segments.append(Segment(spec.name, start, stop))
                filled += stop - start
                start = stop
                if filled == BLOCK:
                    close()
                    filled = 0
        close()
        return tuple(blocks)

    def part(self, index: int, count: int) -> range:
        """The blocks of the ``index``-th of ``count`` parts: neighbours, as equal in bytes as blocks allow."""
        ends = list(accumulate((block.num_bytes for block in self.blocks), initial=0))
        first, last = (bisect_left(ends, ends[-1] * part // count) for part in (index, index + 1))
        return range(first, last)


def flat_words(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's elements in row-major order as unsigned integers; shares memory with a contiguous CPU tensor."""
    return np.frombuffer(tensor_bytes(tensor), f"u{tensor.element_size()}")
