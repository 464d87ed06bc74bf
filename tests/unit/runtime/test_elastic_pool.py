"""Pools whose members come and go in the middle of work, over actors without processes."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steadyhelm.errors import EngineLostError, LearnerLostError, ModelError
from steadyhelm.runtime.pool import ONE, Pool, Stage
from steadyhelm.runtime.routing import Work

from tests.unit.runtime.local_actors import Cluster


class Worker:
    """Holds orders until it is told, or for some turns of the event loop."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.held: dict[str, asyncio.Event] = {}
        self.closed = False

    async def rollout(self, order: str) -> str:
        self.taken.append(order)
        if order.startswith("hold"):
            await self.held.setdefault(order, asyncio.Event()).wait()
        for _ in range(10 * order.startswith("slow")):
            await asyncio.sleep(0)
        return order

    async def close(self) -> None:
        self.closed = True


class Fleet:
    """A pool, where its members are, and the services in them."""

    def __init__(self, size: int, factory: Callable[[], Any] = Worker, **more: Any) -> None:
        self.cluster = Cluster()
        self.told: list[str] = []
        settings = {"start_deadline_s": 30.0, "call_deadline_s": 30.0, "notice_s": 30.0} | more
        self.pool = Pool(
            service="worker",
            spawn=self.cluster.spawn,
            end=self.cluster.end,
            size=size,
            tell=lambda event: self.told.append(str(event)),
            **settings,
        )
        self.factory = factory

    async def start(self) -> None:
        self.pool.launch()
        await self.pool.ready(self.factory)

    def order(self, name: str, work: Work = ONE) -> asyncio.Task[str]:
        return asyncio.create_task(self.pool.call(lambda actor: actor.rollout.remote(name), name, work))

    def workers(self) -> list[Worker]:
        """By number; of a member that has not built its own, one that has done nothing."""
        return [actor.hosted._built or Worker() for actor in self.cluster.actors]

    async def until(self, holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not holds():  # noqa: ASYNC110 - what it waits for tells nobody
                await asyncio.sleep(0.001)

    def serving(self) -> list[int]:
        return [member.number for member in self.pool.serving]


async def test_a_grown_pool_serves_with_its_new_members_and_their_calls_wait_for_nobody():
    fleet = Fleet(1)
    await fleet.start()
    held = [fleet.order(f"hold {n}") for n in range(4)]
    await fleet.until(lambda: len(fleet.workers()[0].taken) == 2)
    fleet.pool.resize(2)
    await fleet.until(lambda: len(fleet.workers()) == 2 and len(fleet.workers()[1].taken) == 2)
    for worker in fleet.workers():
        for event in worker.held.values():
            event.set()
    assert sorted(await asyncio.gather(*held)) == [f"hold {n}" for n in range(4)]
    assert any("worker 1 serves" in line for line in fleet.told)
    await fleet.pool.close()


async def test_a_new_member_serves_only_once_it_is_prepared():
    fleet = Fleet(1)
    await fleet.start()
    prepared = asyncio.Event()

    async def prepare(_: Any) -> None:
        await prepared.wait()

    fleet.pool.prepare = prepare
    fleet.pool.resize(2)
    await fleet.until(lambda: fleet.cluster.actors[-1].hosted._built is not None)
    assert fleet.serving() == [0]
    prepared.set()
    await fleet.until(lambda: fleet.serving() == [0, 1])
    await fleet.pool.close()


async def test_a_member_that_alone_hears_nothing_of_the_learner_is_replaced_and_where_all_do_it_is_the_learner():
    fleet = Fleet(2)
    await fleet.start()

    async def take(member: Any) -> int:
        if member.number == 0:
            raise LearnerLostError("rank 1 did not send them")
        return member.number

    assert await fleet.pool.everywhere(take) == [1]
    await fleet.until(lambda: fleet.serving() == [1, 2])

    async def none(member: Any) -> int:
        raise LearnerLostError("rank 1 did not send them")

    with pytest.raises(LearnerLostError):
        await fleet.pool.everywhere(none)
    assert fleet.serving() == [1, 2]
    await fleet.pool.close()


async def test_a_drained_member_finishes_its_calls_takes_no_new_ones_and_ends_its_service():
    fleet = Fleet(2)
    await fleet.start()
    held = [fleet.order("hold a"), fleet.order("hold b")]
    await fleet.until(lambda: all(worker.taken for worker in fleet.workers()))
    fleet.pool.resize(1)
    leaving = next(member for member in fleet.pool.members if member.stage is Stage.DRAINING)
    worker = fleet.workers()[leaving.number]
    others = [await fleet.order(f"next {n}") for n in range(3)]
    assert others == ["next 0", "next 1", "next 2"]
    assert not worker.closed
    assert len(worker.taken) == 1
    for each in fleet.workers():
        for event in each.held.values():
            event.set()
    assert await asyncio.gather(*held) == ["hold a", "hold b"]
    await fleet.until(lambda: fleet.cluster.actors[leaving.number].dead.done())
    assert worker.closed
    assert fleet.pool.replaced == 0
    assert [member.number for member in fleet.pool.members] == fleet.serving()
    assert len(fleet.serving()) == 1
    await fleet.pool.close()


async def test_a_member_that_drains_too_long_hands_its_calls_over_and_that_costs_them_no_try():
    fleet = Fleet(1)
    await fleet.start()
    held = fleet.order("hold")
    for number in range(6):  # more often than a call may be lost
        await fleet.until(lambda number=number: fleet.serving() == [number] and fleet.workers()[number].taken != [])
        fleet.pool.drain(fleet.pool.serving[0], "the test says so", deadline_s=0.0)
    await fleet.until(lambda: fleet.serving() == [6] and fleet.workers()[6].taken == ["hold"])
    fleet.workers()[6].held["hold"].set()
    assert await held == "hold"
    assert any("its calls go to others" in line for line in fleet.told)
    assert not any(worker.closed for worker in fleet.workers())  # a busy one is killed with what it started
    await fleet.pool.close()


async def test_a_drained_member_whose_place_is_wanted_is_followed_by_another():
    fleet = Fleet(2)
    await fleet.start()
    fleet.pool.drain(fleet.pool.members[0], "the test says so")
    await fleet.until(lambda: fleet.serving() == [1, 2])
    assert [member.slot for member in fleet.pool.serving] == [1, 2]
    await fleet.until(lambda: len(fleet.cluster.living) == 2)
    fleet.pool.drain(fleet.pool.members[0], "and again")
    await fleet.until(lambda: fleet.serving() == [2, 3])
    assert [member.slot for member in fleet.pool.serving] == [2, 0]
    await fleet.pool.close()


async def test_what_has_not_started_goes_first_when_a_pool_shrinks():
    fleet = Fleet(2)
    await fleet.start()
    fleet.cluster.room = 2
    fleet.pool.resize(3)
    await asyncio.sleep(0.01)
    fleet.pool.resize(2)
    await asyncio.sleep(0.01)
    assert fleet.serving() == [0, 1]
    assert fleet.cluster.actors[2].dead.done()
    assert not any("did not start" in line for line in fleet.told)
    await fleet.pool.close()


async def test_without_room_the_pool_goes_on_with_those_it_has_says_so_once_and_tries_again():
    fleet = Fleet(1, retry_s=0.01)
    await fleet.start()
    fleet.pool.start_deadline_s = 0.05
    fleet.cluster.room = 1
    fleet.pool.resize(3)
    assert await fleet.order("meanwhile") == "meanwhile"
    await fleet.until(lambda: len(fleet.cluster.actors) > 6)
    assert fleet.pool.room == 1
    assert len([line for line in fleet.told if "did not start" in line]) == 1
    assert any("it reserves nothing" in line and "1 of 3 serve" in line for line in fleet.told)
    assert await fleet.order("still") == "still"
    fleet.cluster.room = None
    await fleet.until(lambda: len(fleet.serving()) == 3)
    assert fleet.pool.room is None
    await fleet.pool.close()


async def test_a_pool_of_which_some_cannot_be_placed_at_the_start_begins_with_the_others():
    fleet = Fleet(3, start_deadline_s=1.0)
    fleet.cluster.room = 2
    await fleet.start()
    assert fleet.serving() == [0, 1]
    assert fleet.pool.room == 2
    await fleet.pool.close()


async def test_a_service_that_cannot_be_built_elsewhere_costs_a_running_pool_nothing():
    fleet = Fleet(1)
    await fleet.start()

    def broken() -> Worker:
        raise ModelError("this node lacks the model folder")

    fleet.pool._factory = broken
    fleet.pool.resize(2)
    await fleet.until(lambda: fleet.pool.room == 1)
    assert any("lacks the model folder" in line for line in fleet.told)
    assert await fleet.order("on") == "on"
    await fleet.pool.close()


async def test_a_pool_whose_members_are_all_lost_and_cannot_start_again_ends_its_calls():
    fleet = Fleet(1)
    await fleet.start()
    fleet.cluster.room = 0
    fleet.pool.start_deadline_s = 0.3
    fleet.cluster.actors[0].kill()
    with pytest.raises(EngineLostError, match="4 worker actors in a row were lost"):
        await fleet.order("anything")
    await fleet.pool.close()


async def test_members_on_a_node_that_is_taken_away_drain_within_what_it_has_left():
    left: dict[str, float] = {}
    fleet = Fleet(1, leaving=lambda: left)
    fleet.cluster.node = "spot"
    left["spot"] = 0.0
    await fleet.start()
    fleet.cluster.node = "safe"
    await fleet.until(lambda: fleet.serving() == [1])
    assert fleet.pool.members[-1].node == "safe"
    assert any("its node goes in 0 s" in line for line in fleet.told)
    assert await fleet.order("on") == "on"
    await fleet.pool.close()


async def test_an_order_goes_back_to_the_member_that_has_met_its_images():
    fleet = Fleet(3)
    await fleet.start()
    cat, dog = (Work(marks=frozenset({f"images/{name}"})) for name in ("cat", "dog"))
    first = [fleet.order("hold cat", cat), fleet.order("hold dog", dog)]
    await fleet.until(lambda: [len(worker.taken) for worker in fleet.workers()] == [1, 1, 0])
    for worker in fleet.workers():
        for event in worker.held.values():
            event.set()
    await asyncio.gather(*first)
    await fleet.order("dog again", dog)
    await fleet.order("bird", Work(marks=frozenset({"images/bird"})))
    assert [worker.taken for worker in fleet.workers()] == [["hold cat", "bird"], ["hold dog", "dog again"], []]
    await fleet.pool.close()


ACTIONS = st.one_of(
    st.tuples(st.just("order"), st.integers(1, 6)),
    st.tuples(st.just("resize"), st.integers(1, 4)),
    st.tuples(st.just("drain"), st.integers(0, 3)),
    st.tuples(st.just("hurry"), st.integers(0, 3)),
    st.tuples(st.just("kill"), st.integers(0, 3)),
    st.tuples(st.just("turns"), st.integers(1, 30)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, min_size=1, max_size=25))
def test_whatever_comes_and_goes_each_order_is_answered_once(actions: list[tuple[str, int]]):
    async def play() -> None:
        fleet = Fleet(2)
        await fleet.start()
        orders: list[asyncio.Task[str]] = []
        kills: Counter[str] = Counter()
        for action, n in actions:
            serving = fleet.pool.serving
            member = serving[n % len(serving)] if serving else None
            match action:
                case "order":
                    orders += [fleet.order(f"slow {len(orders) + i}") for i in range(n)]
                case "resize":
                    fleet.pool.resize(n)
                case "drain" if member:
                    fleet.pool.drain(member, "the test says so")
                case "hurry" if member:
                    fleet.pool.drain(member, "the test says so", deadline_s=0.0)
                case "kill" if member and max([kills[what] for what in member.doing], default=0) < 3:
                    kills.update(member.doing)
                    member.actor.kill()
                case "turns":
                    for _ in range(n):
                        await asyncio.sleep(0)
        answers = await asyncio.wait_for(asyncio.gather(*orders), 30)
        assert answers == [f"slow {n}" for n in range(len(orders))]
        await fleet.until(lambda: len(fleet.serving()) == fleet.pool.size or _idle_death(fleet))
        await fleet.until(lambda: len(fleet.pool.members) == fleet.pool.size)
        await fleet.pool.close()
        assert fleet.cluster.living == []

    asyncio.run(play())


def _idle_death(fleet: Fleet) -> bool:
    """Whether a member died that nobody has asked since: a pool learns of it by the next call."""
    return any(member.actor.dead.done() for member in fleet.pool.serving)
