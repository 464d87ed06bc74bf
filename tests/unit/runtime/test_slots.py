"""Which of the servers that somebody else runs a member uses: the one that no other member has."""

import asyncio

from steadyhelm.runtime.pool import Pool

from tests.unit.runtime.local_actors import Cluster


class Worker:
    """Answers with its slot."""

    def __init__(self, slot: int) -> None:
        self.slot = slot

    async def rollout(self, order: str) -> int:
        return self.slot


async def test_whoever_takes_a_lost_members_place_gets_its_slot() -> None:
    cluster = Cluster()
    pool = Pool(
        service="rollout",
        spawn=cluster.spawn,
        end=cluster.end,
        size=3,
        start_deadline_s=30.0,
        call_deadline_s=30.0,
        notice_s=30.0,
        tell=lambda _: None,
        by_slot=True,
    )
    pool.launch()
    await pool.ready(Worker)
    assert [actor.hosted._built.slot for actor in cluster.actors] == [0, 1, 2]
    cluster.actors[1].kill()
    async with asyncio.timeout(20.0):
        while len(cluster.actors) < 4 or cluster.actors[3].hosted._built is None:
            await asyncio.gather(*(pool.call(lambda actor: actor.rollout.remote("x"), "asks") for _ in range(3)))
    assert cluster.actors[3].hosted._built.slot == 1
    await pool.close()
