"""Work whose caller is cancelled."""

import asyncio

import pytest
from steadyhelm.services.rollout.settled import settled


async def test_a_cancelled_caller_ends_only_once_its_work_has() -> None:
    go_on, begun, lock = asyncio.Event(), asyncio.Event(), asyncio.Lock()
    held: list[bool] = []

    async def work() -> None:
        begun.set()
        await go_on.wait()
        held.append(lock.locked())

    async def call() -> None:
        async with lock:
            await settled(work())

    task = asyncio.create_task(call())
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held == [True]


async def test_what_work_returns_or_raises_is_the_callers() -> None:
    async def give() -> int:
        return 3

    async def fail() -> int:
        raise ValueError("three")

    assert await settled(give()) == 3
    with pytest.raises(ValueError, match="three"):
        await settled(fail())
