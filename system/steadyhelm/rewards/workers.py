"""Processes that run reward terms of the user's own code, each call under a deadline.

A call that hangs, or that takes its process down, costs the samples of that call and nothing else: the process is
replaced and the rest is scored. The built-in terms need no process: they are linear in the text and cannot hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import InvalidStateError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from steadyhelm.config.reward import CustomTerm
from steadyhelm.errors import RetryableError, SteadyhelmError
from steadyhelm.rewards.custom import load_term, score_unit
from steadyhelm.rewards.interface import RewardTerm, Sample, Score

_PR_SET_PDEATHSIG = 1
_loaded: dict[str, RewardTerm | str] = {}  # in a worker process: terms by name, or why one could not be loaded
_folder = Path()


class TermProcesses:
    """A pool of processes that score units with custom terms.

    Args:
        terms: the custom terms; each process loads them by path when it starts, before its first deadline runs.
        base: the run file's folder.
        num_processes: processes.
        sample_deadline_s: seconds per sample of a unit.
    """

    def __init__(
        self, terms: Sequence[CustomTerm], base: Path, *, num_processes: int, sample_deadline_s: float
    ) -> None:
        self._terms = tuple(terms)
        self._base = base.resolve()
        self._num_processes = num_processes
        self._sample_deadline_s = sample_deadline_s
        self._closed = False
        self._crew = self._start()

    async def run(self, name: str, unit: Sequence[Sample]) -> list[Score]:
        """The scores of the term ``name`` for the unit's samples, in order; a failure of the term is their error.

        Raises RetryableError where the processes are closed meanwhile: that says nothing about the samples.
        """
        deadline_s = self._sample_deadline_s * len(unit)
        why = ""
        for _ in range(2):
            crew = self._crew
            try:
                future = crew.schedule(name, tuple(unit), deadline_s)
                return list(await asyncio.wrap_future(future))
            except TimeoutError:
                why = f"it took longer than its deadline of {deadline_s:g} s, or its process ended without a word"
                break
            except ProcessExpired as error:
                why = f"its process ended with code {error.exitcode}"
                break
            except (BrokenProcessPool, RuntimeError) as error:
                # The pool gives up where an idle process dies; that is nobody's sample, so the call gets a new pool.
                why = f"the scoring processes broke: {error}"
                if self._closed:
                    raise RetryableError(f"reward term {name!r} was being scored when its service closed") from error
                if crew is self._crew:
                    self._crew = self._start()
                    crew.end()
        return [Score(value=None, error=why)] * len(unit)

    def close(self) -> None:
        """Ends the processes; calls in flight raise RetryableError."""
        self._closed = True
        self._crew.end()

    def _start(self) -> _Crew:
        return _Crew(
            ProcessPool(
                max_workers=self._num_processes,
                initializer=_prepare,
                initargs=(self._terms, self._base, os.getpid()),
                context=multiprocessing.get_context("spawn"),
            )
        )


class _Crew:
    """A pool together with the thread that starts it and stays with it.

    The kernel's parent-death signal goes by the *thread* that started a process, so that thread outlives the pool.
    """

    def __init__(self, pool: ProcessPool) -> None:
        self.pool = pool
        self._started = threading.Event()
        self._ended = threading.Event()
        self._calls: set[ProcessFuture] = set()
        self._thread = threading.Thread(target=self._keep, name="reward-processes", daemon=True)
        self._thread.start()
        self._started.wait()

    def schedule(self, name: str, unit: tuple[Sample, ...], deadline_s: float) -> ProcessFuture:
        """A call in a process, whose deadline runs from the moment that a process takes it."""
        future = self.pool.schedule(_score, args=(name, unit), timeout=deadline_s)
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    def end(self) -> None:
        """Ends the pool's processes and waits for them."""
        self._ended.set()
        self._thread.join()

    def _keep(self) -> None:
        try:
            _ = self.pool.active  # starts the processes
        finally:
            self._started.set()
        self._ended.wait()
        self.pool.stop()
        self.pool.join()
        for future in tuple(self._calls):  # a stopped pool leaves its callers waiting
            with contextlib.suppress(InvalidStateError):
                future.set_exception(BrokenProcessPool("the processes have ended"))


def _prepare(terms: tuple[CustomTerm, ...], base: Path, parent: int) -> None:
    """Loads the terms in a new process, which ends with its parent, whatever ends that one."""
    global _folder
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    _folder = base
    for term in terms:
        try:
            _loaded[term.name] = load_term(base, term)
        except SteadyhelmError as error:
            _loaded[term.name] = str(error)


def _score(name: str, unit: tuple[Sample, ...]) -> list[Score]:
    term = _loaded[name]
    if isinstance(term, str):
        return [Score(value=None, error=term)] * len(unit)
    return score_unit(term, unit, _folder)
