"""A pool of equal actors of one service: routing, re-dispatch, replacement."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import ray
from ray.actor import ActorHandle

from steadyhelm.errors import DeadlineError, EngineLostError, RetryableError, SteadyhelmError
from steadyhelm.runtime.actors import Factory
from steadyhelm.runtime.calls import answer
from steadyhelm.telemetry import EventSink, Notice, ServiceState

T = TypeVar("T")
MAX_TRIES = 4
"""How often one call may be tried on one engine after another; a shard that kills each engine must end the run."""
WIDTH = 2
"""Calls that a member has at once: one that it works on and one that it prepares. Others wait here, for any member,
and their deadlines begin when they are sent."""
CLOSE_S = 5.0
"""How long a member may take to end its own processes before it is killed with them."""


@dataclass(slots=True, eq=False)
class Member:
    """One actor of a pool, how many calls it has to answer, and what they are."""

    actor: ActorHandle
    number: int
    doing: list[str] = field(default_factory=list)
    outstanding: int = 0
    alive: bool = True


@dataclass(slots=True, kw_only=True)
class Pool:
    """Equal actors of one service behind the service's own methods.

    A call goes to the member with the fewest outstanding calls, once one has fewer than ``WIDTH``. A member that dies
    or misses a deadline is killed and replaced, and its calls go to another.

    Args:
        service: the service's name in messages.
        spawn: makes the actor with the given number.
        size: how many actors there are.
        start_deadline_s, call_deadline_s, notice_s: seconds; see ``config.Runtime``.
        tell: takes events for the user.
        closes: whether members have processes of their own to end first.
        replaced: how many members were lost and replaced.
        prepare: brings a new member up to date before it serves (weights); None where there is nothing to do.
    """

    service: str
    spawn: Callable[[int], ActorHandle]
    size: int
    start_deadline_s: float
    call_deadline_s: float
    notice_s: float
    tell: EventSink
    prepare: Callable[[Member], Awaitable[None]] | None = None
    closes: bool = False
    members: list[Member] = field(default_factory=list)
    replaced: int = 0
    _factory: Factory | None = None
    _spawned: int = 0
    _losses: int = 0
    _broken: BaseException | None = None
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _replacing: set[asyncio.Task[None]] = field(default_factory=set)

    def launch(self) -> None:
        """Creates the actors; ``ready`` awaits them."""
        self.members = [self._member() for _ in range(self.size)]

    async def ready(self, factory: Factory) -> None:
        """Returns once every member has built its service, as later ones will, and answers.

        Raises DeadlineError, and what the services' constructors raise.
        """
        self._factory = factory
        await asyncio.gather(*(self._start(member) for member in self.members))

    async def call(self, method: Callable[[ActorHandle], Awaitable[T]], what: str) -> T:
        """The answer of some member to ``method``.

        Args:
            method: makes the call on a member's actor.
            what: what is waited for, for messages.

        Raises:
            EngineLostError: ``MAX_TRIES`` members in a row were lost over this call.
            SteadyhelmError: what the service raised.
        """
        for attempt in range(1, MAX_TRIES + 1):
            member = await self._take()
            try:
                value = await self.ask(member, method(member.actor), what, self.call_deadline_s)
                self._losses = 0
                return value
            except (EngineLostError, DeadlineError) as error:
                self._lose(member, error)
                if attempt == MAX_TRIES:
                    raise EngineLostError(
                        f"{what} was lost with {MAX_TRIES} {self.service} actors in a row; the last: {error}"
                    ) from error
            except RetryableError as error:
                if attempt == MAX_TRIES:
                    raise
                await asyncio.sleep(max(error.delay_s, 0.05))
            finally:
                await self._give_back(member)
        raise AssertionError("the last try returns or raises")

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

    def _show(self, member: Member) -> None:
        """Tells what the member does: the first of its calls, the others wait behind it."""
        state = (member.doing[0] if member.doing else "waits for work") if member.alive or member.doing else ""
        name = f"{self.service} {member.number}"
        self.tell(ServiceState(service=name, state=state, since_s=time.monotonic(), waiting=not member.doing))

    async def everywhere(self, method: Callable[[Member], Awaitable[T]]) -> list[T]:
        """The answers of all living members; one that is lost over it is replaced and left out."""

        async def one(member: Member) -> list[T]:
            try:
                return [await method(member)]
            except (EngineLostError, DeadlineError) as error:
                self._lose(member, error)
                return []

        answers = await asyncio.gather(*(one(member) for member in self.members if member.alive))
        return [value for found in answers for value in found]

    async def close(self) -> None:
        """Ends the actors."""
        for task in self._replacing:
            task.cancel()
        for member in self.members:
            if self.closes and member.alive:
                with contextlib.suppress(SteadyhelmError):
                    await self.ask(member, member.actor.close.remote(), "end", CLOSE_S)
            ray.kill(member.actor)
        self.members.clear()

    def _member(self) -> Member:
        self._spawned += 1
        return Member(actor=self.spawn(self._spawned - 1), number=self._spawned - 1)

    async def _start(self, member: Member) -> None:
        await self.ask(member, member.actor.start.remote(self._factory), "start", self.start_deadline_s)

    async def _take(self) -> Member:
        async with self._changed:
            while not (free := [m for m in self.members if m.alive and m.outstanding < WIDTH]):
                if self._broken is not None:
                    raise self._broken
                alive = any(member.alive for member in self.members)
                try:
                    await asyncio.wait_for(self._changed.wait(), None if alive else self.start_deadline_s)
                except TimeoutError:
                    text = f"No {self.service} actor serves within {self.start_deadline_s:g} s."
                    raise DeadlineError(text) from None
            member = min(free, key=lambda m: (m.outstanding, m.number))
            member.outstanding += 1
            return member

    async def _give_back(self, member: Member) -> None:
        async with self._changed:
            member.outstanding -= 1
            self._changed.notify_all()

    def _lose(self, member: Member, error: BaseException) -> None:
        """Takes a member out and starts another in its place."""
        if not member.alive:
            return
        member.alive = False
        self.replaced += 1
        text = f"{self.service} {member.number} is lost ({error}); another one takes its place"
        self.tell(Notice(text=text, level="warning"))
        self._show(member)
        ray.kill(member.actor)
        task = asyncio.create_task(self._replace(member))
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _replace(self, lost: Member) -> None:
        """Starts a member in place of ``lost``; calls that wait for one learn of it, or of why there is none."""
        self._losses += 1
        new = self._member()
        new.alive = False
        self.members[self.members.index(lost)] = new
        try:
            await self._start(new)
            if self.prepare is not None:
                await self.prepare(new)
        except (EngineLostError, DeadlineError) as error:
            if self._losses < MAX_TRIES:
                new.alive = True
                self._lose(new, error)
                return
            self._broken = EngineLostError(f"{self._losses} {self.service} actors in a row were lost; last: {error}")
        except SteadyhelmError as error:
            self._broken = error
        async with self._changed:
            new.alive = self._broken is None
            self._changed.notify_all()
        self._show(new)
        if new.alive:
            self.tell(Notice(text=f"{self.service} {new.number} serves"))
