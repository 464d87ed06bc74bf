"""Waiting until every worker of an engine server has read and verified new weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steadyhelm.errors import CorruptObjectError, DeadlineError

CONTROL_S = 60.0
"""Longest time for a call that pauses, resumes or names."""
STAGE_S = 600.0
"""Longest time for the server to read new weights, and to load them."""
POLL_S = 0.01

Answers = Sequence[Mapping[str, str]]
"""One answer of each worker: see ``Staged.answer`` in ``engines/plugin``."""


def worker_answers(found: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The workers' answers with what each must have. Raises KeyError and TypeError where one is built otherwise."""
    return [{name: str(answer[name]) for name in ("state", "digest", "error")} for answer in found]


async def until_staged(first: Answers, look: Callable[[], Awaitable[Answers]], file: Path, digest: str) -> None:
    """Returns once every worker has the file's tensors at hand.

    Args:
        first: the workers' answers when they were told to read.
        look: asks them again.
        file: what they read.
        digest: xxh3-128 of its bytes.

    Raises:
        CorruptObjectError: a worker read other bytes, or could not read them.
        DeadlineError: it takes longer than ``STAGE_S``.
    """
    end = time.monotonic() + STAGE_S
    answers = first
    while any(answer["state"] == "loading" for answer in answers):
        if time.monotonic() > end:
            raise DeadlineError(f"The engine server did not read weights {file.name} within {STAGE_S:g} s.")
        await asyncio.sleep(POLL_S)
        answers = await look()
    for answer in answers:
        if (answer["state"], answer["digest"]) != ("ready", digest):
            raise CorruptObjectError(f"the engine server cannot take weights {file.name}: {answer['error']}")
