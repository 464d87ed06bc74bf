"""How many engines a run should have: a pure function of what its last iterations were like, ``decide``.

In an iteration of ``T`` seconds, ``n`` engines that were saturated for a share ``s`` of it worked ``W = n·s·T`` engine
seconds, and the learner, which waited for its batch a share ``w``, used ``L = (1 − w)·T`` seconds. ``W / L`` does not
depend on ``n``, whether the engines or the learner hold the loop up, so it says at once how many engines are right:

    max_staleness ≥ 1 (both work side by side):   n* = W/L · (1 − t)
    max_staleness = 0 (one after the other):      n* = W/L · (1 − t)/t

with ``t`` the share that the learner may wait. More engines than there are orders at hand at once are of no use, and
bound ``n*``; that orders do not divide evenly among engines is not in it, since an engine works on several at once.

The learner's wait comes first: where fewer engines than ``n*`` are wanted the number grows. What is measured may be off
by a share ``NOISE``, which decides when engines leave, and how many stay:

    grows     where  n < n*                              to  n*
    shrinks   where  n > n* · (1 + NOISE)/(1 − NOISE)    to  n* / (1 − NOISE)

So under a load that is the same but for noise, n* measured too high keeps no more engines than n* measured too low
lets stay: a number that has grown does not shrink again, and one that shrinks is never too low. A decision looks at
``settle`` whole iterations with all desired engines serving, or at half of them where that already asks for more; the
first one behind a change is left out. A change is at most ``STEP``-fold; where rollouts are fresh none leaves, since
then nothing runs ahead of the learner.

An iteration may last minutes. While the learner waits in it, what the engines have worked so far is the least that they
will have, so ``n*`` is at least what that makes it: ``overdue`` takes the largest step that a decision may take as soon
as that is certain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from steadyhelm.config import RunFile
from steadyhelm.config.scaling import Scaling
from steadyhelm.services import Elastic, EngineLoad, Rollout
from steadyhelm.telemetry import EventSink, Notice
from steadyhelm.telemetry import metrics as names

NOISE = 0.2
"""Share by which a measured load may be off, up or down, without engines that come and go again."""
STEP = 3
"""The number grows, or shrinks, at most so many times at once."""
KEPT_FULL = 8
"""Decisions for which a cluster without room for another engine is taken to have none."""
LEAST = 0.01
"""The share of an iteration that the learner is taken to use at least, so that ``W / L`` is finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """An iteration, as the decision sees it.

    ``serving`` engines took orders at its end; the learner waited ``learner_wait`` of it, in [0, 1]; engines had
    ``saturation`` of a whole order in hand, in [0, 1], and ``queue`` orders each were sent or waiting at once at most;
    the batch's tokens were ``staleness`` versions old on average. ``room``: see ``services.EngineLoad``.

    Example: ``Observation(seconds=41.0, serving=2, learner_wait=0.62, saturation=0.97, queue=4.0, staleness=0.3)``
    """

    seconds: float
    serving: int
    learner_wait: float
    saturation: float
    queue: float
    staleness: float = 0.0
    room: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How many engines there should be, and why, in a sentence for people."""

    desired: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a decision depends on besides the newest iteration.

    ``seen`` are the iterations that count, ``steady`` says whether the newest one began with all desired engines.
    ``room`` engines at most can be placed, for another ``room_left`` decisions.

    Example: ``State(desired=2)``
    """

    desired: int
    seen: tuple[Observation, ...] = ()
    steady: bool = False
    room: int | None = None
    room_left: int = 0


