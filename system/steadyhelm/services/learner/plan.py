"""Which rank passes which rows through the model, in which micro-batches. Decides speed and memory, no numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def deal(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], world_size: int, micro_batch: int
) -> list[list[NDArray[np.int64]]]:
    """The micro-batches of each rank for one optimiser step.

    Rows are sorted by length and dealt to the ranks in turn, so that ranks get equal work and micro-batches little
    padding. All ranks get equally many micro-batches, since each is a collective; some may be empty.

    Args:
        rows: positions in the iteration's batch that count in this step.
        lengths: tokens of each of the iteration's rows, prompt and completion.
        world_size: number of ranks.
        micro_batch: most rows of a micro-batch.

    Returns:
        for each rank its micro-batches, each an array of positions.
    """
    order = rows[np.lexsort((rows, lengths[rows]))]
    count = -(-len(order) // (world_size * micro_batch))
    shares = [order[rank::world_size] for rank in range(world_size)]
    return [[share[n * micro_batch : (n + 1) * micro_batch] for n in range(count)] for share in shares]


def filled(micro_batch: NDArray[np.int64], rows: NDArray[np.int64]) -> Sequence[int]:
    """The rows to pass through the model: an empty micro-batch borrows a row, which its caller counts as not valid."""
    return [int(row) for row in (micro_batch if len(micro_batch) else rows[:1])]
