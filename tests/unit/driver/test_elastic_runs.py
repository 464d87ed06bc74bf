"""Whole runs over fake services whose engines come and go in the middle of work."""

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steadyhelm.config import RunFile
from steadyhelm.data.types import PolicyVersion, WeightsRecord
from steadyhelm.errors import LearnerLostError, ObjectMissingError
from steadyhelm.report import read_metrics
from steadyhelm.runtime.handles import RolloutHandle
from steadyhelm.scaling import Scaler
from steadyhelm.services import EngineLoad, Served
from steadyhelm.telemetry import Notice
from steadyhelm.telemetry import metrics as names
from steadyhelm.testing.fake_services import FakeLearner, FakeRollout
from steadyhelm.testing.memory_store import MemoryStore

from tests.unit.runtime.local_actors import Cluster

EVERY_ID = [f"0:{n}" for n in range(32)]


def with_engines(run: RunFile, *, ahead: int = 0, **rollout: object) -> RunFile:
    parts = run.model_dump() | {"rollout": {"engine": {"type": "transformers", "batch": 1}, **rollout}}
    parts["schedule"] |= {"iterations": 4, "prompts_per_iteration": 8, "max_staleness": ahead}
    parts["algorithm"]["correction"]["mode"] = "token" if ahead else "off"
    return RunFile.model_validate(parts)


class Engines:
    """A pool of fake workers without processes, on one store."""

    def __init__(self, run: RunFile, store: MemoryStore, *, lingers: bool = False) -> None:
        self.cluster = Cluster(lingers=lingers)
        self.told: list[str] = []
        self.handle = RolloutHandle(run, lambda event: self.told.append(str(event)))
        self.pool = self.handle.pool
        self.pool.spawn, self.pool.end, self.pool.leaving = self.cluster.spawn, self.cluster.end, None
        self.factory = lambda: FakeRollout(store=store, slow_s=0.0005)

    async def __aenter__(self) -> "Engines":
        self.pool.launch()
        await self.pool.ready(self.factory)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pool.close()


CHAOS = st.lists(
    st.tuples(st.sampled_from(["grow", "shrink", "drain", "hurry", "kill"]), st.integers(0, 3), st.integers(0, 6)),
    max_size=12,
)


async def disturb(engines: Engines, chaos: list[tuple[str, int, int]]) -> None:
    kills = 0
    for action, which, pause in chaos:
        await asyncio.sleep(pause / 1000)
        serving = engines.pool.serving
        member = serving[which % len(serving)] if serving else None
        match action:
            case "grow":
                engines.pool.resize(min(4, engines.pool.size + 1))
            case "shrink":
                engines.pool.resize(max(1, engines.pool.size - 1))
            case "drain" if member:
                engines.pool.drain(member, "the test says so")
            case "hurry" if member:
                engines.pool.drain(member, "the test says so", deadline_s=0.0)
            case "kill" if member and kills < 3:  # one order that loses four engines ends a run
                kills += 1
                member.actor.kill()


@pytest.mark.parametrize("ahead", [0, 2])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chaos=CHAOS, lingers=st.booleans())
def test_whatever_engines_come_and_go_every_prompt_is_trained_once(start, run_file, ahead, chaos, lingers):
    run = with_engines(run_file, ahead=ahead, replicas=2)

    async def undisturbed() -> dict[int, dict[str, float]]:
        store = MemoryStore()
        attempt = start(store, run)
        assert await attempt.follow() == EVERY_ID
        return attempt.exact_metrics()

    expected = asyncio.run(undisturbed())

    async def disturbed() -> None:
        store = MemoryStore()
        async with Engines(run, store, lingers=lingers) as engines:
            attempt = start(store, run, rollout=engines.handle)
            trouble = asyncio.create_task(disturb(engines, chaos))
            applied = await asyncio.wait_for(attempt.follow(), 60)
            await trouble
        assert applied == EVERY_ID
        assert attempt.log.finished()["ledger"] == {"trained": 32}
        if not ahead:  # rollouts that ran ahead may be sampled from another version the second time
            assert attempt.exact_metrics() == expected

    asyncio.run(disturbed())


class Latecomer(FakeRollout):
    """Is so slow that the first weights that it is to take are given up before it has them."""

    def __init__(self, store: MemoryStore, asked: asyncio.Event, moved_on: asyncio.Event) -> None:
        super().__init__(store=store)
        self.asked, self.moved_on = asked, moved_on

    async def apply_weights(self, weights: WeightsRecord) -> Served[None]:
        if not self.asked.is_set():
            self.asked.set()
            await self.moved_on.wait()
            raise ObjectMissingError(f"weights {weights.version} were given up by their learner for later ones")
        return await super().apply_weights(weights)


async def test_a_newcomer_whose_weights_were_given_up_meanwhile_takes_the_later_ones(run_file):
    store, asked, moved_on = MemoryStore(), asyncio.Event(), asyncio.Event()
    learner = FakeLearner(store=store)

    async def weights(iteration: int) -> WeightsRecord:
        version = PolicyVersion(iteration=iteration, attempt=1)
        return (await learner.publish(version, f"weights/{iteration}")).value

    async with Engines(with_engines(run_file, replicas=1), store) as engines:
        await engines.handle.apply_weights(await weights(0))
        engines.pool._factory = lambda: Latecomer(store, asked, moved_on)
        engines.pool.resize(2)
        await asyncio.wait_for(asked.wait(), 30)
        for iteration in (1, 2, 3):
            await engines.handle.apply_weights(await weights(iteration))
        moved_on.set()
        async with asyncio.timeout(30):
            while len(engines.pool.serving) < 2:  # noqa: ASYNC110 - what it waits for tells nobody
                await asyncio.sleep(0.001)
        assert [member.number for member in engines.pool.serving] == [0, 1]
        assert engines.pool.room is None
        assert engines.cluster.actors[1].hosted._service.weights.version.iteration == 3


