"""The composition root: run file → store, commit log, services → loop; start, resume, stop, evaluate."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from steadyhelm import __version__, status
from steadyhelm.config import RunFile
from steadyhelm.config.load import diff_run_files
from steadyhelm.data.types import CheckpointRecord, PolicyVersion, PromptId
from steadyhelm.errors import ConfigError, ModelError, ObjectExistsError, ResourceError, StoppedError, StoreError
from steadyhelm.loop import IterationReport, Loop, Services
from steadyhelm.models.folder import require_model_folder
from steadyhelm.scaling import Scaler
from steadyhelm.services import PromptSource
from steadyhelm.status import StatusBoard
from steadyhelm.store import ObjectStore, open_store, retention, run_uri
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.ledger import Ledger
from steadyhelm.store.liveness import held
from steadyhelm.store.log import CommitLog, Entry, LogView
from steadyhelm.store.probe import require_one_winner
from steadyhelm.telemetry import EvalDone, Event, EventSink, IterationDone, Notice, RunStarted, metrics_log
from steadyhelm.telemetry.logs import redact, secret_values
from steadyhelm.telemetry.metrics import ENGINES_DESIRED, REPLAYED, RESTARTS
from steadyhelm.telemetry.status import Checkpoint, Rollouts, Version

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What ends a run on purpose."""
METRICS_ADDRESS = "STEADYHELM_METRICS_ADDRESS"
"""Environment variable: ``host:port`` where a driver's metrics are read whose run file names no port. For clusters."""
NOTES = 20
"""Lines to the terminal that the metrics keep of an iteration, the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run is started; nothing here changes its numbers.

    ``run_id`` names the run's folder in the store; empty takes ``<name>-<engine>`` (``<name>`` for SFT). ``new`` takes
    the first free ``<id>-<n>`` instead, ``resume_last`` the highest taken one. ``take_over`` goes on although another
    driver seems alive. ``accept_changes`` resumes although the run file differs from the run's. ``command`` is what
    the user types to go on with a run, all but its id, which the driver adds.
    """

    run_id: str = ""
    new: bool = False
    resume_last: bool = False
    take_over: bool = False
    accept_changes: bool = False
    address: str = ""
    command: str = "steadyhelm run FILE"


def choose_run_id(run: RunFile, store: ObjectStore, options: RunOptions) -> str:
    """The id that ``options`` ask for. Raises ConfigError where there is no run to resume."""
    base = options.run_id or run.default_id
    if not (options.new or options.resume_last):
        return base
    taken = [base] if store.exists(RunLayout(base).run_file) else []
    while store.exists(RunLayout(f"{base}-{len(taken) + 1}").run_file):
        taken.append(f"{base}-{len(taken) + 1}")
    if options.resume_last:
        if not taken:
            raise ConfigError(f"There is no run {base!r} in {store.uri} to resume; start one without --resume-last.")
        return taken[-1]
    return f"{base}-{len(taken) + 1}" if taken else base


def run(run_file: RunFile, base: Path, options: RunOptions, tell: EventSink, board: StatusBoard | None = None) -> int:
    """Runs, or goes on with, the run that ``run_file`` describes; blocks until it is finished or stopped.

    Args:
        run_file: the validated run file.
        base: the run file's folder, where task code is looked for.
        options: how to start.
        tell: takes events for the display.
        board: gets the run's status; None where nobody wants it.

    Returns:
        0 when the run is finished, 128 + the signal's number when a signal stopped it.

    Raises:
        SteadyhelmError: what ended the run; everything committed is kept.
    """
    board = board or StatusBoard()
    with status.served(board, tell) as told:
        return _run(run_file, base, options, told, board)


