"""Safetensors bytes from torch tensors and back, without a copy on the way out.

The format: a little-endian 64-bit header length, a JSON header ``{name: {dtype, shape, data_offsets}}`` padded with
spaces to a multiple of eight bytes, then the tensors' bytes one behind the other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steadyhelm.errors import CorruptObjectError, ModelError

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in row-major order as bytes; shares memory with a contiguous CPU tensor."""
    if not tensor.numel():
        return memoryview(b"")
    whole = tensor.detach().cpu().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # of a single element contiguous() may leave any stride
    array: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array.data


def encode(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> list[memoryview]:
    """The parts of a safetensors file, to be written one after the other; names keep the mapping's order."""
    specs = ((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    head, _ = header(specs, metadata)
    return [memoryview(head), *map(tensor_bytes, tensors.values())]


def header(
    specs: Iterable[tuple[str, torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    *,
    multiple: int = 8,
) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file begins with, and at which of its bytes each tensor begins.

    Args:
        specs: name, type and shape of each tensor, in the order of their bytes.
        metadata: goes into the header.
        multiple: of how many bytes the first tensor begins at.

    Raises:
        ModelError: a tensor is of a type that weights are not kept in.
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    offset = 0
    for name, dtype, shape in specs:
        if dtype not in DTYPE_NAMES:
            kept = ", ".join(str(known).removeprefix("torch.") for known in DTYPE_NAMES)
            raise ModelError(f"tensor {name!r} is {dtype}, and weights are kept as {kept}: convert it to one of these")
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        begins[name], offset = offset, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % multiple)
    head = _LENGTH.pack(len(text)) + text
    return head, {name: len(head) + begin for name, begin in begins.items()}


def decode(
    buffer: memoryview | bytes, place: str, *, copy: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Args:
        buffer: the file's bytes; writable where ``copy`` is False.
        place: the object's key, for the error's message.
        copy: whether the tensors have memory of their own; else they are views of ``buffer`` and keep it alive.

    Raises:
        CorruptObjectError: the bytes are not a complete safetensors file.
    """
    view = memoryview(buffer).cast("B")
    try:
        (length,) = _LENGTH.unpack_from(view)
        start = _LENGTH.size + length
        entries = json.loads(bytes(view[_LENGTH.size : start]))
        metadata = entries.pop(_METADATA, {})
        body = view[start:]
        tensors = {name: _tensor(entry, body, copy) for name, entry in entries.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) != body.nbytes:
            raise ValueError("bytes that belong to no tensor")
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise CorruptObjectError(
            f"{place} is not a complete safetensors file ({error}): delete it and start from an earlier object"
        ) from error
    return tensors, metadata


def _tensor(entry: Mapping[str, Any], body: memoryview, copy: bool) -> torch.Tensor:
    first, last = entry["data_offsets"]
    shape: Sequence[int] = entry["shape"]
    dtype, numel = DTYPES[entry["dtype"]], math.prod(shape)
    if not 0 <= first <= last <= body.nbytes or last - first != numel * dtype.itemsize:
        raise ValueError(f"offsets {first} to {last} do not fit shape {list(shape)}")
    if numel and not copy:
        return torch.frombuffer(body, dtype=dtype, count=numel, offset=first).reshape(shape)
    tensor = torch.empty(shape, dtype=dtype)
    if numel:
        target = tensor.reshape(-1).view(torch.uint8).numpy()
        np.copyto(target, np.frombuffer(body[first:last], dtype=np.uint8))
    return tensor
