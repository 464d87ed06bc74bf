"""Whether another driver is running a run: by an OS lock in a folder, by a lease in other stores.

The lock ends with the process that holds it. It only spares a user the waste of two drivers at once: that two drivers
cannot both commit is the log's doing.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from steadyhelm.errors import HeldError, StoreError
from steadyhelm.store import LocalStore, ObjectStore
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.lease import LAPSE_S, leased, present_lease, signature
from steadyhelm.store.local import remedy
from steadyhelm.telemetry import EventSink

LOCKS = ".locks"
"""Folder of the lock files under a local store's root; the dot keeps it out of listings."""
LOOKS, LOOK_S = 20, 0.05
"""How often, and after how many seconds, a lock that is held is tried again: somebody who looks whether the run is
driven holds it for a moment."""


@contextlib.contextmanager
def held(store: ObjectStore, run: str, *, take_over: bool = False, tell: EventSink = lambda _: None) -> Iterator[bool]:
    """Holds the run's lock, or its lease, while the body runs; yields whether it is held.

    Args:
        store: a ``LocalStore`` has locks; in any other one there is a lease.
        run: name of the run.
        take_over: go on without the lock where another process holds it; the log then fences that one off.
        tell: takes a notice where it has to wait whether the owner of a lease still renews it.

    Raises:
        HeldError: another process holds it and ``take_over`` is False; says its pid and host.
        StoreError: the lock file cannot be made.
    """
    if not isinstance(store, LocalStore):
        with leased(store, run, take_over=take_over, tell=tell):
            yield True
        return
    path = store.root / LOCKS / f"{RunLayout(run).run}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(f"cannot make the lock {path}: {remedy(error)}") from error
    try:
        locked = _lock(descriptor, str(path))
        if locked:
            _sign(descriptor, str(path))
        elif not take_over:
            raise HeldError(
                f"another driver is running run {run!r} in {store.uri} ({_signature(descriptor)}): wait for it, stop "
                "it, or take the run over with --take-over"
            )
        yield locked
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """Whether a driver is at a run, None where that cannot be said yet, and who it is or was.

    Example: ``Pulse(alive=True, holder="pid 71 on node-3, since 2026-03-01T12:00:00+00:00")``
    """

    alive: bool | None
    holder: str = ""


class DriverWatch:
    """Looks, from anywhere, whether a driver is at ``run``; ``clock`` counts seconds.

    A lock says so at once. A lease does where it changes between two looks, or stays the same for ``lease.LAPSE_S``.
    """

    def __init__(self, store: ObjectStore, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._run, self._clock = store, run, clock
        self._lease: dict[str, object] | None = None
        self._since = clock()
        self._changed = False

    def look(self) -> Pulse:
        """The run's driver as it seems now. Raises StoreError."""
        return self._locked(self._store) if isinstance(self._store, LocalStore) else self._leased()

    def _locked(self, store: LocalStore) -> Pulse:
        try:
            descriptor = os.open(store.root / LOCKS / f"{RunLayout(self._run).run}.lock", os.O_RDONLY)
        except FileNotFoundError:
            return Pulse(alive=False)
        except OSError:
            return Pulse(alive=None)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Pulse(alive=True, holder=_signature(descriptor))
        except OSError:
            return Pulse(alive=None)
        else:
            return Pulse(alive=False, holder=_signature(descriptor))
        finally:
            os.close(descriptor)

    def _leased(self) -> Pulse:
        found, now = present_lease(self._store, self._run), self._clock()
        if found is None:
            return Pulse(alive=False)
        holder = signature(found)
        if found != self._lease:
            self._changed = self._lease is not None
            self._lease, self._since = found, now
        if now - self._since >= LAPSE_S:
            return Pulse(alive=False, holder=holder)
        return Pulse(alive=True if self._changed else None, holder=holder)


def _lock(descriptor: int, place: str) -> bool:
    for left in reversed(range(LOOKS)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if left:
                time.sleep(LOOK_S)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                return False
            raise StoreError(
                f"cannot lock {place}: {error.strerror}; start with --take-over to go on without"
            ) from error
    return False


def _sign(descriptor: int, place: str) -> None:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
    except OSError as error:
        raise StoreError(f"cannot write the lock {place}: {remedy(error)}") from error


def _signature(descriptor: int) -> str:
    try:
        return signature(json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, KeyError, TypeError):
        return "a process that is just starting"
