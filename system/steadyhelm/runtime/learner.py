"""The learner group: DeepSpeed ranks under Ray Train behind the Learner protocol."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from steadyhelm.config import RunFile
from steadyhelm.data.types import BatchManifest, CheckpointRecord, ObjectRef, PolicyVersion, WeightsRecord
from steadyhelm.errors import FatalError, LearnerLostError
from steadyhelm.runtime import process_group
from steadyhelm.runtime.calls import answer
from steadyhelm.runtime.mailbox import STOP, Command, Expected, Mailbox, Outcome
from steadyhelm.runtime.placement import HEAD, asked, place, placed, ranks_lack
from steadyhelm.services import Coming, Served
from steadyhelm.telemetry import EventSink, Notice, ServiceState

RankFactory = Callable[[int, int], Any]
"""Builds the learner of (rank, world size) in the rank's process, inside an initialised process group."""
CLOSE_S = 20.0
"""How long the mailbox may take to hear that the group ends, and the ranks to end."""
NICE = 19
"""How much threads that prepare batches to come give way to others: to anybody who wants the core."""
UNUSED = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
"""What Ray Train calls when a group starts and ends that has nothing to do here."""
CALLS = 64
"""Calls of the driver that the mailbox holds at a time, which is more than there are."""
QUESTIONS = 4
"""What it holds of each rank: two long questions, an answer, and what a rank that was lost had asked."""
BUILD = "build"
"""The command that a group gets before any other; its argument is the RankFactory."""


