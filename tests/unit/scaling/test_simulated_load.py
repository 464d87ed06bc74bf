"""The policy against a simulated loop: shards on engines, a learner, and batches that run ahead of it."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import pytest
from steadyhelm.config.scaling import Scaling
from steadyhelm.scaling import Observation, State, decide


@dataclass
class Loop:
    """Batches of ``shards``, each of which takes an engine ``shard_s``; the learner takes ``learn_s`` for a batch.

    Batch i may begin once the learner is done with batch i − 1 − ``ahead``, as in the real loop.
    """

    shards: int
    shard_s: float
    learn_s: float
    ahead: int
    engines: list[float] = field(default_factory=list)
    busy: list[tuple[float, float]] = field(default_factory=list)
    versions: dict[int, float] = field(default_factory=dict)
    ready: dict[int, float] = field(default_factory=dict)
    begun: list[tuple[int, float]] = field(default_factory=list)
    now: float = 0.0

    def resize(self, number: int) -> None:
        """Shards that have begun end where they are; those that wait go to the engines that there are now."""
        under_way = sorted(end for start, end in self.busy if start < self.now < end)
        waiting = [iteration for iteration, start in self.begun if start >= self.now]
        self.busy = [(start, end) for start, end in self.busy if start < self.now]
        self.begun = [(iteration, start) for iteration, start in self.begun if start < self.now]
        for iteration in set(waiting):
            self.ready[iteration] = max(under_way, default=self.now)
        idle = max(0, number - len(under_way))
        self.engines = [self.now] * idle + under_way[: number - idle]
        heapq.heapify(self.engines)
        for iteration in waiting:
            self.make(iteration, 1)

    def make(self, iteration: int, shards: int) -> None:
        """Gives shards of a batch to whichever engine is free first."""
        for _ in range(shards):
            start = max(heapq.heappop(self.engines), self.now)
            end = start + self.shard_s
            self.begun.append((iteration, start))
            self.busy.append((start, end))
            heapq.heappush(self.engines, end)
            self.ready[iteration] = max(end, self.ready.get(iteration, end))

    def step(self, iteration: int) -> Observation:
        """One iteration: the learner's wait and step, and what the engines did meanwhile."""
        began, serving = self.now, len(self.engines)
        for ahead in range(iteration, iteration + self.ahead + 1):
            if ahead not in self.ready:
                self.make(ahead, self.shards)
        ready = max(self.now, self.ready[iteration])
        self.now = ready + self.learn_s
        self.versions[iteration] = self.now
        worked = sum(max(0.0, min(end, self.now) - max(start, began)) for start, end in self.busy)
        self.busy = [(start, end) for start, end in self.busy if end > self.now]
        ages = [iteration - 1 - self.version_at(start) for which, start in self.begun if which == iteration]
        self.begun = [(which, start) for which, start in self.begun if which != iteration]
        return Observation(
            seconds=self.now - began,
            serving=serving,
            learner_wait=(ready - began) / (self.now - began),
            saturation=min(1.0, worked / (serving * (self.now - began))),
            queue=self.shards * (self.ahead + 1) / serving,
            staleness=sum(ages) / len(ages),
        )

    def version_at(self, time: float) -> int:
        return max((version for version, since in self.versions.items() if since <= time), default=0)


def drive(loop: Loop, scaling: Scaling, start: int, iterations: int, change: Callable[[int], None] = lambda _: None):
    """The numbers decided behind each iteration."""
    state = State(desired=start)
    loop.resize(start)
    decided = []
    for iteration in range(1, iterations + 1):
        change(iteration)
        decision, state = decide(scaling, loop.ahead, state, loop.step(iteration))
        loop.resize(decision.desired)
        decided.append(decision.desired)
    return decided


def changes(decided: list[int], start: int) -> list[int]:
    return [after for before, after in zip([start, *decided], decided, strict=False) if after != before]


SCALING = Scaling(min=1, max=32)


@pytest.mark.parametrize(
    ("ahead", "shards", "shard_s", "learn_s", "start", "fewest", "most"),
    [
        (1, 32, 1.0, 4.0, 1, 6, 8),  # 32 engine seconds in 4: 8 keep up, 6.4 may
        (1, 32, 1.0, 4.0, 20, 6, 8),
        (2, 48, 0.5, 8.0, 1, 2, 3),
        (2, 48, 0.5, 8.0, 9, 2, 3),
        (1, 64, 1.0, 3.0, 2, 15, 20),
        (1, 16, 1.0, 32.0, 4, 1, 1),  # a slow learner: one engine has it done in half the time
        (0, 32, 1.0, 32.0, 1, 3, 5),  # a quarter of the rest
        (0, 32, 1.0, 16.0, 24, 6, 10),
        (0, 4, 1.0, 0.1, 1, 4, 4),  # four shards: a fifth engine has nothing to do
    ],
)
def test_the_right_size_is_there_within_three_decisions_and_stays(ahead, shards, shard_s, learn_s, start, fewest, most):
    loop = Loop(shards=shards, shard_s=shard_s, learn_s=learn_s, ahead=ahead)
    decided = drive(loop, SCALING, start, 60)
    assert len(changes(decided, start)) <= 3
    assert fewest <= decided[14] <= most
    assert set(decided[14:]) == {decided[14]}


def test_a_load_that_triples_and_falls_again_is_followed_each_way_within_three_decisions():
    loop = Loop(shards=32, shard_s=1.0, learn_s=8.0, ahead=1)

    def change(iteration: int) -> None:
        if iteration in (31, 61):
            loop.shard_s = 3.0 if iteration == 31 else 1.0

    decided = drive(loop, SCALING, 4, 90, change)
    assert decided[29] in (3, 4)
    assert 9 <= decided[59] <= 12
    assert decided[89] in (3, 4, 5)
    assert len(changes(decided[30:60], decided[29])) <= 3
    assert len(changes(decided[60:], decided[59])) <= 3


def test_on_policy_numbers_rise_and_fall_with_the_length_of_completions_but_not_with_its_noise():
    loop = Loop(shards=32, shard_s=1.0, learn_s=16.0, ahead=0)

    def noise(iteration: int) -> None:
        loop.shard_s = 1.0 + 0.1 * (-1) ** iteration

    decided = drive(loop, SCALING, 8, 60, noise)
    assert len(changes(decided, 8)) <= 1


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("start", [1, 12, 32])
@pytest.mark.parametrize("seed", range(8))
def test_noise_of_a_fifth_in_every_iteration_makes_no_engines_come_and_go(ahead, start, seed):
    draws = Random(seed)
    loop = Loop(shards=64, shard_s=1.0, learn_s=8.0 if ahead else 32.0, ahead=ahead)

    def noise(_: int) -> None:
        loop.shard_s = draws.uniform(0.8, 1.2)

    moves = [after - before for before, after in pairwise([start, *drive(loop, SCALING, start, 200, noise)])]
    moves = [move for move in moves if move]
    assert len(moves) <= 6
    assert all(before < 0 or after > 0 for before, after in pairwise(moves)), "it grew, and shrank again"
