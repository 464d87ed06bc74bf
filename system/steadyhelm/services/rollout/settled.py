"""Work that goes on when nobody waits for it, as that of a thread does."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def settled(work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns or raises; cancelled, it ends only once ``work`` has.

    So what the caller gives back then (a lock, a file) is in nobody's hands any more. ``work`` has to end by itself.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody is told any more
        raise
