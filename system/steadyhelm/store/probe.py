"""Whether a store's conditional create holds, found out by a short race.

The commit log rests on it alone: of several writers who create the same object exactly one may succeed. Servers that
offer ``If-None-Match`` do not all keep it: some ignore it, some let several writers win when they come at the same
moment. A run has several writers always, since any driver can be taken over, so such a store is refused.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from steadyhelm.errors import ObjectExistsError, StoreError
from steadyhelm.store import LocalStore, ObjectStore
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.s3.requests import ONE_WINNER

WRITERS = 8
ROUNDS = 20
"""Races of a probe: a server that lets several win in half of them passes with a probability of 1e-6."""
NUM_BYTES = 256 << 10
"""Of an object: the server has to be at one while the next ones arrive. With a few bytes each, versitygw by its
defaults lets several win in one race of ten, with so many in one of two."""


def require_one_winner(store: ObjectStore, run: str, *, rounds: int = ROUNDS) -> None:
    """Has ``WRITERS`` threads create the same object, ``rounds`` times; a folder's links need no such test.

    Raises StoreError where not exactly one of them succeeds, or where the object is not the winner's.
    """
    if isinstance(store, LocalStore):
        return
    prefix = f"{RunLayout(run).probe_prefix}{uuid.uuid4().hex}/"
    tried = []
    with ThreadPoolExecutor(WRITERS, "steadyhelm-probe") as threads:
        try:
            for number in range(rounds):
                key = f"{prefix}{number}"
                tried.append(key)
                create = partial(_create, store, key, threading.Barrier(WRITERS))
                winners = [writer for writer, won in enumerate(threads.map(create, range(WRITERS))) if won]
                if len(winners) != 1 or bytes(store.get(key)) != _bytes(winners[0]):
                    raise StoreError(
                        f"in {store.uri} {len(winners)} of {WRITERS} writers created the same object, where one may: "
                        "its conditional create (If-None-Match) does not hold, and two drivers could both commit; "
                        f"use {ONE_WINNER}"
                    )
        finally:
            with contextlib.suppress(StoreError):  # what is left goes with 'steadyhelm gc'
                list(threads.map(store.delete, tried))


def _create(store: ObjectStore, key: str, start: threading.Barrier, writer: int) -> bool:
    start.wait()
    try:
        store.put(key, _bytes(writer), if_absent=True)
    except ObjectExistsError:
        return False
    return True


def _bytes(writer: int) -> bytes:
    return f"writer {writer}\n".encode().ljust(NUM_BYTES, b".")
