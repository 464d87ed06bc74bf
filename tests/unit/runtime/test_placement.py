"""Actors land in their pools, and who finds no room says what is not there."""

import asyncio
import itertools
import os
from collections.abc import Iterator

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from steadyhelm.config import RunFile
from steadyhelm.errors import DeadlineError
from steadyhelm.runtime import handles, placement
from steadyhelm.runtime.actors import RolloutActor, spawn
from steadyhelm.runtime.mailbox import Mailbox
from steadyhelm.runtime.placement import Node, actor_lacks, asked, lacking, place, pooled, ranks_lack, watched
from steadyhelm.telemetry import Event, Notice, ServiceState

GPU_NODE = {"CPU": 8.0, "GPU": 1.0, "pool_rollout": 1.0}
HEAD = Node(total={"CPU": 0.0, "pool_head": 16.0}, free={"pool_head": 14.0})
ENGINE = {"GPU": 1.0, "pool_rollout": 1.0}


class TestWords:
    """What is lacking, of which pool."""

    def test_a_pool_without_nodes(self):
        assert lacking(ENGINE, [HEAD]) == "pool rollout has no node: an actor asks for GPU 1, pool_rollout 1"

    def test_a_pool_whose_nodes_are_taken(self):
        taken = Node(total=GPU_NODE, free={"CPU": 8.0})
        assert lacking(ENGINE, [HEAD, taken, taken]) == (
            "pool rollout lacks GPU and pool_rollout: an actor asks for GPU 1, pool_rollout 1; on its 2 nodes are "
            "GPU 2 (0 free), pool_rollout 2 (0 free)"
        )

    def test_a_pool_whose_nodes_are_too_small(self):
        free = Node(total=GPU_NODE, free=GPU_NODE)
        assert lacking({"CPU": 16.0, "pool_rollout": 1.0}, [free, free]).startswith("pool rollout lacks CPU: ")

    def test_a_pool_that_has_it_all_but_on_no_one_node(self):
        nodes = [Node(total=GPU_NODE, free={"GPU": 1.0}), Node(total=GPU_NODE, free={"pool_rollout": 1.0})]
        assert lacking(ENGINE, nodes).startswith("pool rollout has no node with all of it at once: ")

    def test_ranks_need_room_for_all_of_them(self):
        nodes = [Node(total={"pool_learner": 4.0}, free={"pool_learner": 3.0})]
        assert lacking({"pool_learner": 1.0}, nodes, count=3) == ""
        assert lacking({"pool_learner": 1.0}, nodes, count=4) == (
            "pool learner lacks pool_learner: 4 actors ask, each for pool_learner 1; on its 1 node are pool_learner 4 "
            "(3 free)"
        )

    def test_a_cluster_without_pools(self):
        assert lacking({"CPU": 2.0}, [Node(total={"CPU": 1.0}, free={"CPU": 1.0})]).startswith("the cluster lacks CPU")
        assert lacking({}, []) == ""


AMOUNTS = st.dictionaries(st.sampled_from(["CPU", "GPU", "pool_a"]), st.integers(1, 3).map(float), min_size=1)


@given(asks=AMOUNTS, free=st.lists(AMOUNTS, max_size=3), count=st.integers(1, 4))
def test_nothing_is_lacking_exactly_where_the_actors_can_be_dealt_out(
    asks: dict[str, float], free: list[dict[str, float]], count: int
):
    def fits(deal: tuple[int, ...]) -> bool:
        return all(
            node.get(name, 0) >= amount * deal.count(n) for n, node in enumerate(free) for name, amount in asks.items()
        )

    possible = any(fits(deal) for deal in itertools.product(range(len(free)), repeat=count))
    assert (lacking(asks, [Node(total=f, free=f) for f in free], count) == "") == possible