def decide(scaling: Scaling, max_staleness: int, state: State, now: Observation) -> tuple[Decision, State]:
    """The decision behind an iteration, and the state that the next one starts from.

    Args:
        scaling: bounds and goal.
        max_staleness: ``schedule.max_staleness``.
        state: of the decision before.
        now: the iteration that ended.
    """
    state = _with_room(scaling, state, now)
    placeable = max(state.room or scaling.max, scaling.min)
    if state.desired > placeable:
        reason = f"there was no room for more than {state.room}"
        return Decision(desired=placeable, reason=reason), replace(state, desired=placeable, seen=(), steady=False)
    if now.serving != state.desired:
        reason = f"{now.serving} of {state.desired} engines serve: waits until all do"
        return Decision(desired=state.desired, reason=reason), replace(state, seen=(), steady=False)
    if not state.steady:
        reason = "the first iteration behind a change does not count"
        return Decision(desired=state.desired, reason=reason), replace(state, steady=True)
    seen = (*state.seen, now)[-scaling.settle :]
    half = -(-scaling.settle // 2)
    looks = [settled(scaling, max_staleness, state.desired, part, state.room) for part in (seen[-half:], seen)]
    decision = max(looks, key=lambda look: look.desired)
    if len(seen) < (half if decision.desired > state.desired else scaling.settle):
        reason = f"saw {len(seen)} of the {scaling.settle} iterations that a decision looks at"
        return Decision(desired=state.desired, reason=reason), replace(state, seen=seen)
    changes = decision.desired != state.desired
    after = replace(state, desired=decision.desired, seen=() if changes else seen, steady=not changes)
    return decision, after


def settled(
    scaling: Scaling, max_staleness: int, desired: int, seen: Sequence[Observation], room: int | None = None
) -> Decision:
    """The decision over iterations in which ``desired`` engines served.

    Never fewer than keep the learner's wait at its goal, as far as ``max``, the cluster's room and the orders at hand
    allow; never outside ``min`` and ``max``.
    """
    right = right_number(scaling.learner_wait, max_staleness, seen)
    orders, most = _orders(seen), _most(scaling, room, seen)
    enough, safe, spare = (
        min(max(_whole(right * share), scaling.min), most) for share in (1, 1 / (1 - NOISE), (1 + NOISE) / (1 - NOISE))
    )
    total = sum(it.seconds for it in seen)
    waited = sum(it.seconds * it.learner_wait for it in seen) / total
    busy = sum(it.seconds * it.saturation for it in seen) / total
    facts = f"learner waited {100 * waited:.0f} %, engines were {100 * busy:.0f} % saturated"
    if desired < enough:
        return Decision(desired=min(enough, desired * STEP), reason=f"{facts}: {right:.1f} engines would do")
    if desired > spare:
        fresh = sum(it.staleness for it in seen) / len(seen)
        if max_staleness and fresh < max_staleness / 2 and desired <= most:
            reason = f"{facts}, but rollouts are {fresh:.1f} versions old: they do not run ahead of the learner"
            return Decision(desired=desired, reason=reason)
        why = f"at most {orders} orders at once" if most < math.ceil(right) else f"{right:.1f} engines would do"
        return Decision(desired=max(safe, math.ceil(desired / STEP)), reason=f"{facts}: {why}")
    return Decision(desired=desired, reason=f"{facts}: {desired} fit")


def overdue(scaling: Scaling, max_staleness: int, state: State, now: Observation) -> tuple[Decision | None, State]:
    """A decision within an iteration while its batch is awaited; None where its end is soon enough.

    Args:
        scaling: bounds and goal.
        max_staleness: ``schedule.max_staleness``.
        state: of the decision before.
        now: the iteration as it would be if the batch came now and the learner took as long as it did before.
    """
    most = _most(scaling, state.room, [now])
    far = min(state.desired * STEP, most)
    right = right_number(scaling.learner_wait, max_staleness, [now])
    if not state.steady or now.serving != state.desired or not state.desired < far <= _whole(right):
        return None, state
    waited = now.seconds * now.learner_wait
    reason = f"learner has waited {waited:.0f} s for its batch: at least {right:.1f} engines would do"
    return Decision(desired=far, reason=reason), replace(state, desired=far, seen=(), steady=False)


def right_number(wait: float, max_staleness: int, seen: Sequence[Observation]) -> float:
    """How many engines keep the learner's wait at ``wait`` of an iteration: ``n*`` of the module's formula."""
    work = sum(it.seconds * it.serving * it.saturation for it in seen)
    learning = sum(it.seconds * max(1 - it.learner_wait, LEAST) for it in seen)
    side_by_side = work / learning * (1 - wait)
    return side_by_side if max_staleness else side_by_side / wait


def _orders(seen: Sequence[Observation]) -> int:
    """The most orders that were at hand at once."""
    return math.ceil(max(it.queue * it.serving for it in seen))


def _most(scaling: Scaling, room: int | None, seen: Sequence[Observation]) -> int:
    """The most engines that bounds, room and orders allow."""
    return min(scaling.max, max(scaling.min, room or scaling.max), max(scaling.min, _orders(seen)))


def _whole(engines: float) -> int:
    """So many engines, rounded up; a thousandth of one is none."""
    return math.ceil(round(engines, 3))


def _with_room(scaling: Scaling, state: State, now: Observation) -> State:
    """The state with what the newest iteration says of the cluster's room; it is forgotten after a while."""
    if now.room is not None and now.serving < state.desired:
        return replace(state, room=max(now.room, 1), room_left=KEPT_FULL)
    left = max(0, state.room_left - 1)
    return replace(state, room=state.room if left else None, room_left=left)


class Scaler:
    """Applies the decision behind each iteration to the rollout service of a run, and says what it decided.

    Args:
        run: the run file; without ``rollout.scaling`` the load is measured and nothing decided.
        rollout: the service; one that is not ``Elastic`` has neither.
        tell: takes a notice for each decision that changes something.
        note: takes a line for each other decision, for the metrics.
    """

    def __init__(self, run: RunFile, rollout: Rollout, tell: EventSink, note: Callable[[str], None]) -> None:
        self._run = run
        self._note = note
        self._elastic = rollout if isinstance(rollout, Elastic) and not run.is_sft else None
        self._tell = tell
        self._state = State(desired=run.engines)
        self._learning_s: float | None = None

    def behind(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the engines behind ``iteration``, whose metrics are given; scales where that is due.

        Nothing is decided behind a replayed iteration, where nobody waited for a batch, nor behind the last one.
        """
        if self._elastic is None:
            return {}
        load = self._elastic.load()
        desired, scaling, schedule = load.desired, self._run.rollout.scaling, self._run.schedule
        if names.LEARNER_WAIT in metrics:
            self._learning_s = metrics[names.ITERATION_SECONDS] * (1 - metrics[names.LEARNER_WAIT])
        if scaling is not None and names.LEARNER_WAIT in metrics and iteration < schedule.iterations:
            now = Observation(
                seconds=metrics[names.ITERATION_SECONDS],
                serving=load.serving,
                learner_wait=metrics[names.LEARNER_WAIT],
                saturation=load.saturation,
                queue=load.queue,
                staleness=metrics.get(names.STALENESS_MEAN, 0.0),
                room=load.room,
            )
            decision, self._state = decide(scaling, schedule.max_staleness, self._state, now)
            desired = decision.desired
            if desired != load.desired:
                self._scale(load, decision, f"behind iteration {iteration}")
            else:
                self._note(f"engines stay {desired} behind iteration {iteration}: {decision.reason}")
        return {
            names.ENGINES_SERVING: float(load.serving),
            names.ENGINES_DESIRED: float(desired),
            names.SATURATION: load.saturation,
            names.IN_FLIGHT_TOKENS: load.in_flight_tokens,
            names.QUEUE: load.queue,
        }

    def meanwhile(self, iteration: int, seconds: float) -> None:
        """Scales where the learner waits so long for the batch of ``iteration`` that its end is not soon enough."""
        scaling = self._run.rollout.scaling
        if self._elastic is None or scaling is None or self._learning_s is None:
            return
        load = self._elastic.glance()
        total = seconds + self._learning_s
        now = Observation(
            seconds=total,
            serving=load.serving,
            learner_wait=seconds / total,
            saturation=load.saturation * seconds / total,
            queue=load.queue,
        )
        decision, self._state = overdue(scaling, self._run.schedule.max_staleness, self._state, now)
        if decision is not None:
            self._scale(load, decision, f"in iteration {iteration}")

    def _scale(self, load: EngineLoad, decision: Decision, when: str) -> None:
        assert self._elastic is not None
        self._elastic.scale(decision.desired)
        self._tell(Notice(text=f"engines {load.desired} → {decision.desired} {when}: {decision.reason}"))

    def resume(self, desired: int | None) -> None:
        """Goes on with the engines that an earlier attempt wanted, None where nothing is known; within the bounds."""
        scaling = self._run.rollout.scaling
        if desired is None or scaling is None or self._elastic is None:
            return
        desired = min(max(desired, scaling.min), scaling.max)
        if desired != self._state.desired:
            self._tell(Notice(text=f"engines {self._state.desired} → {desired}: as many as the run had wanted before"))
            self._state = replace(self._state, desired=desired)
            self._elastic.scale(desired)

    def forget(self) -> None:
        """Leaves what the engines did since the last decision, an evaluation for example, out of the next one."""
        if self._elastic is not None:
            self._elastic.load()
