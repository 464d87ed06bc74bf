"""One checksum over a whole set of named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash

from steadyhelm.weights.codec import DTYPE_NAMES, tensor_bytes


def set_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """xxh3-128 in hex over name, dtype, shape and bytes of all tensors in sorted order of name.

    Proof against corruption and mix-ups; it is not a signature.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\n{DTYPE_NAMES[tensor.dtype]}\n{list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
