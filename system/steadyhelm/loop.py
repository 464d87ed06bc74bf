"""The training loop over the services' Protocols.

::

      prompts(i) ──► rollout ──shards──► reference + reward ──► batch i committed
                        ▲                                            │
      weights i applied │                                            ▼
                        └────── weights i committed ◄── publish ◄── learner.step(i)

=============  ==============================================  ==========================================
who            waits for                                       is unblocked by
=============  ==============================================  ==========================================
rollout(i)     a policy version ≥ i − 1 − ``max_staleness``    ``apply_weights`` of that version
scorers(i)     one shard each                                  the rollout of that shard, not of the batch
learner(i)     the committed batch i                           the last shard's scores
rollout(i+1)   the loop, when ``max_staleness`` is 0           ``apply_weights`` of version i
=============  ==============================================  ==========================================

With ``max_staleness = k`` batches i … i + k are in the making while the learner steps batch i; k = 0 is the same code.
What the commit log names exists and is never made again: a resumed run and a learner group that lost a rank both go
through ``_replay``, which steps the committed batches once more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from steadyhelm import telemetry
from steadyhelm.batches import BatchMaker
from steadyhelm.config import RunFile
from steadyhelm.data.types import CheckpointRecord, PolicyVersion, Span, WeightsRecord
from steadyhelm.errors import CorruptObjectError, LearnerLostError, ObjectMissingError
from steadyhelm.services import Learner, PromptSource, Reference, Reward, Rollout, Served
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.log import CommitLog

T = TypeVar("T")
LOOK_S = 5.0
"""Seconds between two looks at a batch that is awaited."""
INPUT_PHASES = ("learner.read", "learner.input")
"""The spans in which a learner that has its batch's manifest still waits for something of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The services of a run; ``reference`` is None where β is 0, ``reward`` is None in supervised fine-tuning."""

    prompts: PromptSource
    rollout: Rollout
    learner: Learner
    reward: Reward | None = None
    reference: Reference | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationReport:
    """What an iteration did.

    ``replayed`` iterations were committed before and are stepped again after a restart. ``served`` is True where the
    engines have this iteration's weights; the first such report, without metrics, says where the run stands.
    """

    iteration: int
    version: PolicyVersion
    replayed: bool = False
    served: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