class LearnerGroup:
    """Ranks that run ``factory``'s learner in lock-step.

    Ray Train restarts the whole group when a rank dies; the call under way then raises LearnerLostError and the next
    one, which has to be ``restore``, waits for the new group.

    Args:
        run: the run file.
        scratch: folder for Ray Train's own files.
        tell: takes events for the user.
    """

    def __init__(self, run: RunFile, scratch: str, tell: EventSink) -> None:
        self._factory: RankFactory | None = None
        self._run = run
        self._scratch = scratch
        self._tell = tell
        self._mailbox: Any = None
        self._over: asyncio.Future[BaseException | None] | None = None
        self._joined = False

    def launch(self) -> None:
        """Starts the group; ``ready`` awaits it. Must be called inside the event loop that will await it."""
        room = CALLS + QUESTIONS * self._run.learner.replicas
        self._mailbox = ray.remote(num_cpus=0, max_concurrency=room, resources=place(HEAD))(Mailbox).remote()
        loop = asyncio.get_running_loop()
        over: asyncio.Future[BaseException | None] = loop.create_future()
        self._over = over
        trainer = self._trainer()

        def fit() -> None:
            error: BaseException | None = None
            try:
                trainer.fit()
            except BaseException as caught:  # a thread's only way to tell; raised by the next call
                error = caught
            if not loop.is_closed():
                loop.call_soon_threadsafe(over.set_result, error)

        threading.Thread(target=fit, name="learner-group", daemon=True).start()

    async def ready(self, factory: RankFactory) -> None:
        """Returns once all ranks are there and have built their learners, as those of later groups will.

        Raises DeadlineError, FatalError, and what ``factory`` raises in a rank.
        """
        self._factory = factory
        with placed(partial(ranks_lack, self._resources(), self._run.learner.replicas), self._say):
            deadline_s = self._run.runtime.start_deadline_s
            await self._await(self._mailbox.ready.remote(), "the learner group's start", deadline_s)
        self._joined = True
        await self._build()

    def _say(self, lacks: str) -> None:
        """Tells what the group finds no room for, or that it has found some."""
        self._tell(ServiceState(service="learner", state="starts", since_s=time.monotonic(), lacks=lacks))
        text = f"the learner finds no room: {lacks}" if lacks else "the learner has room"
        self._tell(Notice(text=text, level="warning" if lacks else "info"))

    def expect(self, coming: Coming) -> None:
        """See ``services.Learner``. Nobody awaits an answer: a mailbox that is gone fails the next call."""
        self._mailbox.expect.remote(coming)

    async def restore(self, checkpoint: CheckpointRecord | None) -> Served[None]:
        """See ``services.Learner``."""
        await self._build()
        answered: Served[None] = await self._call("restore", (checkpoint,), "restores")
        return answered

    async def _build(self) -> None:
        """Has the ranks of the present group build their learners; a group that has them already does nothing."""
        await self._call(BUILD, (self._factory,), "builds the model", self._run.runtime.start_deadline_s)

    async def step(self, manifest: BatchManifest) -> Served[None]:
        """See ``services.Learner``."""
        answered: Served[None] = await self._call("step", (manifest,), f"steps iteration {manifest.iteration}")
        return answered

    async def publish(
        self, version: PolicyVersion, key: str, known: WeightsRecord | None = None
    ) -> Served[WeightsRecord]:
        """See ``services.Learner``."""
        answered: Served[WeightsRecord] = await self._call(
            "publish", (version, key, known), f"publishes version {version}"
        )
        return answered

    async def save(self, version: PolicyVersion, key: str) -> Served[CheckpointRecord]:
        """See ``services.Learner``."""
        answered: Served[CheckpointRecord] = await self._call("save", (version, key), f"saves checkpoint {version}")
        return answered

    async def export(self, key: str) -> Served[tuple[ObjectRef, ...]]:
        """See ``services.Learner``."""
        answered: Served[tuple[ObjectRef, ...]] = await self._call("export", (key,), "exports the model")
        return answered

    async def close(self) -> None:
        """Ends the ranks and waits for Ray Train to be done with them."""
        if self._mailbox is None or self._over is None:
            return
        if self._joined:  # ranks that are still starting hear nothing; they end with the Ray session
            await ended(self._mailbox.stop.remote(), self._over, CLOSE_S)
        ray.kill(self._mailbox)

    async def _call(self, name: str, arguments: tuple[Any, ...], doing: str, deadline_s: float = 0.0) -> Any:
        self._tell(ServiceState(service="learner", state=doing, since_s=time.monotonic()))
        try:
            call = self._mailbox.call.remote(name, arguments)
            return await self._await(call, f"the learner: it {doing}", deadline_s or self._run.runtime.step_deadline_s)
        finally:
            self._tell(
                ServiceState(service="learner", state="waits for a batch", since_s=time.monotonic(), waiting=True)
            )

    async def _await(self, call: Any, of: str, deadline_s: float) -> Any:
        """Awaits ``call``, or the end of the whole group, whichever comes first."""
        assert self._over is not None
        notice_s = self._run.runtime.wait_notice_s
        task = asyncio.ensure_future(answer(call, of=of, deadline_s=deadline_s, notice_s=notice_s, tell=self._tell))
        try:
            await asyncio.wait({task, self._over}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            task.cancel()
        error = self._over.result()
        raise FatalError(f"The learner group ended while it was waited for ({of}): {error}") from error

    def _resources(self) -> dict[str, float]:
        """What a rank reserves, by Ray's names."""
        cpus = max(self._run.runtime.cpus_per_actor, 0.001)
        return asked(cpus, self._run.runtime.gpus_per_learner, place("learner"))

    def _trainer(self) -> DataParallelTrainer:
        gpus = self._run.runtime.gpus_per_learner
        return _Trainer(
            _train,
            train_loop_config={
                "mailbox": self._mailbox,
                "gpu": gpus > 0,
                "start_deadline_s": self._run.runtime.start_deadline_s,
                "step_deadline_s": self._run.runtime.step_deadline_s,
            },
            scaling_config=ScalingConfig(
                num_workers=self._run.learner.replicas, use_gpu=gpus > 0, resources_per_worker=self._resources()
            ),
            backend_config=process_group.RanksConfig(),
            run_config=RunConfig(
                name=f"{self._run.name}-{uuid.uuid4().hex[:8]}",
                storage_path=self._scratch,
                failure_config=FailureConfig(max_failures=self._run.learner.max_restarts),
            ),
        )


class _Trainer(DataParallelTrainer):  # type: ignore[misc]  # Ray has no types here
    """Ray Train's trainer without the actors that only watch over what no run has.

    Those hand out data sets of Ray Data, and end placement groups that outlive a driver's job, which these do not:
    two processes, 230 MiB, and seconds of each start.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in UNUSED]


async def ended(stop: Awaitable[Any], over: asyncio.Future[Any], wait_s: float) -> None:
    """Returns when ``stop`` has been answered and then ``over`` is done, each within ``wait_s`` seconds, or neither.

    A mailbox that is gone or stuck tells nobody that it is over, so nothing is waited for behind it. Raises nothing.
    """

    async def answer_of() -> None:
        await stop

    told = asyncio.create_task(answer_of())
    await asyncio.wait({told}, timeout=wait_s)
    if told.done() and told.exception() is None:
        await asyncio.wait({over}, timeout=wait_s)
    told.cancel()


def _train(config: dict[str, Any]) -> None:
    """The training function of one rank."""
    import steadyhelm.services.learner  # noqa: F401 - takes seconds, which the other services' starts can hide

    with process_group.joined(gpu=config["gpu"], deadline_s=config["step_deadline_s"]):
        _serve(config)


def _serve(config: dict[str, Any]) -> None:
    """Joins the mailbox, and serves its commands in order until it says stop."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    mailbox, deadline_s = config["mailbox"], config["start_deadline_s"]
    process = f"{ray.util.get_node_ip_address()}:{os.getpid()}"
    incarnation = ray.get(mailbox.join.remote(rank, world, process), timeout=deadline_s)
    serving = _Rank(rank, world)
    number, looks_ahead = 0, False
    while True:
        command: Command | None = ray.get(mailbox.next.remote(incarnation, number), timeout=deadline_s)
        if command is None:
            continue
        if command.name == STOP:
            serving.close()
            return
        ray.get(mailbox.post.remote(incarnation, rank, number, serving.outcome(command)), timeout=deadline_s)
        number += 1
        if serving.is_built and not looks_ahead:
            ask = partial(_expected, mailbox, incarnation, deadline_s)
            look = partial(look_ahead, ask, serving.expect)
            threading.Thread(target=look, name="look-ahead", daemon=True).start()
            looks_ahead = True


def _expected(mailbox: Any, incarnation: int, deadline_s: float, number: int) -> tuple[Expected, ...] | None:
    """The mailbox's answer to ``expected``. Raises RayError."""
    found: tuple[Expected, ...] | None = ray.get(mailbox.expected.remote(incarnation, number), timeout=deadline_s)
    return found


def look_ahead(ask: Callable[[int], tuple[Expected, ...] | None], expect: Callable[[Coming], None]) -> None:
    """Has the learner read what batches to come will need, on threads that others on the same cores go before.

    Engines sample meanwhile, and what they lose nobody gains. Threads that this one starts inherit how nice it is. They
    are not idle ones, which may never run while they hold a lock that the training thread waits for.

    Args:
        ask: what to expect from a number on; None where there will be nothing more.
        expect: tells the learner.
    """
    with suppress(OSError):  # a sandbox may not know it; then it takes its share
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    number = 0
    while True:
        try:
            found = ask(number)
        except ray.exceptions.GetTimeoutError:  # a mailbox that is busy is asked again
            continue
        except ray.exceptions.RayError:  # the mailbox is gone, which the next command tells
            return
        if found is None:
            return
        for entry in found:
            expect(entry.coming)
            number = entry.number + 1


class _Rank:
    """The learner of one rank, once it is built."""

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self._learner: Any = None

    @property
    def is_built(self) -> bool:
        """Whether there is a learner."""
        return self._learner is not None

    def expect(self, coming: Coming) -> None:
        """Tells the learner, which is built, what a batch to come will need."""
        self._learner.expect(coming)

    def close(self) -> None:
        """Ends the learner."""
        if self._learner is not None:
            self._learner.close()

    def outcome(self, command: Command) -> Outcome:
        """What the rank's call comes to."""
        try:
            if command.name == BUILD:
                self._learner = self._learner or command.arguments[0](self._rank, self._world)
                return Outcome()
            if self._learner is None:
                raise LearnerLostError(f"A learner rank was lost before {command.name}.")
            return Outcome(value=getattr(self._learner, command.name)(*command.arguments))
        except Exception as error:  # one service call fails: the driver decides what that means
            return Outcome.of(error)
