"""Which trajectories of an iteration's batch go into which optimiser step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steadyhelm.data.permutation import permutation


def minibatches(n: int, train_batch: int, seed: int, iteration: int, epoch: int) -> list[NDArray[np.int64]]:
    """A permutation of 0 … n − 1 in chunks of ``train_batch``, the last one smaller where it does not divide.

    The permutation is keyed by (seed, iteration·2³² + epoch): a counter, so that an iteration can be stepped again
    without the ones before it. Iterations begin at 1, so no key is one of ``data.cursor``'s.

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
    order = permutation(n, (seed, (iteration << 32) + epoch))
    return [order[start : start + train_batch] for start in range(0, n, train_batch)]
