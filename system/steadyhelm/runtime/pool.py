"""A pool of equal actors of one service: routing, re-dispatch, and members that come and go.

::

      resize ──► starting ── start, catch up ──► serves ── drain ──► drains ── its calls answered ──► gone
                    │ cannot be placed             │ lost               │ lost, or its deadline passed  ▲
                    └──────────────────────────────┴────────────────────┴───────────────────────────────┘

Whatever happens to a member, ``_settle`` then compares how many start or serve with how many are wanted (``size``), and
starts or drains the difference. A call stays with the pool until some member has answered it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle

from steadyhelm.errors import DeadlineError, EngineLostError, LearnerLostError, RetryableError, SteadyhelmError
from steadyhelm.runtime.actors import Factory
from steadyhelm.runtime.calls import answer
from steadyhelm.runtime.load import LoadMeter
from steadyhelm.runtime.nodes import POLL_S
from steadyhelm.runtime.placement import placed
from steadyhelm.runtime.routing import Candidate, Memory, Work, choose
from steadyhelm.telemetry import EventSink, Notice, ServiceState

T = TypeVar("T")
MAX_TRIES = 4
"""How often one call may be tried on one engine after another; a shard that kills each engine must end the run."""
WIDTH = 2
"""Calls that a member has at once: one that it works on and one that it prepares. Others wait here, for any member,
and their deadlines begin when they are sent."""
CLOSE_S = 5.0
"""How long a member may take to end its own processes before it is killed with them."""
RETRY_S = 60.0
"""Seconds from a member that could not be placed to the next try, while others serve, unless a pool says otherwise."""


ONE = Work()
"""A call like any other: what pools whose calls are all alike choose by."""


class Stage(StrEnum):
    """Where a member is on its way; the values are words for people."""

    STARTING = "starts"
    SERVING = "serves"
    DRAINING = "finishes its work"
    GONE = "is gone"


@dataclass(slots=True, eq=False)
class Member:
    """One actor of a pool: where it is, what it has to answer, and what it has met lately.

    ``number`` is its own for ever, ``slot`` the lowest that no other member has now: for what there is one of for each
    member, like a server's address. ``moved`` is True where its calls were taken from it because it was leaving.
    ``lacks`` says what it finds no room for while it starts.
    """

    actor: ActorHandle
    number: int
    slot: int = 0
    stage: Stage = Stage.STARTING
    node: str = ""
    moved: bool = False
    lacks: str = ""
    doing: list[str] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    @property
    def serves(self) -> bool:
        """Whether it takes new calls."""
        return self.stage is Stage.SERVING

    @property
    def tokens(self) -> float:
        """Expected tokens of the calls that it has to answer."""
        return sum(work.tokens for work in self.works)


@dataclass(slots=True, kw_only=True)
class Pool:
    """Equal actors of one service behind the service's own methods.

    A call goes to the member that ``routing.choose`` names among those with fewer than ``WIDTH`` calls, once there is
    one. A member that dies or misses a deadline is killed and replaced, and its calls go to another.

    Args:
        service: the service's name in messages.
        spawn: makes the actor with the given number.
        size: how many members are wanted.
        start_deadline_s, call_deadline_s, drain_deadline_s, notice_s: seconds; see ``config.Runtime`` and ``Rollout``.
        retry_s: seconds from a member that could not be placed to the next try.
        tell: takes events for the user.
        needs: what a member reserves, for messages.
        by_slot: whether the factory takes the member's slot.
        lacks: says what room an actor that is not placed does not find; None where nobody looks.
        leaving: says how many seconds nodes that are being drained have left, by id; None where nobody looks.
        end: kills an actor.
        replaced: how many members were lost and replaced.
        prepare: brings a new member up to date before it serves (weights); None where there is nothing to do.
        room: how many members there was room for when one could last not be placed; None where there is no such limit.
    """

    service: str
    spawn: Callable[[int], ActorHandle]
    size: int
    start_deadline_s: float
    call_deadline_s: float
    notice_s: float
    tell: EventSink
    drain_deadline_s: float = 120.0
    retry_s: float = RETRY_S
    needs: str = "nothing"
    prepare: Callable[[Member], Awaitable[None]] | None = None
    by_slot: bool = False
    lacks: Callable[[ActorHandle], str] | None = None
    leaving: Callable[[], Mapping[str, float]] | None = None
    end: Callable[[ActorHandle], None] = ray.kill
    members: list[Member] = field(default_factory=list)
    replaced: int = 0
    room: int | None = None
    meter: LoadMeter = field(default_factory=LoadMeter)
    _factory: Factory | None = None
    _spawned: int = 0
    _losses: int = 0
    _waiting: int = 0
    _over: bool = False
    _broken: BaseException | None = None
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def serving(self) -> list[Member]:
        """The members that take new calls."""
        return [member for member in self.members if member.serves]

    def launch(self) -> None:
        """Creates the actors; ``ready`` awaits them."""
        for _ in range(self.size):
            self._spawn()

    async def ready(self, factory: Factory) -> None:
        """Returns once every member has built its service, as later ones will, and answers, or cannot be had.

        One that cannot be had is tried again later, as long as there is another. Raises DeadlineError and
        EngineLostError where there is none, and what the services' constructors raise.
        """
        self._factory = factory

        async def one(member: Member) -> RetryableError | None:
            try:
                await self._start(member)
            except (EngineLostError, DeadlineError) as error:
                return error
            return None

        members = list(self.members)
        failed = await asyncio.gather(*(one(member) for member in members))
        errors = [error for error in failed if error is not None]
        if errors and not self.serving:
            raise errors[0]
        for member, error in zip(members, failed, strict=True):
            if error is not None:
                self._cannot_start(member, error)
        if self.leaving is not None:
            self._begin(self._watch_nodes(self.leaving))

    async def call(self, method: Callable[[ActorHandle], Awaitable[T]], what: str, work: Work = ONE) -> T:
        """The answer of some member to ``method``.

        Args:
            method: makes the call on a member's actor.
            what: what is waited for, for messages.
            work: what the call asks for, to choose the member by.

        Raises:
            EngineLostError: ``MAX_TRIES`` members in a row were lost over this call.
            SteadyhelmError: what the service raised.
        """
        tries = 0
        while True:
            member = await self._take(work)
            try:
                # What it works on comes first: a deadline for each of them, which only a member that hangs uses up.
                deadline_s = self.call_deadline_s * len(member.works)
                value = await self.ask(member, method(member.actor), what, deadline_s)
                self._losses = 0
                member.memory.meet(work.marks)
                return value
            except (EngineLostError, DeadlineError) as error:
                self._lose(member, error)
                tries += not member.moved
                if tries == MAX_TRIES:
                    raise EngineLostError(
                        f"{what} was lost with {MAX_TRIES} {self.service} actors in a row; the last: {error}"
                    ) from error
            except RetryableError as error:
                tries += 1
                if tries == MAX_TRIES:
                    raise
                await asyncio.sleep(max(error.delay_s, 0.05))
            finally:
                member.works.remove(work)
                await self._notify()

    async def ask(self, member: Member, call: Awaitable[T], what: str, deadline_s: float) -> T:
        """The answer of one member; see ``calls.answer`` for the errors."""
        of = f"{self.service} {member.number}: {what}"
        member.doing.append(what)
        self._show(member)
        try:
            return await answer(call, of=of, deadline_s=deadline_s, notice_s=self.notice_s, tell=self.tell)
        finally:
            member.doing.remove(what)
            self._show(member)

    async def everywhere(self, method: Callable[[Member], Awaitable[T]]) -> list[T]:
        """The answers of all members that serve; one that is lost over it is replaced and left out.

        So is one to whom a learner rank does not answer, as long as it answers another. Raises LearnerLostError where
        it answers none, and what the services raise.
        """
        cut_off: dict[int, LearnerLostError] = {}

        async def one(member: Member) -> list[T]:
            try:
                return [await method(member)]
            except LearnerLostError as error:
                cut_off[member.number] = error
            except (EngineLostError, DeadlineError) as error:
                self._lose(member, error)
            return []

        asked = self.serving
        answers = [value for found in await asyncio.gather(*map(one, asked)) for value in found]
        for member in asked:
            if error := cut_off.get(member.number):
                if not answers:
                    raise error
                self._lose(member, error)
        return answers

    def resize(self, size: int) -> None:
        """Wants ``size`` members from now on; returns at once.

        New ones serve when they have started and caught up; of those that are too many, such as do not serve yet end,
        then the least loaded drain.
        """
        if size != self.size:
            self.size, self.room = size, None
            self._settle()

    def drain(self, member: Member, why: str, deadline_s: float | None = None) -> None:
        """Gives ``member`` no new calls and ends it when it has answered its own; returns at once.

        Past the deadline (None: ``drain_deadline_s``) its calls go to others. Where as many are still wanted, another
        member starts at once.
        """
        if not member.serves:
            return
        member.stage = Stage.DRAINING
        self.tell(Notice(text=f"{self.service} {member.number} takes no new work: {why}"))
        self._begin(self._leave(member, self.drain_deadline_s if deadline_s is None else deadline_s))
        self._settle()

    async def close(self) -> None:
        """Ends the actors."""
        self._over = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(self._end(member) for member in list(self.members)))

    def _spawn(self) -> Member:
        taken = {member.slot for member in self.members}
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        member = Member(actor=self.spawn(self._spawned), number=self._spawned, slot=slot)
        self._spawned += 1
        self.members.append(member)
        return member

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _show(self, member: Member) -> None:
        """Tells what the member does: the first of its calls, the others wait behind it."""
        there = member.stage is not Stage.GONE
        state = (member.doing[0] if member.doing else "waits for work") if there or member.doing else ""
        name = f"{self.service} {member.number}"
        now_s = time.monotonic()
        self.tell(ServiceState(service=name, state=state, since_s=now_s, waiting=not member.doing, lacks=member.lacks))

    async def _start(self, member: Member) -> None:
        """Returns when the member serves; what is put into all members meanwhile reaches it too."""
        assert self._factory is not None
        factory = partial(self._factory, member.slot) if self.by_slot else self._factory
        call = member.actor.start.remote(factory)
        with self._placing(member):
            member.node = str(await self.ask(member, call, "start", self.start_deadline_s))
        if self.prepare is not None:
            await self.prepare(member)
        if member.stage is Stage.STARTING:
            member.stage = Stage.SERVING  # before anything else can run, or it would miss the next weights
        await self._notify()

    @contextlib.contextmanager
    def _placing(self, member: Member) -> Iterator[None]:
        """Tells meanwhile, and in a DeadlineError, what the member finds no room for."""

        def say(lacks: str) -> None:
            member.lacks = lacks
            self._show(member)
            text = f"{self.service} {member.number} finds no room: {lacks}" if lacks else f"{self.service} has room"
            self.tell(Notice(text=text, level="warning" if lacks else "info"))

        try:
            with placed(partial(self.lacks, member.actor), say) if self.lacks else contextlib.nullcontext():
                yield
        finally:
            member.lacks = ""

    async def _join(self, member: Member) -> None:
        """Brings a new member to serve."""
        try:
            await self._start(member)
        except SteadyhelmError as error:
            self._cannot_start(member, error)
            await self._notify()
            return
        if member.serves:
            self.room = None
            self.tell(Notice(text=f"{self.service} {member.number} serves"))

    def _cannot_start(self, member: Member, error: SteadyhelmError) -> None:
        """A member did not come to serve: without it where others serve, or with another, or not at all."""
        if member.stage is Stage.GONE:
            return
        self._remove(member)
        retryable = isinstance(error, RetryableError)
        if serving := len(self.serving):
            if self.room is None:
                text = (
                    f"{self.service} {member.number} did not start, it reserves {self.needs} ({error}); {serving} of "
                    f"{self.size} serve and go on, and it is tried again every {self.retry_s:g} s"
                )
                self.tell(Notice(text=text, level="warning"))
            self.room = serving
            self._begin(self._settle_later())
            return
        self._losses += 1
        if retryable and self._losses < MAX_TRIES:
            self._settle()
        else:
            text = f"{self._losses} {self.service} actors in a row were lost; last: {error}"
            self._broken = EngineLostError(text) if retryable else error

    async def _settle_later(self) -> None:
        await asyncio.sleep(self.retry_s)
        self._settle()

    def _settle(self) -> None:
        """Starts or drains members until as many start or serve as are wanted."""
        staying = [member for member in self.members if member.stage in (Stage.STARTING, Stage.SERVING)]
        if not self._over:
            for _ in range(len(staying), self.size):
                self._begin(self._join(self._spawn()))
        spare = sorted(staying, key=lambda member: (member.serves, member.tokens, -member.number))
        for member in spare[: max(0, len(staying) - self.size)]:
            if member.serves:
                self.drain(member, f"{self.size} are enough")
            else:
                self._remove(member)

    async def _leave(self, member: Member, deadline_s: float) -> None:
        """Ends a draining member when it has answered its calls, or at the deadline."""
        try:
            async with self._changed:
                idle = self._changed.wait_for(lambda: not member.works or member.stage is Stage.GONE)
                await asyncio.wait_for(idle, deadline_s)
        except TimeoutError:
            if member.works:
                member.moved = True
                text = f"{self.service} {member.number} is not done within {deadline_s:g} s; its calls go to others"
                self.tell(Notice(text=text, level="warning"))
        if member.stage is not Stage.GONE:
            await self._end(member)
            self.tell(Notice(text=f"{self.service} {member.number} has left"))

    async def _watch_nodes(self, leaving: Callable[[], Mapping[str, float]]) -> None:
        """Drains, for as long as the pool lasts, the members whose nodes are about to go."""
        while True:
            left = await asyncio.to_thread(leaving)
            for member in self.serving:
                if member.node in left:
                    deadline_s = max(0.0, min(self.drain_deadline_s, left[member.node] - CLOSE_S))
                    self.drain(member, f"its node goes in {left[member.node]:.0f} s", deadline_s)
            await asyncio.sleep(POLL_S)

    async def _take(self, work: Work) -> Member:
        """A member for ``work``, once one has fewer than ``WIDTH`` calls."""
        none_s = MAX_TRIES * self.start_deadline_s  # while none serves; so many starts may fail before the pool is over
        async with self._changed:
            self._waiting += 1
            self._note_load()
            try:
                while (member := self._choose(work)) is None:
                    if self._broken is not None:
                        raise self._broken
                    try:
                        await asyncio.wait_for(self._changed.wait(), None if self.serving else none_s)
                    except TimeoutError:
                        text = f"No {self.service} actor serves within {none_s:g} s."
                        raise DeadlineError(text) from None
                member.works.append(work)
                return member
            finally:
                self._waiting -= 1
                self._note_load()

    def _choose(self, work: Work) -> Member | None:
        free = {member.number: member for member in self.serving if len(member.works) < WIDTH}
        if not free:
            return None
        candidates = [
            Candidate(number=number, tokens=member.tokens, known=member.memory.known(work.marks))
            for number, member in free.items()
        ]
        return free[choose(candidates, work.tokens)]

    async def _notify(self) -> None:
        """Wakes whoever waits for a member, or for one to be idle."""
        async with self._changed:
            self._note_load()
            self._changed.notify_all()

    def _note_load(self) -> None:
        self.meter.note(
            [sum(work.samples for work in member.works) for member in self.serving],
            [work for member in self.members for work in member.works],
            self._waiting,
        )

    def _lose(self, member: Member, error: BaseException) -> None:
        """Takes out a member that is lost; another one starts where it is still wanted."""
        if member.stage is Stage.GONE:
            return
        wanted = member.stage is not Stage.DRAINING
        self._losses += 1
        self.replaced += wanted
        text = f"{self.service} {member.number} is lost ({error})" + "; another one takes its place" * wanted
        self.tell(Notice(text=text, level="warning", loss=True))
        self._remove(member)
        self._settle()

    def _remove(self, member: Member) -> None:
        """Kills a member; calls that it had fail with EngineLostError."""
        member.stage = Stage.GONE
        if member in self.members:
            self.members.remove(member)
        self._show(member)
        self.end(member.actor)

    async def _end(self, member: Member) -> None:
        """Ends a member, its own processes first where it is idle; a busy one is killed with them."""
        leaves = member.stage
        member.stage = Stage.GONE
        if leaves in (Stage.SERVING, Stage.DRAINING) and not member.works:
            with contextlib.suppress(SteadyhelmError):
                await self.ask(member, member.actor.close.remote(), "end", CLOSE_S)
        self._remove(member)
        await self._notify()
