"""Input for the learner's forward passes, prepared while the one before computes."""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from steadyhelm.telemetry import span

Input = TypeVar("Input")
Output = TypeVar("Output")


@contextmanager
def prefetched(prepare: Callable[[Input], Output], items: Sequence[Input]) -> Iterator[Iterator[Output]]:
    """Yields an iterator over ``prepare(item)``, in order, which prepares one item ahead on a thread of its own.

    What ``prepare`` raises is raised where its item is taken. Spans that it opens belong to the caller's; how long the
    caller waits for an item is one too.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:

        def ahead() -> Iterator[Output]:
            waiting: deque[Future[Output]] = deque()
            for item in items:
                waiting.append(thread.submit(contextvars.copy_context().run, prepare, item))
                if len(waiting) == 2:
                    yield _awaited(waiting.popleft())
            if waiting:
                yield _awaited(waiting.popleft())

        yield ahead()


def _awaited(item: Future[Output]) -> Output:
    with span("learner", "input"):
        return item.result()
