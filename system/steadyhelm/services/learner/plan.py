"""Which rank passes which rows through the model, in which micro-batches. Decides speed and memory, no numbers."""

from __future__ import annotations

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


def padded(
    micro_batch: NDArray[np.int64], filler: int, with_images: NDArray[np.bool_] | None
) -> tuple[list[int], list[bool]]:
    """The rows to pass through the model, and which of them count: an empty micro-batch borrows the row ``filler``.

    Args:
        micro_batch: positions in the iteration's batch.
        filler: a row to borrow; one with images where ``with_images`` is given.
        with_images: which of the iteration's rows have images [N], where every micro-batch needs one. Under ZeRO-3 all
            ranks gather the same weights in the same order, so either all of them run the vision tower or none.
    """
    rows = [int(row) for row in micro_batch]
    if not rows or (with_images is not None and not with_images[rows].any()):
        return [*rows, filler], [*[True] * len(rows), False]
    return rows, [True] * len(rows)
