"""The difference between two versions of one block: kernels around it, and raw bytes where those would be shorter.

A block's code is empty where nothing changed; else its first byte says what follows: words of the two streams behind
the number of changes, or the new bytes as they are.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steadyhelm.errors import CorruptObjectError
from steadyhelm.weights import kernels
from steadyhelm.weights.entropy import ChangeModel
from steadyhelm.weights.layout import BLOCK, Block, Layout

Flat = Mapping[str, NDArray[Any]]
"""Flat arrays of words by the tensors' names, as ``layout.flat_words`` makes them."""
Models = Mapping[torch.dtype, ChangeModel]
"""What is known of the changes, for each type that is coded."""

CODERS: Mapping[torch.dtype, kernels.Coder] = {
    torch.bfloat16: kernels.HALVES,
    torch.float16: kernels.HALVES,
    torch.float32: kernels.WHOLES,
}
"""The types whose differences are coded; of others a changed block goes as it is."""
CENSUS = 1 << 22
"""Elements of a type that the model of changes is made from; of larger sets every so manieth run is looked at."""

_CODED = struct.Struct("<BI")
_CODES, _BYTES = 1, 2
_REMEDY = "the weights are to be taken from an anchor"


class _Scratch(threading.local):
    """A thread's working memory for one block; pages that nothing is written to take no memory."""

    def __init__(self) -> None:
        self.places = np.empty(BLOCK, np.int64)
        self.kinds = np.empty(BLOCK, np.uint8)
        self.steps = np.empty(BLOCK, np.int32)
        self.words = np.empty(4 * BLOCK + 16, np.uint32)
        self.sums = np.empty(kernels.TILE + kernels.REACH, np.uint32)


_scratch = _Scratch()


def compile_for(dtype: torch.dtype) -> None:
    """Has all kernels for ``dtype`` compiled, or read from numba's cache: 7 s and half a second."""
    if dtype not in CODERS:
        return
    block = Layout.from_specs([("x", dtype, (4096,))]).blocks[0]
    words = np.zeros(4096, f"u{dtype.itemsize}")
    base, tensors = {"x": words.copy()}, {"x": words.copy()}
    tensors["x"][::64] += 1
    models = models_of([block], base, tensors)
    code = encode(block, base, tensors, models)
    assert code[0] == _CODES
    decode({"x": words}, block, memoryview(code), models, "a trial")


def models_of(blocks: Sequence[Block], base: Flat, tensors: Flat) -> dict[torch.dtype, ChangeModel]:
    """A model of the changes from ``base`` to ``tensors`` for each type in ``blocks`` that is coded."""
    models = {}
    for dtype, coder in CODERS.items():
        own = [block for block in blocks if block.dtype == dtype]
        if own:
            stride = max(1, sum(block.num_bytes for block in own) // dtype.itemsize // CENSUS)
            counts = np.zeros((256, kernels.TOKENS + 1), np.int64)
            for block in own:
                for old, new in zip(block.views(base), block.views(tensors), strict=True):
                    kernels.census(old, new, coder.shift, coder.half, stride, counts)
            models[dtype] = ChangeModel.of(counts)
    return models


def encode(block: Block, base: Flat, tensors: Flat, models: Models) -> bytes:
    """What makes ``tensors`` of ``base`` in this block; ``base`` becomes ``tensors``."""
    old, new = block.views(base), block.views(tensors)
    model = models.get(block.dtype)
    if model is None:
        equal = all(np.array_equal(before, after) for before, after in zip(old, new, strict=True))
        return b"" if equal else _copied(old, new)
    mine, compare = _scratch, CODERS[block.dtype].compare
    state = np.zeros(2, np.uint64)
    for before, after in zip(old, new, strict=True):
        compare(before, after, model.weights, state, mine.places, mine.kinds, mine.steps)
    changes = int(state[0])
    if not changes:
        return b""
    begin = kernels.encode(
        changes,
        mine.places,
        mine.kinds,
        mine.steps,
        model.weights,
        model.contexts,
        model.frequencies,
        model.starts,
        mine.words,
    )
    code = _CODED.pack(_CODES, changes) + mine.words[begin:].astype("<u4", copy=False).tobytes()
    return code if len(code) <= block.num_bytes else _copied(old, new)


def _copied(old: Sequence[NDArray[Any]], new: Sequence[NDArray[Any]]) -> bytes:
    for before, after in zip(old, new, strict=True):
        before[:] = after
    return b"".join((bytes([_BYTES]), *(after.tobytes() for after in new)))


def decode(flat: Flat, block: Block, code: memoryview, models: Models, place: str) -> None:
    """Undoes ``encode``: makes ``flat``, the base, the result.

    Args:
        flat: writable; void in this block after an error.
        block: the block.
        code: what ``encode`` returned.
        models: what it was given.
        place: the object's key, for the error's message.

    Raises:
        CorruptObjectError: the code is not one of this block.
    """
    if not code:
        return
    views = block.views(flat)
    if code[0] == _BYTES and code.nbytes == 1 + block.num_bytes:
        start = 1
        for view in views:
            view[:] = np.frombuffer(code[start : start + view.nbytes], view.dtype)
            start += view.nbytes
        return
    model, size = models.get(block.dtype), code.nbytes - _CODED.size
    if code[0] != _CODES or model is None or size < 16 or size % 4:
        raise CorruptObjectError(f"{place} has a block of an unknown kind: {_REMEDY}")
    _, changes = _CODED.unpack_from(code)
    words = np.zeros(size // 4 + kernels.PADDING, np.uint32)
    words[: -kernels.PADDING] = np.frombuffer(bytes(code[_CODED.size :]), "<u4")
    mine, coder = _scratch, CODERS[block.dtype]
    state = np.zeros(6, np.uint64)
    kernels.start(words, changes, state)
    for view in views:
        coder.decode(view, model.weights, model.rows, model.slots, words, state, mine.sums)
    if state[2] != len(words) - kernels.PADDING or state[3]:
        raise CorruptObjectError(f"{place} has a block that ends too early or too late: {_REMEDY}")