def _run(run_file: RunFile, base: Path, options: RunOptions, tell: EventSink, board: StatusBoard) -> int:
    store = open_store(run_file.store.uri)
    layout = RunLayout(choose_run_id(run_file, store, options))
    iterations = run_file.schedule.iterations
    board.note(run=layout.run, store=store.uri, iterations=iterations)
    _require_model(run_file)
    require_one_winner(store, layout.run)
    lock = held(store, layout.run, take_over=options.take_over, tell=tell)
    with lock, _scraped(run_file, layout.run, tell) as told:
        log = take_over(run_file, store, layout.run, options.accept_changes)
        if log is None:
            board.note(iteration=iterations)
            board.ended(0)
            told(Notice(text=f"Run {layout.run} in {store.uri} is finished. Start another one with --new."))
            return 0
        with status.kept(board, store, layout, log):
            code = asyncio.run(Driver(run_file, base, options, store, layout, log, told, board).drive())
            board.ended(code)
        return code


def take_over(run_file: RunFile, store: ObjectStore, run: str, accept_changes: bool) -> CommitLog | None:
    """The log of the run, new or known, of which this driver is the newest attempt; None where the run is finished.

    ``accept_changes`` goes on, also behind its end, under a run file that differs from the run's. Raises ConfigError
    where that is not given, StoreError.
    """
    known = CommitLog.read(store, run)
    with suppress(ObjectExistsError):
        store.put(RunLayout(run).run_file, json.dumps(_run_record(run_file), indent=1).encode(), if_absent=True)
    if not _differs(run_file, known, accept_changes) and known.finished() is not None:
        return None
    log = CommitLog.take_over(store, run, "resume" if known.attempt else "start")
    if _differs(run_file, log, accept_changes):  # asked again: now nobody else can change it
        log.append("run_file", _run_record(run_file) | {"after": log.last_iteration})
    return log


def evaluate(
    run_file: RunFile, base: Path, model: str | None, pairs: int, address: str, tell: EventSink
) -> dict[str, float]:
    """Metrics of the model folder ``model`` (None: the run file's) on the first ``pairs`` held-out pairs (0: all).

    ``address`` is of a Ray cluster to join, ``tell`` takes events for the display. Raises the errors of ``run``, and
    StoppedError where SIGINT or SIGTERM ends it.
    """
    part = run_file.model if model is None else run_file.model.model_copy(update={"path": model, "factory": None})
    run_file = run_file.model_copy(update={"model": part})
    if run_file.is_sft:
        raise ConfigError(
            "algorithm.type is 'sft', whose rollouts are the data set's traces: evaluate with the run file of "
            "reinforcement learning, and name the model with --model"
        )
    if run_file.data.eval is None:
        raise ConfigError("data.eval is not given: name the function that returns the held-out pairs")
    _require_model(run_file)
    with tempfile.TemporaryDirectory(prefix="steadyhelm-eval-") as scratch:
        return asyncio.run(_evaluate(run_file, base, open_store(scratch), pairs, address, tell))


async def _evaluate(
    run_file: RunFile, base: Path, store: ObjectStore, pairs: int, address: str, tell: EventSink
) -> dict[str, float]:
    from steadyhelm.evaluation.policy import evaluate_policy
    from steadyhelm.runtime import build, cluster, handles

    layout = RunLayout("evaluation")
    work = asyncio.current_task()
    assert work is not None
    place = build.RunPlace(run=run_file, run_id=layout.run, attempt=0, base=str(base), store_uri=store.uri)
    with (
        _cancelled_by_signals(work) as listen,
        cluster.cluster(run_file, address or run_file.runtime.address) as scratch,
    ):
        listen()
        prompts = handles.PromptsHandle(run_file, tell)
        rollout = handles.RolloutHandle(run_file, tell)
        try:
            prompts.pool.launch()
            rollout.pool.launch()
            place = await _with_model(replace(place, scratch=scratch), tell)
            await asyncio.gather(
                prompts.pool.ready(partial(build.prompts, place)), rollout.pool.ready(partial(build.rollout, place))
            )
            key = partial(layout.eval_shard, 0, 0)
            result = await evaluate_policy(prompts, rollout, store, key, run_file, iteration=0, limit=pairs)
        finally:
            await prompts.pool.close()
            await rollout.pool.close()
    return dict(result.metrics)


