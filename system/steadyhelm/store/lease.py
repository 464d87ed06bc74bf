"""Who drives a run in a store without locks: an object that its owner renews.

No two machines' clocks are compared: a driver that finds a lease waits, on its own clock, whether the lease changes.
The lease only spares a user the waste of two drivers at once and keeps a clean-up away from a living run; that two
drivers cannot both commit is the log's doing.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from steadyhelm.errors import HeldError, ObjectExistsError, ObjectMissingError, StoreError
from steadyhelm.store import ObjectStore
from steadyhelm.store.layout import RunLayout
from steadyhelm.telemetry import EventSink, Notice

RENEW_S = 5.0
"""Seconds between renewals."""
LAPSE_S = 20.0
"""A lease that has not changed for so many seconds has lapsed: its owner is dead, or cannot reach the store."""
POLL_S = 0.5
"""Seconds between two looks at somebody else's lease."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def leased(
    store: ObjectStore,
    run: str,
    *,
    take_over: bool,
    tell: EventSink,
    renew_s: float = RENEW_S,
    lapse_s: float = LAPSE_S,
) -> Iterator[None]:
    """Holds the run's lease while the body runs; a lapsed one is taken.

    Args:
        store: any store.
        run: name of the run.
        take_over: take a lease that somebody else seems to renew.
        tell: takes a notice where it has to wait.
        renew_s: seconds between renewals.
        lapse_s: how long a lease has to stand still before it counts as lapsed.

    Raises HeldError where another driver renews it and ``take_over`` is False.
    """
    lease = _Lease(store, run)
    while not lease.create():
        found = lease.read()
        if found is not None and (take_over or _lapses(lease, found, tell, lapse_s)):
            lease.remove(found)
    stop = threading.Event()
    renewing = threading.Thread(target=lease.renew, args=(stop, renew_s), name="steadyhelm-lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        stop.set()
        renewing.join(renew_s)  # one that hangs in a store without answers leaves a lease that lapses
        with contextlib.suppress(StoreError):
            lease.remove(lease.mine)


def present_lease(store: ObjectStore, run: str) -> dict[str, Any] | None:
    """The run's lease as it stands, None where there is none; one that a driver holds changes every ``RENEW_S``."""
    return _Lease(store, run).read()


class _Lease:
    """One driver's view of the run's lease."""

    def __init__(self, store: ObjectStore, run: str) -> None:
        self._store = store
        self._key = RunLayout(run).lease
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.run = run
        self.mine: dict[str, Any] = {
            "owner": uuid.uuid4().hex,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": since,
            "renewals": 0,
        }

    def create(self) -> bool:
        """Makes the lease ours; False where there is one."""
        try:
            self._store.put(self._key, self._bytes(), if_absent=True)
        except ObjectExistsError:
            return False
        return True

    def read(self) -> dict[str, Any] | None:
        """The lease as it stands, None where there is none."""
        try:
            data = bytes(self._store.get(self._key))
        except ObjectMissingError:
            return None
        try:
            return {"owner": "", "pid": "?", "host": "?", "since": "?", **json.loads(data)}
        except (ValueError, TypeError):
            return {"owner": "", "pid": "?", "host": "?", "since": "?", "damaged": data.hex()}

    def remove(self, found: dict[str, Any]) -> None:
        """Removes the lease where its owner is still that of ``found``."""
        now = self.read()
        if now is not None and now["owner"] == found["owner"]:
            self._store.delete(self._key)

    def renew(self, stop: threading.Event, every_s: float) -> None:
        """Counts the lease up until told to stop, or until it is somebody else's."""
        while not stop.wait(every_s):
            try:
                now = self.read()
                if now is None or now["owner"] != self.mine["owner"]:
                    logger.warning("the lease of run %s is somebody else's now; the log decides who goes on", self.run)
                    return
                self.mine["renewals"] += 1
                self._store.put(self._key, self._bytes())
            except StoreError as error:
                logger.warning("cannot renew the lease of run %s: %s", self.run, error)

    def _bytes(self) -> bytes:
        return json.dumps(self.mine).encode()


def signature(owner: Mapping[str, Any]) -> str:
    """The process in an owner's own words, for messages. Raises KeyError where they are not all there."""
    return f"pid {owner['pid']} on {owner['host']}, since {owner['since']}"


def _lapses(lease: _Lease, found: dict[str, Any], tell: EventSink, lapse_s: float) -> bool:
    """Watches the lease; True where it stands still for ``lapse_s``, False where it is gone. Raises HeldError."""
    holder = signature(found)
    tell(
        Notice(text=f"Run {lease.run} was driven by {holder}: waits up to {lapse_s:.0f} s to see whether it still is.")
    )
    ends = time.monotonic() + lapse_s
    while time.monotonic() < ends:
        time.sleep(min(POLL_S, max(ends - time.monotonic(), 0.0)))
        now = lease.read()
        if now is None:
            return False
        if now != found:
            raise HeldError(
                f"another driver is running run {lease.run!r} ({holder}): wait for it, stop it, or take the run over "
                "with --take-over"
            )
    return True
