"""Compiles the delta codec ahead of its first use, which saves every new process some seconds of a core.

``python -m steadyhelm.weights.compiled`` leaves the code beside the kernels: for an image, whose processes may not
write there later.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from steadyhelm.data.types import PolicyVersion
from steadyhelm.store import LocalStore
from steadyhelm.weights.store import StoreWeights

TYPES = (torch.bfloat16, torch.float32)
"""One of each size, which is what the kernels know of a type."""
ELEMENTS = 1000


def compile_kernels() -> None:
    """Brings a delta of each type from a publisher to a reader, which compiles all that it takes."""
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        publisher, reader = StoreWeights(store), StoreWeights(store)
        for iteration in range(2):
            version = PolicyVersion(iteration=iteration, attempt=1)
            tensors = {str(dtype): torch.ones(ELEMENTS, dtype=dtype) + iteration for dtype in TYPES}
            reader.fetch(publisher.publish(version, f"weights/{iteration}", tensors))


if __name__ == "__main__":
    compile_kernels()
