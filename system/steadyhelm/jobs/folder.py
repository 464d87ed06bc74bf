"""What of a run file's folder goes with a run: the run file and the code beside it, not what was made there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from steadyhelm.errors import ConfigError

LARGEST_BYTES = 50 << 20
"""Bytes of all files together; Ray keeps them in the head's memory."""
MOST_FILES = 5000
MADE = frozenset({"__pycache__", "node_modules", "venv", "build", "dist"})
"""Folders that are made, not written; those whose names begin with a dot are taken for such too."""


def folder_files(folder: Path, leave_out: Iterable[Path] = ()) -> dict[str, bytes]:
    """The files below ``folder`` by their paths in it, with slashes, but hidden ones, caches, and ``leave_out``.

    Raises ConfigError where they are too many or too large, or cannot be read.
    """
    left_out = {path.resolve() for path in leave_out}
    sizes: dict[str, int] = {}
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if name not in MADE and not name.startswith(".") and (here / name).resolve() not in left_out
        )
        for name in sorted(files):
            if name.startswith(".") or name.endswith(".pyc"):
                continue
            path = here / name
            if path.is_file():
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
            if len(sizes) > MOST_FILES or sum(sizes.values()) > LARGEST_BYTES:
                raise _too_much(folder, sizes)
    try:
        return {name: (folder / name).read_bytes() for name in sizes}
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror}), and all of {folder} is sent") from None


def _too_much(folder: Path, sizes: dict[str, int]) -> ConfigError:
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    named = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
    return ConfigError(
        f"{folder} holds more than the {LARGEST_BYTES >> 20} MiB or {MOST_FILES} files that can be sent, the "
        f"largest so far {named}: move the run file and its code into a folder of their own, and data elsewhere"
    )