class Driver:
    """One attempt at a run, from its services' start to their end."""

    def __init__(
        self,
        run_file: RunFile,
        base: Path,
        options: RunOptions,
        store: ObjectStore,
        layout: RunLayout,
        log: CommitLog,
        tell: EventSink,
        board: StatusBoard | None = None,
    ) -> None:
        self._run = run_file
        self._board = board or StatusBoard()
        self._base = base
        self._address = options.address or run_file.runtime.address
        self._again = f"{options.command} --id {layout.run}"
        self._store = store
        self._layout = layout
        self._log = log
        self._notes: deque[str] = deque(maxlen=NOTES)
        self._told = tell
        self._secrets = secret_values(os.environ)
        self._metrics = metrics_log.MetricsLog(store.put, layout.metrics_prefix, log.attempt)
        self._retained: CheckpointRecord | None = None
        self._pools: list[Any] = []
        self._replayed = 0
        self._signal: signal.Signals | None = None
        self._loop: Loop | None = None
        self._scaler: Scaler | None = None
        self._on_signal: Callable[[signal.Signals], None] = _silent

    async def drive(self) -> int:
        """Runs to the end or to a signal; returns the exit code."""
        from steadyhelm.runtime import build, cluster

        place = build.RunPlace(
            run=self._run,
            run_id=self._layout.run,
            attempt=self._log.attempt,
            base=str(self._base),
            store_uri=self._store.uri,
        )
        first = self._log.last_iteration + 1
        self._tell(
            RunStarted(
                run=self._layout.run,
                iterations=self._run.schedule.iterations,
                first_iteration=first,
                place=run_uri(self._store, self._layout.run),
            )
        )
        work = asyncio.create_task(self._work(place, cluster.cluster(self._run, self._address)))
        with self._signals(work):
            try:
                await work
            except asyncio.CancelledError:
                if self._signal is None:
                    raise
            except Exception as error:
                self._note_down(f"the run ended: {error}")
                with suppress(StoreError):  # what ended the run is what the user has to read
                    self._keep_notes()
                raise
            code = self._stopped()
            self._keep_notes()
            self._note_status()
        return code

    def _tell(self, event: Event) -> None:
        """Tells the terminal, and the next line of metrics what was said."""
        if isinstance(event, Notice):
            self._note_down(event.text)
        self._told(event)
        self._note_status()

    def _note_status(self, **known: Any) -> None:
        """Puts ``known`` and what the commit log and the rollout pool say into the run's status."""
        weights, saved = self._log.latest_weights(), self._log.checkpoint()
        rollouts = [pool for pool in self._pools if pool.service == "rollout"]
        version = weights and Version(iteration=weights.version.iteration, attempt=weights.version.attempt)
        at = saved and Checkpoint(iteration=saved.version.iteration, key=self._layout.checkpoint(saved.version))
        self._board.note(
            attempt=self._log.attempt,
            iteration=self._log.last_iteration,
            version=version,
            checkpoint=at,
            rollouts=Rollouts(
                ready=sum(len(pool.serving) for pool in rollouts), desired=sum(pool.size for pool in rollouts)
            ),
            **known,
        )

    def _note_down(self, text: str) -> None:
        self._notes.append(redact(text, self._secrets))

    def _take_notes(self) -> list[str]:
        notes = list(self._notes)
        self._notes.clear()
        return notes

    def _keep_notes(self) -> None:
        """Puts what was said since the last line of metrics into a line of its own."""
        if self._notes:
            self._metrics.append(self._log.last_iteration, {}, notes=self._take_notes())
        self._metrics.flush()

    def _stopped(self) -> int:
        """The exit code; where a signal ended the run before it was finished, a line on how to go on too."""
        if self._signal is None or self._log.finished() is not None:
            return 0
        text = (
            f"Stopped by {self._signal.name} with {self._log.last_iteration} of {self._run.schedule.iterations} "
            f"iterations committed; {self._again} goes on."
        )
        self._tell(Notice(text=text, level="warning"))
        return 128 + self._signal

    async def _work(self, place: Any, session: Any) -> None:
        """Starts the services and drives the loop; whatever ends it ends the services."""
        # Ray starts its processes meanwhile, and the import of Ray Train takes as long.
        Thread(target=import_module, args=("steadyhelm.runtime.learner",), daemon=True).start()
        with ExitStack() as stack:
            scratch = stack.enter_context(session)
            self._listen()
            async with self._services(replace(place, scratch=scratch)) as services:
                await self.follow(services)

    async def follow(self, services: Services) -> None:
        """The loop over services that have started, with all that happens behind an iteration and at the end."""
        for entry in self._evaluations():  # their lines may be lost: the log has them before the segment
            self._metrics.append(int(entry.payload["iteration"]), entry.payload["metrics"])
        self._scaler = Scaler(self._run, services.rollout, self._tell, self._note_down)
        self._loop = Loop(services, self._log, self._layout, self._run, self._tell, self._scaler.meanwhile)
        self._scaler.resume(await asyncio.to_thread(self._engines_before))
        self._note_status(phase="running")
        for text in self._run.warnings:
            self._tell(Notice(text=text, level="warning"))
        async with aclosing(self._loop.iterations()) as reports:
            async for report in reports:
                await self._note(report, services)
        if self._signal is None:
            await self._finish(services)

    @asynccontextmanager
    async def _services(self, place: Any) -> AsyncIterator[Services]:
        """All services of the run, started side by side, while the starting point is made."""
        from steadyhelm.runtime import build, handles
        from steadyhelm.runtime.learner import LearnerGroup

        run, tell = self._run, self._tell
        learner = LearnerGroup(run, place.scratch, tell)
        prompts, rollout = handles.PromptsHandle(run, tell), handles.RolloutHandle(run, tell)
        reward = None if run.is_sft else handles.RewardHandle(run, tell)
        reference = handles.ReferenceHandle(run, tell) if run.uses_reference else None
        built = (prompts, build.prompts), (rollout, build.rollout), (reward, build.reward), (reference, build.reference)
        pools = [(handle.pool, factory) for handle, factory in built if handle is not None]
        self._pools = [pool for pool, _ in pools]
        try:
            learner.launch()
            for pool, _ in pools:
                pool.launch()
            place = await _with_model(place, tell)
            await asyncio.gather(
                learner.ready(partial(build.learner, place)),
                *(pool.ready(partial(factory, place)) for pool, factory in pools),
            )
            yield Services(prompts=prompts, rollout=rollout, learner=learner, reward=reward, reference=reference)
        finally:
            await asyncio.gather(learner.close(), *(pool.close() for pool, _ in pools), return_exceptions=True)

    async def _note(self, report: IterationReport, services: Services) -> None:
        """Logs and shows an iteration; evaluates the policy where that is due."""
        if report.metrics:
            self._replayed += report.replayed
            found = {**report.metrics, REPLAYED: float(self._replayed), RESTARTS: float(self._restarts())}
            if self._scaler is not None:
                found |= self._scaler.behind(report.iteration, report.metrics)
            self._metrics.append(report.iteration, found, report.replayed, self._take_notes())
            self._tell(IterationDone(iteration=report.iteration, metrics=found, replayed=report.replayed))
        if report.served:
            began = time.monotonic()
            if self._signal is None:
                await self._evaluate(report.version, services)
            if self._loop is not None:
                self._loop.leave_out(time.monotonic() - began)
            await asyncio.to_thread(self._metrics.flush)  # before the loop may checkpoint this iteration
        await self._retain()
        if self._scaler is not None:
            self._scaler.forget()

    def _engines_before(self) -> int | None:
        """How many engines the run's earlier attempt wanted at last."""
        if self._run.rollout.scaling is None or self._log.last_iteration == 0:
            return None
        try:
            keys = self._store.list(self._layout.metrics_prefix)
            found = metrics_log.last_value(keys, lambda key: bytes(self._store.get(key)), ENGINES_DESIRED)
        except StoreError as error:  # that costs no more than this number
            self._tell(Notice(text=f"How many engines the run had wanted cannot be read: {error}", level="warning"))
            return None
        return None if found is None else int(found)

    def _restarts(self) -> int:
        lost = self._loop.restarts if self._loop is not None else 0
        return lost + sum(int(pool.replaced) for pool in self._pools)

    async def _retain(self) -> None:
        """Deletes, once behind each checkpoint, the checkpoints and weights that it replaces."""
        newest = self._log.checkpoint()
        if newest is None or newest == self._retained or not self._run.schedule.keep_checkpoints:
            return
        self._retained = newest
        keep = retention.Keep.of(self._run)

        def delete() -> None:
            retention.remove(self._store, retention.unneeded(self._store, self._log, keep, retention.REPLACED))

        try:
            await asyncio.to_thread(delete)
        except StoreError as error:
            self._tell(Notice(text=f"Could not delete what the run needs no more: {error}", level="warning"))

    async def _evaluate(self, version: PolicyVersion, services: Services) -> None:
        """Evaluates and commits the result: at the start, each ``eval_every`` iterations, and in full at the end."""
        from steadyhelm.evaluation.policy import evaluate_policy

        iteration, schedule = version.iteration, self._run.schedule
        last = iteration == schedule.iterations
        due = last or iteration == 0 or (schedule.eval_every and iteration % schedule.eval_every == 0)
        if self._run.is_sft or self._run.data.eval is None or not due:
            return
        if any(iteration == int(entry.payload["iteration"]) for entry in self._evaluations()):
            return
        key = partial(self._layout.eval_shard, iteration, self._log.attempt)
        result = await evaluate_policy(
            services.prompts,
            services.rollout,
            self._store,
            key,
            self._run,
            iteration=iteration,
            limit=0 if last or iteration == 0 else schedule.eval_pairs,  # before and after: on the same pairs
        )
        metrics = dict(result.metrics)
        await asyncio.to_thread(
            self._log.append, "eval", {"iteration": iteration, "attempt": self._log.attempt, "metrics": metrics}
        )
        self._metrics.append(iteration, metrics)
        self._tell(EvalDone(iteration=iteration, metrics=metrics))

    def _evaluations(self) -> list[Entry]:
        return [entry for entry in self._log.entries if entry.kind == "eval"]

    async def _finish(self, services: Services) -> None:
        """Checks the ledger, exports the model, writes the report, and commits that the run is finished.

        Raises FatalError, before anything of that, where the ledger does not add up, and FencedError, before model and
        before report, where another attempt has taken over: both lie under names that all attempts use.
        """
        from steadyhelm.report import write_report

        after = int(self._log.run_record()["after"])
        ledger = await settle_ledger(self._log, services.prompts, after)
        await asyncio.to_thread(self._log.check_fence)
        model = await services.learner.export(self._layout.model)
        await self._retain()
        self._metrics.flush()
        await asyncio.to_thread(self._log.check_fence)
        place = await asyncio.to_thread(write_report, self._store, self._layout.run)
        payload = {"iterations": self._run.schedule.iterations, "ledger": ledger.counts(), "ledger_after": after}
        await asyncio.to_thread(self._log.finish, payload, model.value)
        self._tell(
            Notice(text=f"Finished. Model: {self._store.uri}/{self._layout.model} Report: {self._store.uri}/{place}")
        )

    @contextmanager
    def _signals(self, work: asyncio.Task[None]) -> Iterator[None]:
        """SIGINT and SIGTERM end the run behind the step in progress, with a checkpoint; a second one at once."""

        def on(number: signal.Signals) -> None:
            again = self._signal is not None
            self._signal = number
            self._note_status(phase="stopping")
            if again or self._loop is None:
                work.cancel()
                return
            self._loop.stop()
            text = f"{number.name}: stops behind the step in progress; once more stops at once."
            self._tell(Notice(text=text, level="warning"))

        self._on_signal = on
        self._listen()
        try:
            yield
        finally:
            for number in SIGNALS:
                asyncio.get_running_loop().remove_signal_handler(number)

    def _listen(self) -> None:
        """Takes the signals; once more behind Ray's start, which puts a handler of its own in the place of ours."""
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)


