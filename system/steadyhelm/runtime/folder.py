"""The folder of a Ray session, which does not outlive its driver for long.

A driver holds a lock on a file in it. The kernel lets the lock go when the process ends, however it ends, so the next
driver on the machine knows which folders nobody needs any more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "steadyhelm-ray-"
LOCK = "driver.lock"


@contextmanager
def session_folder() -> Iterator[str]:
    """A new folder under the system's one for temporary files; gone when the context ends.

    Removes those of drivers that were killed. Raises OSError where no folder can be made.
    """
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        _remove_unlocked(lock)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    descriptor = os.open(folder / f".{LOCK}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        (folder / f".{LOCK}").rename(folder / LOCK)  # only now others may try to lock it
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _remove_unlocked(lock: Path) -> None:
    """Removes the folder of ``lock`` unless a living driver holds it, or it is somebody else's."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.parent, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
