"""Folders in the store: a model or a checkpoint as objects, and back."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from steadyhelm.data.types import ObjectRef
from steadyhelm.errors import CorruptObjectError, StoreError
from steadyhelm.store import ObjectStore


def put_folder(store: ObjectStore, prefix: str, path: Path) -> tuple[ObjectRef, ...]:
    """Stores each file under ``path``, subfolders too, as ``<prefix>/<relative path>``, in sorted order.

    Raises StoreError where ``path`` is no folder, is empty or holds something that is neither file nor folder.
    """
    if not path.is_dir():
        raise StoreError(f"cannot store {path} under {prefix!r}: it is not a folder")
    refs = []
    for file in sorted(path.rglob("*")):
        if file.is_dir() and not file.is_symlink():
            continue
        if not file.is_file():
            raise StoreError(f"cannot store {file} under {prefix!r}: it is neither a file nor a folder; remove it")
        refs.append(_put_file(store, f"{prefix}/{file.relative_to(path).as_posix()}", file))
    if not refs:
        raise StoreError(f"cannot store {path} under {prefix!r}: there is no file in it")
    return tuple(refs)


def fetch_folder(store: ObjectStore, refs: Iterable[ObjectRef], prefix: str, path: Path) -> None:
    """Writes the objects of ``refs``, verified, to ``path`` under their names behind ``<prefix>/``.

    Each file appears whole or not at all; files that are there already are replaced, others are left alone.
    Raises CorruptObjectError, ObjectMissingError, and StoreError where ``path`` cannot be written.
    """
    for ref in refs:
        if not ref.key.startswith(prefix + "/"):
            raise CorruptObjectError(f"object {ref.key!r} is not under {prefix!r}: the record names another folder")
        data = store.read(ref)
        target = path / ref.key.removeprefix(prefix + "/")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, staged = tempfile.mkstemp(dir=target.parent, prefix=".fetch-")
            try:
                with os.fdopen(descriptor, "wb", buffering=0) as file:
                    done = 0
                    while done < data.nbytes:
                        done += file.write(data[done:])
                Path(staged).chmod(0o644)
                Path(staged).replace(target)
            except BaseException:
                Path(staged).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StoreError(
                f"cannot write {target} from {ref.key!r}: {error.strerror}; free space or choose another folder"
            ) from error


def _put_file(store: ObjectStore, key: str, file: Path) -> ObjectRef:
    """Puts a file's bytes from a mapping, so that a model of many gigabytes needs no memory of its own."""
    with file.open("rb") as source:
        if os.fstat(source.fileno()).st_size == 0:
            return store.put(key, b"")
        mapped = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
        return store.put(key, memoryview(mapped))