@contextmanager
def _cancelled_by_signals(work: asyncio.Task[Any]) -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM cancel ``work``, which then raises StoppedError; yields what takes the signals once more.

    Ray's start puts a handler of its own in the place of ours.
    """
    loop = asyncio.get_running_loop()
    came: list[signal.Signals] = []

    def on(number: signal.Signals) -> None:
        came.append(number)
        work.cancel()

    def listen() -> None:
        for number in SIGNALS:
            loop.add_signal_handler(number, on, number)

    listen()
    try:
        yield listen
    except asyncio.CancelledError:
        if not came:
            raise
        raise StoppedError(f"{came[0].name} stopped it; there is no result.", came[0]) from None
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def _silent(_: Any) -> None:
    """Takes events that nobody watches."""


def _require_model(run_file: RunFile) -> None:
    """Raises ModelError where ``model.path`` lacks files of a model folder, before anything is started."""
    path = run_file.model.path
    if not path:
        return
    try:
        require_model_folder(Path(path).absolute(), trust_remote_code=run_file.model.trust_remote_code)
    except ModelError as error:
        raise ModelError(
            f"model.path {path!r} cannot be used: {error}; where an SFT run makes that folder, finish that run first"
        ) from error


@contextmanager
def _scraped(run_file: RunFile, run_id: str, tell: EventSink) -> Iterator[EventSink]:
    """Yields ``tell`` with Prometheus' endpoint behind it, at ``runtime.metrics_port`` or else at ``METRICS_ADDRESS``.

    Raises ResourceError where the run file's port is taken. The environment's may be: several runs share a pod.
    """
    port = run_file.runtime.metrics_port
    host, _, given = ("127.0.0.1", "", str(port)) if port else os.environ.get(METRICS_ADDRESS, "").rpartition(":")
    if not given:
        yield tell
        return
    from steadyhelm.telemetry.prometheus import LatestMetrics, serve_prometheus

    latest = LatestMetrics(run_id)
    try:
        _, stop = serve_prometheus(latest, int(given), host)
    except OSError as error:
        if port:
            raise ResourceError(
                f"runtime.metrics_port {port} cannot be opened ({error.strerror}): choose another port, or 0 for none"
            ) from error
        text = f"Prometheus does not see this run: {METRICS_ADDRESS} {host}:{given} is taken ({error.strerror})."
        tell(Notice(text=text, level="warning"))
        yield tell
        return

    def told(event: Event) -> None:
        if isinstance(event, IterationDone | EvalDone):
            latest.update(event.metrics)
        tell(event)

    try:
        yield told
    finally:
        stop()


async def _with_model(place: Any, tell: EventSink) -> Any:
    """``place`` with its starting point: the run file's folder, or what its factory writes in a process of its own."""
    from steadyhelm.runtime import build, calls

    if place.run.model.path:
        return replace(place, model=_absolute(place.run.model.path))
    runtime = place.run.runtime
    refs = await calls.answer(
        build.in_a_process(build.model, place),
        of=f"model.factory {place.run.model.factory}",
        deadline_s=runtime.start_deadline_s,
        notice_s=runtime.wait_notice_s,
        tell=tell,
    )
    return replace(place, model_refs=refs)


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


