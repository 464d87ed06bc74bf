"""Pools over real Ray actors: routing, deadlines, death, replacement."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import pytest
import ray
from steadyhelm.config import RunFile
from steadyhelm.errors import DataError, DeadlineError, EngineLostError, FatalError, RetryableError
from steadyhelm.runtime.actors import RolloutActor
from steadyhelm.runtime.calls import answer
from steadyhelm.runtime.cluster import cluster
from steadyhelm.runtime.pool import Pool

RUN = RunFile.model_validate(
    {
        "name": "pool-test",
        "model": {"path": "unused"},
        "data": {"train": "unused.py:pairs"},
        "learner": {"train_batch": 1},
        "schedule": {"iterations": 1},
    }
)


class Worker:
    """What the actors host: behaves as its orders say."""

    def __init__(self, deny: bool = False) -> None:
        if deny:
            raise DataError("record 3 is wrong: mend it")
        self.taken: list[float] = []

    async def rollout(self, order: str) -> tuple[str, int]:
        self.taken.append(time.monotonic())
        match order.partition(" "):
            case ("sleep", _, seconds):
                await asyncio.sleep(float(seconds))
            case ("die", _, file) if not os.path.exists(file):  # noqa: ASYNC240, PTH110
                open(file, "w").close()  # noqa: ASYNC230, PTH123
                os._exit(1)
            case ("die-always", _, _):
                os._exit(1)
            case ("wrong", _, _):
                raise DataError("prompt 0:7 is too long: raise data.max_prompt_tokens")
            case ("later", _, _) if len(self.taken) < 3:
                raise RetryableError("not yet", delay_s=0.01)
            case ("bug", _, _):
                raise ZeroDivisionError("a bug")
        return order, os.getpid()


class Denied(Worker):
    def __init__(self) -> None:
        super().__init__(deny=True)


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    with cluster(RUN):
        yield


def make(size: int, call_deadline_s: float = 60.0) -> tuple[Pool, list[str]]:
    told: list[str] = []
    remote = ray.remote(num_cpus=0, max_concurrency=8)(RolloutActor)
    pool = Pool(
        service="worker",
        spawn=lambda number: remote.remote(),
        size=size,
        start_deadline_s=60.0,
        call_deadline_s=call_deadline_s,
        notice_s=0.2,
        tell=lambda event: told.append(str(event)),
    )
    pool.launch()
    return pool, told


async def test_calls_spread_over_the_members_and_return_their_own_answers():
    pool, _ = make(2)
    await pool.ready(Worker)
    answers = await asyncio.gather(
        *(pool.call(lambda actor, n=n: actor.rollout.remote(f"sleep 0.{n % 2 + 1} {n}"[:9]), f"{n}") for n in range(4))
    )
    assert len({pid for _, pid in answers}) == 2
    await pool.close()


async def test_no_member_gets_more_than_two_calls_at_once():
    pool, _ = make(1)
    await pool.ready(Worker)
    calls = [asyncio.create_task(pool.call(lambda a: a.rollout.remote("sleep 0.2"), "nap")) for _ in range(6)]
    started = time.monotonic()
    while not all(call.done() for call in calls):
        assert len(pool.members[0].works) <= 2
        await asyncio.sleep(0.01)
    assert time.monotonic() - started > 0.5
    await pool.close()


async def test_a_call_whose_actor_dies_is_answered_by_another_one(tmp_path):
    pool, told = make(1)
    await pool.ready(Worker)
    order, _ = await pool.call(lambda a: a.rollout.remote(f"die {tmp_path}/dead"), "a deadly order")
    assert order == f"die {tmp_path}/dead"
    assert any("takes its place" in line for line in told)
    await pool.close()


async def test_an_order_that_kills_every_actor_ends_with_an_error():
    pool, _ = make(1)
    await pool.ready(Worker)
    with pytest.raises(EngineLostError, match="4 worker actors in a row"):
        await pool.call(lambda a: a.rollout.remote("die-always"), "a deadly order")
    await pool.close()


async def test_a_member_that_misses_the_deadline_is_replaced_and_said_to_be_waited_for():
    pool, told = make(1, call_deadline_s=1.0)
    await pool.ready(Worker)
    first = pool.members[0].number
    with pytest.raises(EngineLostError, match="deadline"):
        await pool.call(lambda a: a.rollout.remote("sleep 30"), "a long nap")
    assert pool.members[0].number > first
    assert any("waiting for worker 0: a long nap" in line for line in told)
    await pool.close()


class OneByOne(Worker):
    """Works on one order at a time, as an engine does that is no server."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = asyncio.Lock()

    async def rollout(self, order: str) -> tuple[str, int]:
        async with self._turn:
            return await super().rollout(order)


