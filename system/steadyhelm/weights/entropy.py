"""What the codec knows of changes in advance: how readily each exponent class changes, and by how much."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from steadyhelm.errors import CorruptObjectError
from steadyhelm.weights.kernels import CLASSES, HALF_LIFE_BITS, MAX_WEIGHT, TOKEN_BITS, TOKENS

FEW = 16
"""Classes of which fewer changes were seen share one distribution of differences."""
_TOTAL = 1 << TOKEN_BITS
_ESCAPE = TOKENS - 1
_COUNT = struct.Struct("<BBH")


@dataclass(frozen=True, kw_only=True)
class ChangeModel:
    """Weights of the 64 classes, and distributions of signed differences.

    ``first`` is the exponent of class 0. ``weights`` [64] uint32 are in hazard units, at least 1. ``contexts`` [64]
    uint8 is the row of ``frequencies`` [rows, 128] uint16 that a class uses; a row adds up to 2^11, and its escape is
    never 0.
    """

    first: int
    weights: NDArray[np.uint32]
    contexts: NDArray[np.uint8]
    frequencies: NDArray[np.uint16]

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> ChangeModel:
        """The model that fits ``counts`` [256, 129], as ``kernels.census`` makes them."""
        first = _window(counts)
        classes = np.clip(np.arange(len(counts)) - first, 0, CLASSES - 1)
        counts = np.stack([counts[classes == number].sum(0) for number in range(CLASSES)])
        changed, unchanged = counts[:, :TOKENS].sum(1), counts[:, TOKENS]
        stayed = (unchanged + 0.05) / (unchanged + changed + 0.1)
        weights = np.clip(np.round(-np.log2(stayed) * (1 << HALF_LIFE_BITS)), 1, MAX_WEIGHT)
        weights[unchanged + changed == 0] = 1
        own = np.flatnonzero(changed >= FEW)
        contexts = np.zeros(CLASSES, np.uint8)
        contexts[own] = 1 + np.arange(len(own))
        rest = counts[contexts == 0, :TOKENS].sum(0)
        rows = [_frequencies(rest), *(_frequencies(counts[kind, :TOKENS]) for kind in own)]
        return cls(first=first, weights=weights.astype(np.uint32), contexts=contexts, frequencies=np.stack(rows))

    @cached_property
    def starts(self) -> NDArray[np.uint16]:
        """[rows, 128]: the slot at which each token begins."""
        ends = np.cumsum(self.frequencies, axis=1, dtype=np.uint16)
        return ends - self.frequencies

    @cached_property
    def rows(self) -> NDArray[np.uint32]:
        """[256]: where in ``slots`` the row begins that the class of an exponent uses."""
        classes = np.clip(np.arange(256) - self.first, 0, CLASSES - 1)
        return self.contexts[classes].astype(np.uint32) * np.uint32(_TOTAL)

    @cached_property
    def slots(self) -> NDArray[np.uint32]:
        """[rows · 2^11]: what ``kernels.decode`` looks a row's slot up in."""
        table = np.empty((len(self.frequencies), _TOTAL), np.uint32)
        for row, (frequencies, starts) in enumerate(zip(self.frequencies, self.starts, strict=True)):
            tokens = np.repeat(np.arange(TOKENS), frequencies)
            inside = np.arange(_TOTAL) - starts[tokens]
            table[row] = tokens | (frequencies[tokens].astype(np.int64) - 1) << 7 | inside << (7 + TOKEN_BITS)
        return table.reshape(-1)

    def to_bytes(self) -> bytes:
        """The model in as many bytes as it takes: what is 0 or 1 in most places is left out."""
        kinds = np.flatnonzero((self.weights > 1) | (self.contexts > 0)).astype(np.uint8)
        rows, tokens = np.nonzero(self.frequencies)
        return b"".join(
            (
                _COUNT.pack(self.first, len(kinds), len(rows)),
                kinds.tobytes(),
                self.contexts[kinds].tobytes(),
                self.weights[kinds].astype("<u4").tobytes(),
                rows.astype(np.uint8).tobytes(),
                tokens.astype(np.uint8).tobytes(),
                self.frequencies[rows, tokens].astype("<u2").tobytes(),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> ChangeModel:
        """The model that ``to_bytes`` wrote. Raises CorruptObjectError, which names ``place``."""
        try:
            first, num_kinds, num_tokens = _COUNT.unpack_from(data)
            sizes = (num_kinds, num_kinds, 4 * num_kinds, num_tokens, num_tokens, 2 * num_tokens)
            ends = np.cumsum((_COUNT.size, *sizes)).tolist()
            if ends[-1] != len(data) or not num_tokens:
                raise ValueError(f"{len(data)} bytes instead of {ends[-1]}")
            kinds, of_kind, weight, rows, tokens, frequency = (
                np.frombuffer(data[start:end], kind)
                for (start, end), kind in zip(pairwise(ends), ("u1", "u1", "<u4", "u1", "u1", "<u2"), strict=True)
            )
            weights, contexts = np.ones(CLASSES, np.uint32), np.zeros(CLASSES, np.uint8)
            weights[kinds], contexts[kinds] = weight, of_kind
            frequencies = np.zeros((int(rows.max()) + 1, TOKENS), np.uint16)
            frequencies[rows, tokens] = frequency
            if weights.min() < 1 or weights.max() > MAX_WEIGHT or contexts.max() >= len(frequencies):
                raise ValueError("weights or contexts out of range")
            if (frequencies.sum(1) != _TOTAL).any() or not frequencies[:, _ESCAPE].all():
                raise ValueError("frequencies that do not add up")
        except (ValueError, IndexError, struct.error) as error:
            raise CorruptObjectError(
                f"{place} has a damaged model of changes ({error}): fetch the weights from their anchor"
            ) from error
        return cls(first=first, weights=weights, contexts=contexts, frequencies=frequencies)


def _window(counts: NDArray[np.int64]) -> int:
    """The exponent from which on ``CLASSES`` of them have most of the changes, and then most elements."""
    changed, seen = counts[:, :TOKENS].sum(1).astype(np.float64), counts.sum(1).astype(np.float64)
    worth = np.cumsum(np.r_[0.0, changed + seen / (seen.sum() + 1)])
    return int((worth[CLASSES:] - worth[:-CLASSES]).argmax())


def _frequencies(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """``counts`` [128] scaled to add up to 2^11, none that was seen below 1, and the escape 1 at least."""
    seen = counts.astype(np.float64)
    seen[_ESCAPE] = max(seen[_ESCAPE], 0.25)
    scaled = np.where(seen > 0, np.maximum(np.round(seen * (_TOTAL / seen.sum())), 1), 0).astype(np.int64)
    while (excess := int(scaled.sum()) - _TOTAL) > 0:
        scaled[scaled.argmax()] -= min(excess, max(1, int(scaled.max()) // 2))
    scaled[scaled.argmax()] -= excess
    return scaled.astype(np.uint16)
