"""Commands to the learner's ranks, which take no calls: Ray Train runs a function in them, not an actor's methods.

Ranks *join*, ask for the *next* command and *post* its outcome; the driver *calls*. A group that starts again joins as
a new incarnation; a command that was under way then fails with LearnerLostError. Beside the commands the driver tells
what to *expect* of batches to come; nobody answers that, and ranks ask for what is *expected* by a thread of their own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steadyhelm import errors
from steadyhelm.errors import FatalError, LearnerLostError, SteadyhelmError, reason_of
from steadyhelm.services import Coming

POLL_S = 20.0
"""How long ``next`` and ``expected`` hold a rank's question open before they answer "nothing yet"."""
REMEMBERED = 1024
"""What to expect that is kept for ranks that have not asked yet: more than the batches in the making have."""
STOP = "stop"
"""The command that ends a rank's training function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One call of a learner method by all ranks together. ``name`` ``STOP`` ends the training function."""

    number: int
    name: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a rank's call came to: a value, or the name, words and reason of an error."""

    value: Any = None
    error: str = ""
    message: str = ""
    reason: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Outcome:
        """The outcome that carries ``error``; any but a SteadyhelmError arrives as a FatalError."""
        if isinstance(error, SteadyhelmError):
            return cls(error=type(error).__name__, message=str(error), reason=error.reason)
        text = f"a learner rank failed: {type(error).__name__}: {error}"
        return cls(error="FatalError", message=text, reason=reason_of(error))

    def result(self) -> Any:
        """The value. Raises the error."""
        if self.error:
            raised: SteadyhelmError = getattr(errors, self.error, FatalError)(self.message)
            raised.reason = self.reason or raised.reason
            raise raised
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Something of a batch to come, and how much was told of before it."""

    number: int
    coming: Coming


@dataclass(slots=True)
class _Incarnation:
    number: int
    world: int
    joined: dict[int, str] = field(default_factory=dict)
    commands: list[Command] = field(default_factory=list)
    outcomes: dict[int, dict[int, Outcome]] = field(default_factory=dict)
    expected: deque[Expected] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    @property
    def complete(self) -> bool:
        return len(self.joined) == self.world

    @property
    def stops(self) -> bool:
        return bool(self.commands) and self.commands[-1].name == STOP


class Mailbox:
    """The state machine; an async actor in production, a plain object in tests."""

    def __init__(self) -> None:
        self._now = _Incarnation(0, -1)
        self._changed = asyncio.Condition()

    async def join(self, rank: int, world: int, process: str) -> int:
        """A rank is there; returns the incarnation's number once all ``world`` ranks are.

        A rank that is there already, under another process, begins a new incarnation. The waits of a rank end with
        its process; the caller sets its own deadline.
        """
        async with self._changed:
            known = self._now.joined.get(rank)
            if self._now.world != world or (known is not None and known != process):
                self._now = _Incarnation(self._now.number + 1, world)
            mine = self._now
            mine.joined[rank] = process
            self._changed.notify_all()
            await self._changed.wait_for(lambda: mine.complete or self._now is not mine)
            return mine.number

    async def next(self, incarnation: int, number: int) -> Command | None:
        """The command ``number`` of ``incarnation``, None where there is none yet, ``stop`` where it is over."""
        async with self._changed:

            def there() -> bool:
                return self._now.number != incarnation or len(self._now.commands) > number

            try:
                await asyncio.wait_for(self._changed.wait_for(there), POLL_S)
            except TimeoutError:
                return None
            if self._now.number != incarnation:
                return Command(number=number, name=STOP)
            return self._now.commands[number]

    async def expect(self, coming: Coming) -> None:
        """A batch to come will need this. A group that starts again does not hear of it."""
        async with self._changed:
            told = self._now.expected
            number = told[-1].number + 1 if told else 0
            told.append(Expected(number=number, coming=coming))
            self._changed.notify_all()

    async def expected(self, incarnation: int, number: int) -> tuple[Expected, ...] | None:
        """What to expect from the ``number``-th on, perhaps none yet; None where ``incarnation`` is over."""
        async with self._changed:

            def over() -> bool:
                return self._now.number != incarnation or self._now.stops

            def found() -> tuple[Expected, ...]:
                return tuple(entry for entry in self._now.expected if entry.number >= number)

            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: over() or found()), POLL_S)
            except TimeoutError:
                return ()
            return None if over() else found()

    async def post(self, incarnation: int, rank: int, number: int, outcome: Outcome) -> None:
        """The outcome of a rank's call; outcomes of incarnations that are over are dropped."""
        async with self._changed:
            if self._now.number == incarnation:
                self._now.outcomes.setdefault(number, {})[rank] = outcome
                self._changed.notify_all()

    async def ready(self) -> Mapping[int, str]:
        """Returns the processes by rank once all ranks are there."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._now.complete)
            return dict(self._now.joined)

    async def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Has all ranks call ``name``; returns rank 0's value.

        Raises:
            LearnerLostError: the group started again meanwhile.
            SteadyhelmError: what a rank raised; the lowest rank's, where several did.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._now.complete)
            mine = self._now
            number = len(mine.commands)
            mine.commands.append(Command(number=number, name=name, arguments=arguments))
            self._changed.notify_all()

            def over() -> bool:
                return self._now is not mine or len(mine.outcomes.get(number, {})) == mine.world

            await self._changed.wait_for(over)
            if self._now is not mine:
                raise LearnerLostError(f"A learner rank was lost during {name}.")
            outcomes = mine.outcomes.pop(number)
            for rank in range(mine.world):
                outcomes[rank].result()
            return outcomes[0].value

    async def stop(self) -> None:
        """Ends the ranks' training functions."""
        async with self._changed:
            self._now.commands.append(Command(number=len(self._now.commands), name=STOP))
            self._changed.notify_all()
