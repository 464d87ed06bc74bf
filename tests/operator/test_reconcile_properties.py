"""What holds whatever happens, in whatever order: any story of faults, people and crashes in the small world."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steadyhelm_operator.state import Submit

from tests.operator.judge import faults
from tests.operator.objects import run_file
from tests.operator.world import TEMPLATE, World

KUEUE = {"template": {"spec": {}, "labels": {"kueue.x-k8s.io/queue-name": "q"}}}
STEPS = {
    "look": lambda world: world.look(),
    "look and die at once": lambda world: world.look(crash_after=0),
    "look and die behind the status": lambda world: world.look(crash_after=1),
    "look and die behind an action": lambda world: world.look(crash_after=2),
    "kuberay": lambda world: world.kuberay(),
    "work": lambda world: world.driver_works(2),
    "fail": lambda world: world.driver_ends("FAILED", 1),
    "wrong input": lambda world: world.driver_ends("FAILED", 2),
    "killed": lambda world: world.driver_ends("FAILED", 137),
    "interrupted": lambda world: world.driver_ends("FAILED", 143),
    "stopped by hand": lambda world: world.driver_ends("STOPPED"),
    "lose the head": lambda world: world.lose_head(),
    "lose the cluster": lambda world: world.lose_cluster(),
    "break the network": lambda world: setattr(world, "reachable", False),
    "mend the network": lambda world: setattr(world, "reachable", True),
    "suspend": lambda world: world.change(suspend=True),
    "resume": lambda world: world.change(suspend=False),
    "change": lambda world: world.change(run=run_file(seed=world.now.second)),
    "wait": lambda world: world.wait(7),
    "wait long": lambda world: world.wait(700),
}
OFTEN = ["suspend", "resume", "break the network", "mend the network", "wait long", "look"]
"""What the dangerous orders are made of."""
USUAL = ("look", "look", "look", "kuberay", "look", "work")
"""What happens between two events; a story leaves some of it out."""
stories = st.lists(
    st.tuples(st.sampled_from([*sorted(STEPS), *OFTEN]), st.integers(0, len(USUAL))).map(
        lambda found: (found[0], *USUAL[: found[1]])
    ),
    min_size=4,
    max_size=25,
).map(lambda parts: [name for part in parts for name in part])
clusters = st.sampled_from([TEMPLATE, KUEUE, {"name": "rl"}])
POLICY = {"maxAttempts": 3, "backoffSeconds": 0}
tries = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def begun(cluster: dict[str, Any]) -> World:
    world = World(cluster=cluster, failurePolicy=POLICY)
    if "name" in cluster:
        world.make_cluster()
    return world


def step(world: World, name: str) -> None:
    if name == "lose the cluster" and world.cluster is not None and not world.cluster["owner"]:
        world.lose_cluster()
        world.make_cluster()  # whose it is brings it back
    else:
        STEPS[name](world)


@tries
@given(clusters, stories)
def test_there_are_never_two_drivers_and_none_that_is_submitted_while_the_run_rests(
    cluster: dict[str, Any], story: list[str]
):
    world = begun(cluster)
    for name in story:
        before = len(world.decisions)
        rests = bool(world.run["spec"].get("suspend"))
        step(world, name)
        assert len(world.live) <= 1
        for decision in world.decisions[before:]:
            assert not (rests and any(isinstance(action, Submit) for action in decision.actions))
            numbers = [attempt.number for attempt in decision.status.attempts]
            assert numbers == sorted(set(numbers))
            assert [attempt for attempt in decision.status.attempts[:-1] if attempt.alive] == []
    assert len(world.submitted_to) == len(set(world.submitted_to))


@settings(tries, max_examples=60)
@given(clusters, stories)
def test_what_ever_happened_a_run_that_is_left_alone_reaches_its_end(cluster: dict[str, Any], story: list[str]):
    world = begun(cluster)
    for name in story:
        step(world, name)
    world.reachable = True
    world.change(suspend=False)
    world.settle(120, work=10)
    assert world.status.phase == ("Failed" if world.status.gave_up else "Succeeded")
    assert world.live == []


@tries
@given(clusters, st.lists(st.sampled_from(["fail", "killed", "interrupted", "lose the head", "work"]), max_size=12))
def test_failed_attempts_without_progress_are_bounded(cluster: dict[str, Any], story: list[str]):
    world = begun(cluster)
    for name in story:
        world.settle()
        step(world, name)
        world.look()
        assert (world.status.failures >= POLICY["maxAttempts"]) is world.status.gave_up
    failed = [attempt for attempt in world.status.attempts if attempt.outcome == "Failed"]
    assert len(failed) <= POLICY["maxAttempts"] * (1 + story.count("work"))


@tries
@given(clusters, stories)
def test_a_deleted_run_leaves_nothing(cluster: dict[str, Any], story: list[str]):
    world = begun(cluster)
    for name in story:
        step(world, name)
    world.reachable = True
    world.delete()
    for _ in range(30):
        world.look()
        world.kuberay()
        world.wait(10)
    assert (world.run, world.live) == (None, [])
    assert world.cluster is None or not world.cluster["owner"]


@tries
@given(clusters, stories)
def test_events_and_status_stay_small_and_are_what_the_definition_says(cluster: dict[str, Any], story: list[str]):
    world = begun(cluster)
    for name in story:
        step(world, name)
    assert faults(world.run) == []
    assert len(world.status.attempts) <= 10
    assert len(world.status.model_dump_json()) < 30_000
    assert all(reason and len(reason) < 128 and text for reason, text in world.events)
