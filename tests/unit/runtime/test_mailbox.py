import asyncio
import errno

import pytest
from steadyhelm.data.types import ImageKey
from steadyhelm.errors import FatalError, LearnerLostError, NonFiniteError, StoreError
from steadyhelm.runtime.mailbox import REMEMBERED, Mailbox, Outcome
from steadyhelm.services import Coming


async def rank(mailbox: Mailbox, number: int, world: int, process: str, answers: dict[str, Outcome]) -> list[str]:
    """A rank that answers each command by name until it is told to stop; returns what it was told."""
    incarnation = await mailbox.join(number, world, process)
    told: list[str] = []
    while True:
        command = await mailbox.next(incarnation, len(told))
        assert command is not None
        told.append(command.name)
        if command.name == "stop":
            return told
        await mailbox.post(incarnation, number, command.number, answers[command.name])


async def test_a_call_returns_rank_zeros_value_once_all_ranks_have_answered():
    mailbox = Mailbox()
    ranks = [asyncio.create_task(rank(mailbox, n, 2, f"p{n}", {"step": Outcome(value=f"from {n}")})) for n in range(2)]
    assert await mailbox.call("step", ()) == "from 0"
    await mailbox.stop()
    assert await asyncio.gather(*ranks) == [["step", "stop"], ["step", "stop"]]


async def test_a_call_waits_for_the_slowest_rank():
    mailbox = Mailbox()
    first = asyncio.create_task(rank(mailbox, 0, 2, "a", {"step": Outcome(value=1)}))
    call = asyncio.create_task(mailbox.call("step", ()))
    await asyncio.sleep(0.05)
    assert not call.done()
    second = asyncio.create_task(rank(mailbox, 1, 2, "b", {"step": Outcome(value=2)}))
    assert await call == 1
    await mailbox.stop()
    await asyncio.gather(first, second)


async def test_an_error_of_any_rank_arrives_under_its_own_type():
    mailbox = Mailbox()
    bad = Outcome.of(NonFiniteError("iteration 3: the loss is NaN"))
    ranks = [
        asyncio.create_task(rank(mailbox, 0, 2, "a", {"step": Outcome(value=1)})),
        asyncio.create_task(rank(mailbox, 1, 2, "b", {"step": bad})),
    ]
    with pytest.raises(NonFiniteError, match="iteration 3"):
        await mailbox.call("step", ())
    await mailbox.stop()
    await asyncio.gather(*ranks)


async def test_a_group_that_joins_again_fails_the_call_under_way_and_serves_the_next():
    mailbox = Mailbox()
    lost = asyncio.create_task(mailbox.join(0, 1, "old process"))
    old = await lost
    call = asyncio.create_task(mailbox.call("step", ()))
    await asyncio.sleep(0.01)
    again = asyncio.create_task(rank(mailbox, 0, 1, "new process", {"restore": Outcome(value="restored")}))
    with pytest.raises(LearnerLostError, match="step"):
        await call
    assert await mailbox.call("restore", ()) == "restored"
    stale = await mailbox.next(old, 0)
    assert stale is not None
    assert stale.name == "stop"
    await mailbox.post(old, 0, 0, Outcome(value="too late"))
    await mailbox.stop()
    assert await again == ["restore", "stop"]


async def test_the_same_rank_under_the_same_process_may_ask_to_join_again():
    mailbox = Mailbox()
    assert await mailbox.join(0, 1, "a") == await mailbox.join(0, 1, "a")


def image(number: int, iteration: int = 5) -> Coming:
    return Coming(iteration=iteration, images=(ImageKey(f"images/{number}"),))


async def test_every_rank_hears_in_order_what_to_expect():
    mailbox = Mailbox()
    incarnation, _ = await asyncio.gather(mailbox.join(0, 2, "a"), mailbox.join(1, 2, "b"))
    waiting = asyncio.create_task(mailbox.expected(incarnation, 0))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await mailbox.expect(image(0))
    await mailbox.expect(image(1))
    first = await waiting
    assert first is not None
    assert first[0].coming == image(0)
    both = await mailbox.expected(incarnation, 0)
    assert both is not None
    assert [entry.coming for entry in both] == [image(0), image(1)]
    rest = await mailbox.expected(incarnation, both[0].number + 1)
    assert rest == both[1:]


async def test_what_to_expect_is_forgotten_where_nobody_asks_and_with_the_group():
    mailbox = Mailbox()
    old = await mailbox.join(0, 1, "old")
    for number in range(REMEMBERED + 3):
        await mailbox.expect(image(number))
    found = await mailbox.expected(old, 0)
    assert found is not None
    assert [entry.number for entry in found] == list(range(3, REMEMBERED + 3))
    new = await mailbox.join(0, 1, "new")
    assert await mailbox.expected(old, 0) is None
    await mailbox.expect(image(7, 6))
    found = await mailbox.expected(new, 0)
    assert found is not None
    assert [entry.coming for entry in found] == [image(7, 6)]
    await mailbox.stop()
    assert await mailbox.expected(new, 0) is None


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (StoreError("the disk is full", "DiskFull"), StoreError, "DiskFull"),
        (NonFiniteError("the loss is NaN"), NonFiniteError, "NonFinite"),
        (OSError(errno.ENOSPC, "No space left on device"), FatalError, "DiskFull"),
        (ZeroDivisionError(), FatalError, "Bug"),
    ],
)
def test_an_error_comes_with_its_kind_and_its_reason(error: Exception, kind: type[Exception], reason: str):
    with pytest.raises(kind) as caught:
        Outcome.of(error).result()
    assert (type(caught.value), caught.value.reason) == (kind, reason)