@dataclass
class Measured(FakeRollout):
    """A service whose engines are a number, always saturated, and of which the learner always wants more."""

    serving: int = 1
    desired: int = 1
    asked: list[int] = field(default_factory=list)

    def load(self) -> EngineLoad:
        self.serving = self.desired
        return self.glance()

    def glance(self) -> EngineLoad:
        return EngineLoad(
            serving=self.serving, desired=self.desired, saturation=1.0, in_flight_tokens=640.0, queue=8 / self.serving
        )

    def scale(self, desired: int) -> None:
        self.asked.append(desired)
        self.desired = desired


async def test_decisions_reach_the_service_the_terminal_and_the_metrics_with_their_reason(start, run_file):
    run = with_engines(run_file, scaling={"max": 4, "settle": 1})
    store = MemoryStore()
    rollout = Measured(store=store)
    attempt = start(store, run, rollout=rollout)
    await attempt.follow()
    assert rollout.asked == [3]
    lines = {line.iteration: line for line in read_metrics(store, "fake")}
    assert [lines[i].metrics[names.ENGINES_DESIRED] for i in (1, 2, 3, 4)] == [1, 3, 3, 3]
    assert [lines[i].metrics[names.ENGINES_SERVING] for i in (1, 2, 3, 4)] == [1, 1, 3, 3]
    assert all(0 < lines[i].metrics[names.LEARNER_WAIT] <= 1 for i in (1, 2, 3, 4))
    (note,) = (note for note in lines[2].notes if note.startswith("engines"))
    assert note.startswith("engines 1 → 3 behind iteration 2: learner waited ")
    assert any(note in str(event) for event in attempt.told)


async def test_a_batch_that_does_not_come_brings_engines_within_its_iteration(run_file):
    run = with_engines(run_file, scaling={"max": 4})
    told: list[Notice] = []
    rollout = Measured(store=MemoryStore())
    scaler = Scaler(run, rollout, told.append, lambda _: None)
    scaler.meanwhile(1, 900.0)
    assert rollout.asked == [], "how long the learner takes is not known yet"
    scaler.behind(1, {names.ITERATION_SECONDS: 10.0, names.LEARNER_WAIT: 0.0})
    scaler.meanwhile(2, 5.0)
    assert rollout.asked == [], "it may come yet"
    scaler.meanwhile(2, 10.0)
    assert rollout.asked == [3]
    text = "engines 1 → 3 in iteration 2: learner has waited 10 s for its batch: at least 4.0 engines would do"
    assert [notice.text for notice in told] == [text]


async def test_a_resumed_run_begins_with_the_engines_that_it_wanted_before(start, run_file):
    scaled = with_engines(run_file, scaling={"max": 4, "settle": 1})
    run = scaled.model_copy(update={"learner": scaled.learner.model_copy(update={"max_restarts": 0})})
    store = MemoryStore()
    learner = FakeLearner(store=store, lose_at={4})
    first = start(store, run, rollout=Measured(store=store), learner=learner)
    with pytest.raises(LearnerLostError):
        await first.follow()
    again = Measured(store=store)
    second = start(store, run, rollout=again)
    await second.follow()
    assert again.asked[0] == 3
    assert any("engines 1 → 3: as many as the run had wanted before" in str(event) for event in second.told)


@pytest.mark.parametrize("found", [b"\xff", b"{}\n", b"no JSON\n"])
async def test_damaged_metrics_cost_a_resumed_run_no_more_than_its_number_of_engines(start, run_file, found):
    scaled = with_engines(run_file, scaling={"max": 4, "settle": 1})
    run = scaled.model_copy(update={"learner": scaled.learner.model_copy(update={"max_restarts": 0})})
    store = MemoryStore()
    first = Measured(store=store)
    learner = FakeLearner(store=store, lose_at={4})
    with pytest.raises(LearnerLostError):
        await start(store, run, rollout=first, learner=learner).follow()
    assert first.asked == [3]
    for key in store.list("fake/metrics"):
        store.put(key, found)
    second = start(store, run)
    assert await second.follow() == EVERY_ID
    assert not any("as many as the run had wanted" in str(event) for event in second.told)


async def test_a_run_without_scaling_measures_its_engines_and_leaves_them_alone(start, run_file):
    run, store = with_engines(run_file, replicas=2), MemoryStore()
    async with Engines(run, store) as engines:
        attempt = start(store, run, rollout=engines.handle)
        await attempt.follow()
        assert len(engines.cluster.actors) == 2
    for line in read_metrics(store, "fake")[1:]:
        assert line.metrics[names.ENGINES_SERVING] == line.metrics[names.ENGINES_DESIRED] == 2
        assert 0 < line.metrics[names.SATURATION] <= 1
        assert line.metrics[names.QUEUE] == 4


async def test_a_lost_learner_and_lost_engines_do_not_add_up_to_a_prompt_trained_twice(start, run_file):
    run, store = with_engines(run_file, replicas=2), MemoryStore()
    async with Engines(run, store) as engines:
        attempt = start(store, run, rollout=engines.handle, learner=FakeLearner(store=store, lose_at={2, 4}))
        trouble = asyncio.create_task(disturb(engines, [("kill", 0, 2), ("kill", 1, 4), ("drain", 0, 4)]))
        assert await attempt.follow() == EVERY_ID
        await trouble
    assert attempt.log.finished()["ledger"] == {"trained": 32}
