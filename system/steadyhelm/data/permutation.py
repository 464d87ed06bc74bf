"""Permutations that stay the same for ever."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def permutation(n: int, key: tuple[int, int]) -> NDArray[np.int64]:
    """A permutation [n] of 0 … n − 1, a fixed function of two 64-bit numbers.

    The stable order of n raw outputs of Philox-4×64 keyed by ``key``. The bits are specified, and NumPy promises them
    across releases; of ``Generator.permutation`` it promises nothing.
    """
    bits = np.random.Philox(key=np.array(key, dtype=np.uint64))
    return np.argsort(bits.random_raw(n), kind="stable").astype(np.int64)