class Loop:
    """Drives the services from the commit log's state to the run's last iteration.

    Args:
        services: the run's services.
        log: the commit log, taken over by this attempt.
        layout: names of the run's objects.
        run: the run file.
        tell: takes an event whenever something out of the ordinary happens.
        meanwhile: is told every ``look_s`` seconds which iteration's batch is awaited, and since how long.
    """

    def __init__(
        self,
        services: Services,
        log: CommitLog,
        layout: RunLayout,
        run: RunFile,
        tell: telemetry.EventSink,
        meanwhile: Callable[[int, float], None] | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        self._services = services
        self._log = log
        self._layout = layout
        self._run = run
        self._tell = tell
        self._meanwhile = meanwhile
        self._look_s = look_s
        self._stop = asyncio.Event()
        self._damaged: set[PolicyVersion] = set()
        self._losses = 0
        self._left_out = 0.0

    @property
    def restarts(self) -> int:
        """How often the learner group was lost and started again."""
        return self._losses

    def stop(self) -> None:
        """Ends the loop behind the step in progress, with a checkpoint; batches in the making are abandoned."""
        self._stop.set()

    def leave_out(self, seconds: float) -> None:
        """Counts that much of what is done with the present report to no iteration: an evaluation belongs to none."""
        self._left_out += seconds

    async def iterations(self) -> AsyncGenerator[IterationReport, None]:
        """One report for each iteration, replayed ones included.

        Raises the services' errors; a LearnerLostError is answered by a replay, ``learner.max_restarts`` times.
        """
        batches = BatchMaker(self._services, self._layout, self._log, self._run)
        try:
            while True:
                try:
                    async for report in self._replay():
                        yield report
                    async for report in self._advance(batches):
                        yield report
                    return
                except LearnerLostError as error:
                    self._losses += 1
                    if self._losses > self._run.learner.max_restarts:
                        raise
                    await asyncio.to_thread(self._log.renew, "a learner rank was lost")
                    again = f"restart {self._losses} of at most {self._run.learner.max_restarts}"
                    text = f"{error} The group goes on from the last checkpoint ({again})."
                    self._tell(telemetry.Notice(text=text, level="warning", loss=True))
        finally:
            await batches.close()

    async def _replay(self) -> AsyncIterator[IterationReport]:
        """Brings the learner to the log's last committed batch and the engines to that policy version."""
        checkpoint = await self._restore()
        version = checkpoint.version if checkpoint else PolicyVersion(iteration=0, attempt=self._log.attempt)
        for manifest in self._log.batches(after=version.iteration):
            started = time.monotonic()
            learned = await self._services.learner.step(manifest)
            version = PolicyVersion(iteration=manifest.iteration, attempt=self._log.attempt)
            metrics = self._metrics(started, learned.spans, manifest.metrics, learned.metrics)
            yield IterationReport(iteration=manifest.iteration, version=version, replayed=True, metrics=metrics)
        version, _, _ = await self._serve(version.iteration)
        yield IterationReport(iteration=version.iteration, version=version, served=True)
        await self._checkpoint(version.iteration)

    async def _restore(self) -> CheckpointRecord | None:
        """Restores the newest checkpoint whose objects are whole, and returns it; None: the starting point.

        An older one costs only time: the batches behind it are all there to be stepped again.
        """
        for checkpoint in reversed(self._log.checkpoints()):
            if checkpoint.version in self._damaged:
                continue
            try:
                await self._services.learner.restore(checkpoint)
                return checkpoint
            except (CorruptObjectError, ObjectMissingError) as error:
                if isinstance(error, CorruptObjectError) or not self._damaged:  # retention deletes older ones
                    text = f"Checkpoint {checkpoint.version} cannot be restored, an older one is tried: {error}"
                    self._tell(telemetry.Notice(text=text, level="warning"))
                self._damaged.add(checkpoint.version)
        await self._services.learner.restore(None)
        return None

    async def _advance(self, batches: BatchMaker) -> AsyncIterator[IterationReport]:
        """Makes, commits, steps and serves one batch after the other."""
        started = time.monotonic()
        for iteration in range(self._log.last_iteration + 1, self._run.schedule.iterations + 1):
            asked = time.monotonic()
            batch = await self._awaited(batches.take(iteration, unless=self._stop), iteration, asked)
            if batch is None:
                await self._save(iteration - 1)
                return
            waited = time.monotonic() - asked
            await asyncio.to_thread(self._log.commit_batch, batch.manifest)
            learned = await self._services.learner.step(batch.manifest)
            version, spans, metrics = await self._serve(iteration)
            spans = (*batch.spans, *learned.spans, *spans)
            metrics = self._metrics(started, spans, batch.manifest.metrics, learned.metrics, metrics)
            metrics[telemetry.metrics.LEARNER_WAIT] = waited / metrics[telemetry.metrics.ITERATION_SECONDS]
            self._left_out = 0.0
            yield IterationReport(iteration=iteration, version=version, served=True, metrics=metrics)
            # What is done with the report, and a checkpoint, count in the iteration that waits for them
            started += metrics[telemetry.metrics.ITERATION_SECONDS] + self._left_out
            await self._checkpoint(iteration)

    async def _awaited(self, work: Coroutine[Any, Any, T], iteration: int, since: float) -> T:
        """What ``work`` comes to; whoever wants to know is told meanwhile that it lasts."""
        task = asyncio.create_task(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=self._look_s)
                if not task.done() and self._meanwhile is not None:
                    self._meanwhile(iteration, time.monotonic() - since)
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=self._look_s)  # batches are closed behind it

    async def _serve(self, iteration: int) -> tuple[PolicyVersion, tuple[Span, ...], dict[str, float]]:
        """Publishes the learner's weights and puts them into every engine; those that cannot be read once more."""
        version = PolicyVersion(iteration=iteration, attempt=self._log.attempt)
        spans: tuple[Span, ...] = ()
        metrics: dict[str, float] = {}
        started = time.monotonic()
        if not self._run.is_sft:
            known = self._log.weights(iteration)
            published = await self._publish(version, known)
            try:
                applied = await self._services.rollout.apply_weights(published.value)
            except (CorruptObjectError, ObjectMissingError) as error:
                text = f"Weights {published.value.version} cannot be read, the learner publishes them again: {error}"
                self._tell(telemetry.Notice(text=text, level="warning"))
                published = await self._publish(version, None)
                applied = await self._services.rollout.apply_weights(published.value)
            version = published.value.version
            spans = (*published.spans, *applied.spans)
            metrics = {**published.metrics, **applied.metrics}
            metrics[telemetry.metrics.WEIGHTS_SYNC_SECONDS] = time.monotonic() - started
        return version, spans, metrics

    async def _publish(self, version: PolicyVersion, known: WeightsRecord | None) -> Served[WeightsRecord]:
        """Publishes and commits the learner's weights, unless they are those of ``known``."""
        published = await self._services.learner.publish(version, self._layout.weights(version), known)
        if published.value != known:
            await asyncio.to_thread(self._log.commit_weights, published.value)
        return published

    async def _checkpoint(self, iteration: int) -> None:
        """Saves where that is due: behind the report, so that whoever writes reports down has done so before."""
        if iteration == self._run.schedule.iterations or iteration % self._run.schedule.checkpoint_every == 0:
            await self._save(iteration)

    async def _save(self, iteration: int) -> None:
        """Saves and commits the learner's state after ``iteration``, unless the log has it."""
        whole = (c.version.iteration for c in self._log.checkpoints() if c.version not in self._damaged)
        if iteration == 0 or max(whole, default=0) >= iteration:
            return
        version = PolicyVersion(iteration=iteration, attempt=self._log.attempt)
        saved = await self._services.learner.save(version, self._layout.checkpoint(version))
        await asyncio.to_thread(self._log.commit_checkpoint, saved.value)

    @staticmethod
    def _metrics(started: float, spans: tuple[Span, ...], *parts: Mapping[str, float]) -> dict[str, float]:
        """The parts' metrics with what only the loop can know: wall time, seconds per phase, overhead."""
        ended = time.monotonic()
        metrics = {name: value for part in parts for name, value in part.items()} | telemetry.phase_seconds(spans)
        metrics[telemetry.metrics.ITERATION_SECONDS] = ended - started
        metrics[telemetry.metrics.OVERHEAD_SHARE] = telemetry.overhead(spans, started, ended)
        input_s = sum(metrics.get(telemetry.metrics.seconds(name), 0.0) for name in INPUT_PHASES)
        metrics[telemetry.metrics.INPUT_WAIT] = input_s / (ended - started)
        if telemetry.metrics.WEIGHTS_PAUSE_SECONDS in metrics:
            paused = metrics[telemetry.metrics.WEIGHTS_PAUSE_SECONDS]
            metrics[telemetry.metrics.WEIGHTS_PAUSE_SHARE] = paused / (ended - started)
        return metrics