async def test_what_is_lacking_is_said_once_and_again_when_it_changes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(placement, "SAID_AFTER_S", 0.0)
    monkeypatch.setattr(placement, "LOOK_S", 0.001)
    over, said = asyncio.Event(), []
    answers = iter(["no GPU", "no GPU", ConnectionError(), "no node", "", ""])

    def look() -> str:
        answer = next(answers, None)
        if answer is None:
            loop.call_soon_threadsafe(over.set)
            return ""
        if isinstance(answer, Exception):
            raise answer
        return answer

    loop = asyncio.get_running_loop()
    task = asyncio.create_task(watched(look, said.append))
    await asyncio.wait_for(over.wait(), 20)
    task.cancel()
    assert said == ["no GPU", "no node", ""]


def test_only_a_cluster_with_pools_places():
    assert not pooled({"CPU": 2.0, "node:10.0.0.1": 1.0})
    assert pooled({"CPU": 0.0, "pool_head": 16.0})
    assert asked(0.0, 1.0, {"pool_rollout": 1.0}) == {"GPU": 1.0, "pool_rollout": 1.0}


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A node that is the head and has room for one rollout; on a busy machine Ray may give up, hence three tries."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        os.environ.pop(name, None)
    for left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=0,
                resources={"pool_head": 16.0, "pool_rollout": 1.0},
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                log_to_driver=False,
                logging_level="error",
            )
            break
        except Exception:  # Ray raises plain Exception for this
            ray.shutdown()
            if not left:
                raise
    yield
    ray.shutdown()


RUN = RunFile.model_validate(
    {
        "name": "placed",
        "model": {"path": "unused"},
        "data": {"train": "unused.py:pairs"},
        "rollout": {"replicas": 2},
        "learner": {"train_batch": 1},
        "schedule": {"iterations": 1},
        "runtime": {"start_deadline_s": 4.0},
    }
)


class Nothing:
    """A service that does nothing."""


@pytest.mark.usefixtures("pools")
async def test_an_engine_without_room_says_so_while_the_other_has_its_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(placement, "SAID_AFTER_S", 0.1)
    monkeypatch.setattr(placement, "LOOK_S", 0.1)
    told: list[Event] = []
    patient = RUN.model_copy(update={"runtime": RUN.runtime.model_copy(update={"start_deadline_s": 120.0})})
    pool = handles.RolloutHandle(patient, told.append).pool
    pool.launch()
    starts = asyncio.create_task(pool.ready(Nothing))
    ask = "an actor asks for pool_rollout 1; on its 1 node are pool_rollout 1 (0 free)"
    async with asyncio.timeout(100):
        while not any(isinstance(e, ServiceState) and e.lacks for e in told) or not pool.serving:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert f"rollout 1 finds no room: pool rollout lacks pool_rollout: {ask}" in [
        event.text for event in told if isinstance(event, Notice)
    ]
    assert [member.number for member in pool.serving] == [0]
    starts.cancel()
    await pool.close()


@pytest.mark.usefixtures("pools")
async def test_a_service_whose_pool_has_no_node_ends_with_what_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(placement, "SAID_AFTER_S", 0.2)
    monkeypatch.setattr(placement, "LOOK_S", 0.1)
    reward = handles.RewardHandle(RUN, lambda event: None)
    reward.pool.launch()
    with pytest.raises(DeadlineError, match="pool reward has no node: an actor asks for pool_reward 1"):
        await reward.pool.ready(Nothing)
    await reward.pool.close()


@pytest.mark.usefixtures("pools")
async def test_an_actor_that_has_its_place_lacks_nothing_however_full_the_pool_is():
    actor = spawn(RolloutActor, "placed", cpus=0, gpus=0, resources=place("rollout"))
    await actor.start.remote(Nothing)
    assert actor_lacks(actor, {"pool_rollout": 1.0}) == ""
    ray.kill(actor)


@pytest.mark.usefixtures("pools")
def test_ranks_lack_nothing_once_one_of_them_is_there():
    asks = {"pool_learner": 1.0}
    assert ranks_lack(asks, 2) == "pool learner has no node: 2 actors ask, each for pool_learner 1"
    rank = ray.remote(num_cpus=0)(type("RayTrainWorkerOfATest", (Mailbox,), {})).remote()
    ray.get(rank.__ray_ready__.remote())
    assert ranks_lack(asks, 2) == ""
    ray.kill(rank)