async def settle_ledger(log: LogView, prompts: PromptSource, after: int) -> Ledger:
    """What became of the prompts of the committed iterations behind ``after``, against those that were issued.

    Raises FatalError where an issued prompt has no record or two, or where a record is of none.
    """
    batches = log.batches(after)
    ledger = Ledger.of(batches)
    issued: list[PromptId] = []
    for manifest in batches:
        issued += [prompt.prompt_id for prompt in (await prompts.prompts(manifest.iteration)).value]
    ledger.check_issued(issued)
    return ledger


def _run_record(run_file: RunFile) -> dict[str, Any]:
    """What the run's objects say of a run file; ``after``: the last iteration that a former one holds for."""
    return {"format": 1, "steadyhelm": __version__, "after": 0, "run": run_file.model_dump(mode="json")}


def _differs(run_file: RunFile, log: LogView, accept_changes: bool) -> bool:
    """Whether the run's file, the one in force, differs from ``run_file``; ConfigError where that is not accepted."""
    changes = diff_run_files(RunFile.model_validate(log.run_record()["run"]), run_file)
    if changes and not accept_changes:
        listed = "\n  ".join(changes)
        raise ConfigError(
            f"run {log.run} exists with another run file:\n  {listed}\n"
            "Start a new run with --new, or go on under the changed file with --accept-changes."
        )
    return bool(changes)
