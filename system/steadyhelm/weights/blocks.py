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
    torch.bfloat16: kernels.Coder(shift=7, half=1 << 15),
    torch.float16: kernels.Coder(shift=10, half=1 << 15),
    torch.float32: kernels.Coder(shift=23, half=1 << 31),
}
"""The types whose differences are coded; of others a changed block goes as it is."""
CENSUS = 1 << 19
"""Elements of a type that the model of changes is made from; of larger sets every so manieth run is looked at."""

_CODED = struct.Struct(f"<B{2 * kernels.TRACKS}I")
_CODES, _BYTES = 1, 2
_REMEDY = "the weights are to be taken from an anchor"


def _aligned(size: int) -> NDArray[np.uint32]:
    """So many words, from the beginning of one of the processor's cache lines on."""
    memory = np.empty(4 * size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + 4 * size].view(np.uint32)


class _Scratch(threading.local):
    """A thread's working memory for one block; pages that nothing is written to take no memory."""

    def __init__(self) -> None:
        tracks = (kernels.TRACKS, BLOCK)
        self.places = np.empty(tracks, np.int64)
        self.kinds = np.empty(tracks, np.uint8)
        self.steps = np.empty(tracks, np.int32)
        self.words = np.empty(4 * BLOCK + 64, np.uint32)
        self.fronts = _aligned(kernels.TILE + kernels.GROUP)
        self.ends = _aligned(kernels.TILE // kernels.GROUP + kernels.LANES)
        self.found = _aligned(kernels.TILE + kernels.GROUP)


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
                    kernels.census(old, new, coder, stride, counts)
            models[dtype] = ChangeModel.of(counts)
    return models


def encode(block: Block, base: Flat, tensors: Flat, models: Models) -> bytes:
    """What makes ``tensors`` of ``base`` in this block; ``base`` becomes ``tensors``."""
    old, new = block.views(base), block.views(tensors)
    model = models.get(block.dtype)
    if model is None:
        equal = all(np.array_equal(before, after) for before, after in zip(old, new, strict=True))
        return b"" if equal else _copied(old, new)
    mine = _scratch
    state = np.zeros((kernels.TRACKS, 2), np.uint64)
    for before, after in zip(old, new, strict=True):
        kernels.compare(
            before,
            after,
            CODERS[block.dtype],
            model.first,
            model.weights,
            state,
            mine.places,
            mine.kinds,
            mine.steps,
            mine.fronts,
            mine.ends,
            mine.found,
        )
    counts = state[:, 0].tolist()
    if not any(counts):
        return b""
    begins = [len(mine.words)]
    for track in reversed(range(kernels.TRACKS)):
        begins.append(
            kernels.encode(
                counts[track],
                mine.places[track],
                mine.kinds[track],
                mine.steps[track],
                model.weights,
                model.contexts,
                model.frequencies,
                model.starts,
                mine.words,
                begins[-1],
            )
        )
    ends = [begin - begins[-1] for begin in reversed(begins[:-1])]
    code = _CODED.pack(_CODES, *counts, *ends)
    code += mine.words[begins[-1] :].astype("<u4", copy=False).tobytes()
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
    if code[0] != _CODES or model is None or size < 0 or size % 4:
        raise CorruptObjectError(f"{place} has a block of an unknown kind: {_REMEDY}")
    _, *numbers = _CODED.unpack_from(code)
    counts, ends = numbers[: kernels.TRACKS], numbers[kernels.TRACKS :]
    begins = [0, *ends[:-1]]
    if [*begins, size // 4] != sorted([*begins, size // 4]) or ends[-1] != size // 4:
        raise CorruptObjectError(f"{place} has a block whose tracks do not add up: {_REMEDY}")
    words = np.zeros(size // 4 + kernels.PADDING, np.uint32)
    words[: -kernels.PADDING] = np.frombuffer(code[_CODED.size :], "<u4")
    mine = _scratch
    states = np.zeros((kernels.TRACKS, 8), np.uint64)
    for begin, changes, state in zip(begins, counts, states, strict=True):
        kernels.start(words, begin, changes, state)
    for view in views:
        kernels.decode(
            view,
            CODERS[block.dtype],
            model.first,
            model.weights,
            model.rows,
            model.slots,
            words,
            states,
            mine.fronts,
            mine.ends,
        )
    if [(state[2], state[3]) for state in states.tolist()] != [(end, 0) for end in ends]:
        raise CorruptObjectError(f"{place} has a block that ends too early or too late: {_REMEDY}")
