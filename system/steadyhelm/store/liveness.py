"""Whether another driver is running a run on this machine: an OS lock, which ends with the process that holds it.

The lock only spares a user the waste of two drivers at once. That two drivers cannot both commit is the log's doing.
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
from steadyhelm.store.local import remedy

LOCKS = ".locks"
"""Folder of the lock files under a local store's root; the dot keeps it out of listings."""


@contextlib.contextmanager
def held(store: ObjectStore, run: str, *, take_over: bool = False) -> Iterator[bool]:
    """Holds the run's lock while the body runs; yields whether it is held.

    Args:
        store: only a ``LocalStore`` has locks; with another one nothing happens.
        run: name of the run.
        take_over: go on without the lock where another process holds it; the log then fences that one off.

    Raises:
        FatalError: another process holds the lock and ``take_over`` is False; says its pid and host.
        StoreError: the lock file cannot be made.
    """
    if not isinstance(store, LocalStore):
        yield False
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