async def test_an_order_that_waits_for_another_one_has_its_deadline_behind_that():
    pool, _ = make(1, call_deadline_s=2.0)
    await pool.ready(OneByOne)
    orders = [f"sleep 1.{number}" for number in range(2, 6)]
    answers = await asyncio.gather(
        *(pool.call(lambda a, order=order: a.rollout.remote(order), order) for order in orders)
    )
    assert [order for order, _ in answers] == orders
    assert pool.replaced == 0
    await pool.close()


async def test_an_error_of_the_service_arrives_as_it_is_and_costs_no_member():
    pool, _ = make(1)
    await pool.ready(Worker)
    with pytest.raises(DataError, match="prompt 0:7 is too long"):
        await pool.call(lambda a: a.rollout.remote("wrong"), "a wrong order")
    with pytest.raises(FatalError, match="ZeroDivisionError: a bug"):
        await pool.call(lambda a: a.rollout.remote("bug"), "a bug")
    assert pool.members[0].serves
    await pool.close()


async def test_members_added_killed_and_drained_in_the_middle_of_work_leave_no_call_unanswered():
    pool, told = make(1)
    await pool.ready(Worker)

    def nap(number: int) -> asyncio.Task[tuple[str, int]]:
        order = f"sleep 0.{number % 3 + 1}"
        return asyncio.create_task(pool.call(lambda actor: actor.rollout.remote(order), f"nap {number}"))

    async def until(serving: list[int]) -> None:
        async with asyncio.timeout(120):
            while [m.number for m in pool.members if m.serves] != serving:  # noqa: ASYNC110 - a pool tells nobody
                await asyncio.sleep(0.01)

    (first,) = {(await nap(0))[1]}
    pool.resize(2)
    await until([0, 1])
    naps = [nap(number) for number in range(8)]
    await asyncio.sleep(0)
    os.kill(first, signal.SIGKILL)
    await until([1, 2])
    pool.drain(pool.members[0], "the test says so")
    await until([2, 3])
    naps += [nap(number) for number in range(4)]
    pool.resize(1)
    answers = await asyncio.gather(*naps)
    assert [order for order, _ in answers] == [f"sleep 0.{n % 3 + 1}" for n in (*range(8), *range(4))]
    assert first not in {pid for _, pid in answers}
    assert pool.replaced == 1
    for said in ("worker 0 is lost", "worker 1 takes no new work", "worker 1 has left", "1 are enough"):
        assert any(said in line for line in told), said
    await pool.close()


async def test_a_retryable_error_is_tried_again_on_the_same_members():
    pool, _ = make(1)
    await pool.ready(Worker)
    assert (await pool.call(lambda a: a.rollout.remote("later"), "a later order"))[0] == "later"
    assert pool.members[0].number == 0
    await pool.close()


async def test_what_a_constructor_raises_reaches_the_caller_of_ready():
    pool, _ = make(1)
    with pytest.raises(DataError, match="record 3 is wrong"):
        await pool.ready(Denied)
    await pool.close()


async def test_an_answer_past_its_deadline_is_an_error_that_names_what_was_waited_for():
    with pytest.raises(DeadlineError, match="the oracle"):
        await answer(asyncio.sleep(5), of="the oracle", deadline_s=0.1, notice_s=1.0, tell=lambda event: None)
