"""Actors without processes: a pool's members that a test starts, holds back and kills at will."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError
from steadyhelm.runtime.actors import RolloutActor


class _Hosted(RolloutActor):
    """What is in the process: the real actor, but that no Ray tells it its node."""

    node = "node-0"

    async def start(self, factory: Callable[[], Any]) -> str:
        if self._built is None:
            self._built = factory()
        return self.node


class LocalActor:
    """An actor handle: ``name.remote(...)`` starts a call, and ``kill`` makes all calls fail.

    ``placed`` is set where there is room for it; ``lingers``: what it was doing when it was killed goes on unseen, as
    in a process that nobody can reach any more.
    """

    def __init__(self, number: int, *, placed: bool = True, lingers: bool = False, node: str = "node-0") -> None:
        self.number = number
        self.lingers = lingers
        self.hosted = _Hosted()
        self.hosted.node = node
        self.placed = asyncio.Event()
        if placed:
            self.placed.set()
        self.dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.log: list[str] = []

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)

    def kill(self) -> None:
        if not self.dead.done():
            self.dead.set_result(None)

    async def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        work = asyncio.create_task(self._work(name, arguments))
        try:
            await asyncio.wait({work, self.dead}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not self.dead.done():
                return work.result()
        finally:
            if not work.done() and not self.lingers:
                work.cancel()
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise RayActorError

    async def _work(self, name: str, arguments: tuple[Any, ...]) -> Any:
        await self.placed.wait()
        self.log.append(name)
        return await getattr(self.hosted, name)(*arguments)


@dataclass(frozen=True)
class _Method:
    actor: LocalActor
    name: str

    def remote(self, *arguments: Any) -> Awaitable[Any]:
        return asyncio.ensure_future(self.actor._call(self.name, arguments))


@dataclass
class Cluster:
    """Where a pool's actors go: ``room`` of them at once, None for as many as there are."""

    room: int | None = None
    lingers: bool = False
    node: str = "node-0"
    actors: list[LocalActor] = field(default_factory=list)

    @property
    def living(self) -> list[LocalActor]:
        return [actor for actor in self.actors if not actor.dead.done()]

    def spawn(self, number: int) -> LocalActor:
        placed = self.room is None or len(self.living) < self.room
        self.actors.append(LocalActor(number, placed=placed, lingers=self.lingers, node=self.node))
        return self.actors[-1]

    @staticmethod
    def end(actor: LocalActor) -> None:
        actor.kill()
