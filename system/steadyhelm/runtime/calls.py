"""Calls to actors: a deadline on each, a line in the log while one takes long, our errors out of Ray's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from ray import exceptions as ray_errors

from steadyhelm.errors import DeadlineError, EngineLostError, FatalError, SteadyhelmError, first_line
from steadyhelm.telemetry import EventSink, Notice

T = TypeVar("T")


async def answer(call: Awaitable[T], *, of: str, deadline_s: float, notice_s: float, tell: EventSink) -> T:
    """Awaits a remote call.

    Args:
        call: the call's object reference, or any awaitable.
        of: what is waited for, as the end of "waiting for …".
        deadline_s: longest wait in seconds.
        notice_s: seconds between lines that say what is waited for.
        tell: takes those lines as events.

    Raises:
        DeadlineError: the deadline passed; the call goes on remotely and its answer is ignored.
        EngineLostError: the actor is gone.
        SteadyhelmError: what the service raised; any other exception of it becomes a FatalError.
    """
    task = asyncio.ensure_future(_result(call))
    started = time.monotonic()
    try:
        while True:
            left = deadline_s - (time.monotonic() - started)
            done, _ = await asyncio.wait({task}, timeout=max(0.0, min(notice_s, left)))
            if done:
                return task.result()
            waited = time.monotonic() - started
            if waited >= deadline_s:
                raise DeadlineError(
                    f"No answer from {of} within its deadline of {deadline_s:g} s: look at what its process does, or "
                    "give it longer by the run file's rollout.deadline_s, runtime.start_deadline_s or "
                    "runtime.step_deadline_s"
                )
            tell(Notice(text=f"waiting for {of} since {waited:.0f} s (deadline {deadline_s:g} s)"))
    except ray_errors.RayActorError as error:
        raise EngineLostError(f"The process of {of} is gone: {first_line(error)}") from error
    except ray_errors.RayTaskError as error:
        if isinstance(error.cause, SteadyhelmError):
            raise error.cause from None
        raise FatalError(f"{of} failed: {type(error.cause).__name__}: {error.cause}\n{error}") from error
    except ray_errors.RayError as error:
        raise FatalError(f"{of} failed: {first_line(error)}") from error
    finally:
        task.cancel()


async def _result(call: Awaitable[T]) -> T:
    return await call
