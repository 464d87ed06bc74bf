"""Where files lie that only this machine's processes read, and that should not wait for a disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

SHARED = Path("/dev/shm")  # noqa: S108 - the kernel's shared memory
"""The folder whose files are memory."""


def memory_folder(num_bytes: int) -> Path:
    """A folder for files of ``num_bytes`` in all: in memory where there is room twice over, else on disk."""
    if os.access(SHARED, os.W_OK) and shutil.disk_usage(SHARED).free > 2 * num_bytes:
        return SHARED
    return Path(tempfile.gettempdir())
