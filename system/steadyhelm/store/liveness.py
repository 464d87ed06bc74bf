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
from collections.abc import Iterator

from steadyhelm.errors import FatalError, StoreError
from steadyhelm.store import LocalStore, ObjectStore
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.lease import leased
from steadyhelm.store.local import remedy
from steadyhelm.telemetry import EventSink

LOCKS = ".locks"
"""Folder of the lock files under a local store's root; the dot keeps it out of listings."""


@contextlib.contextmanager
def held(store: ObjectStore, run: str, *, take_over: bool = False, tell: EventSink = lambda _: None) -> Iterator[bool]:
    """Holds the run's lock, or its lease, while the body runs; yields whether it is held.

    Args:
        store: a ``LocalStore`` has locks; in any other one there is a lease.
        run: name of the run.
        take_over: go on without the lock where another process holds it; the log then fences that one off.
        tell: takes a notice where it has to wait whether the owner of a lease still renews it.

    Raises:
        FatalError: another process holds it and ``take_over`` is False; says its pid and host.
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
            raise FatalError(
                f"another driver is running run {run!r} in {store.uri} ({_signature(descriptor)}): wait for it, stop "
                "it, or take the run over with --take-over"
            )
        yield locked
    finally:
        os.close(descriptor)


def _lock(descriptor: int, place: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
            return False
        raise StoreError(f"cannot lock {place}: {error.strerror}; start with --take-over to go on without") from error
    return True


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
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that is just starting"
