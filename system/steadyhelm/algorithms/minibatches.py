"""Which trajectories of an iteration's batch go into which optimiser step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def minibatches(n: int, train_batch: int, seed: int, iteration: int, epoch: int) -> list[NDArray[np.int64]]:
    """A permutation of 0 … n − 1 in chunks of ``train_batch``, the last one smaller where it does not divide.

    The order sorts the raw output of Philox-4×64 keyed by (seed, iteration·2³² + epoch): a counter, so that an
    iteration can be stepped again without the ones before it, and the same in every NumPy release.

    Args:
        n: trajectories in the batch, unscored ones included, in the manifest's order.
        train_batch: trajectories per optimiser step, over all ranks.
        seed: the run's seed.
        iteration: the iteration, from 1.
        epoch: the pass over the batch, from 0.

    Returns:
        ⌈n / train_batch⌉ arrays of positions in the batch.

    Raises:
        ValueError: a negative number, or ``train_batch`` below 1.
    """
    if min(n, seed, iteration, epoch) < 0 or train_batch < 1:
        raise ValueError(
            f"minibatches(n={n}, train_batch={train_batch}, seed={seed}, iteration={iteration}, epoch={epoch}): "
            "numbers must not be negative and train_batch at least 1"
        )
    bits = np.random.Philox(key=np.array([seed, (iteration << 32) + epoch], dtype=np.uint64))
    order = np.argsort(bits.random_raw(n), kind="stable").astype(np.int64)
    return [order[start : start + train_batch] for start in range(0, n, train_batch)]
