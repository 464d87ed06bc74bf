"""Safetensors bytes from torch tensors and back, without a copy on the way out.

The format: a little-endian 64-bit header length, a JSON header ``{name: {dtype, shape, data_offsets}}`` padded with
spaces to a multiple of eight bytes, then the tensors' bytes one behind the other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steadyhelm.errors import CorruptObjectError

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
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    parts: list[memoryview] = []
    offset = 0
    for name, tensor in tensors.items():
        part = tensor_bytes(tensor)
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + part.nbytes],
        }
        parts.append(part)
        offset += part.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(_LENGTH.pack(len(text)) + text), *parts]


def decode(buffer: memoryview | bytes, place: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, in memory of their own, and the metadata of a safetensors file.

    Args:
        buffer: the file's bytes.
        place: the object's key, for the error's message.

    Raises:
        CorruptObjectError: the bytes are not a complete safetensors file.
    """
    view = memoryview(buffer).cast("B")
    try:
        (length,) = _LENGTH.unpack_from(view)
        start = _LENGTH.size + length
        header = json.loads(bytes(view[_LENGTH.size : start]))
        metadata = header.pop(_METADATA, {})
        body = view[start:]
        tensors = {name: _tensor(entry, body) for name, entry in header.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) != body.nbytes:
            raise ValueError("bytes that belong to no tensor")
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise CorruptObjectError(
            f"{place} is not a complete safetensors file ({error}): delete it and start from an earlier object"
        ) from error
    return tensors, metadata


def _tensor(entry: Mapping[str, Any], body: memoryview) -> torch.Tensor:
    first, last = entry["data_offsets"]
    shape: Sequence[int] = entry["shape"]
    tensor = torch.empty(shape, dtype=DTYPES[entry["dtype"]])
    if not 0 <= first <= last <= body.nbytes or last - first != math.prod(shape) * tensor.element_size():
        raise ValueError(f"offsets {first} to {last} do not fit shape {list(shape)}")
    if tensor.numel():
        target = tensor.reshape(-1).view(torch.uint8).numpy()
        np.copyto(target, np.frombuffer(body[first:last], dtype=np.uint8))
    return tensor
