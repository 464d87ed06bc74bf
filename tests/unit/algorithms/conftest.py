import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


@pytest.fixture(scope="session")
def on_ranks():
    """Runs ``work(rank, reduce)`` on so many threads at once, with a real sum over all of them; their results."""

    def run(count, work):
        slots = [None] * count
        barrier = threading.Barrier(count)

        def on(rank):
            def reduce(sums):
                slots[rank] = sums
                barrier.wait(timeout=30)
                total = torch.stack(slots).sum(0)
                barrier.wait(timeout=30)
                return total

            return work(rank, reduce)

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(on, range(count)))

    return run
