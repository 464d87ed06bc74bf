"""The object store in a folder: one file per object.

A put writes a file under ``.staging``, on the same file system, and then gives it its name: ``link`` for a conditional
create, which fails where the name is taken, ``rename`` otherwise. A process that dies in between leaves a staged file,
which no listing shows and which the next ``LocalStore`` of that folder removes once it is old.

Durability. A process crash loses nothing that was put. For a power loss the order matters: the commit log's entries
are conditional creates, so those are fsynced before they get their name and their folder is after; data objects are
fsynced when ``flush`` names them, which the log does before it commits an entry that refers to them. So a log that
ends early is possible, a torn entry or an entry that names unwritten data is not. On ext4 an entry takes 0.4 ms
instead of 0.05; an fsync in every put would take 1 MiB shards from 2.4 to 2.9 ms and 16 MiB objects from 3 to 43 ms.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from steadyhelm.data.types import ObjectRef
from steadyhelm.errors import ObjectExistsError, ObjectMissingError, StoreError
from steadyhelm.store.checksum import Data, byte_views, make_ref, verify
from steadyhelm.store.keys import check_key, check_prefix

STAGING = ".staging"
STALE_S = 3600.0
"""Age at which a staged file counts as left over. A writer that slept longer than that stages its bytes again."""
MMAP_BYTES = 4 << 20
"""Size from which ``get`` maps the file instead of reading it: at 64 KiB reading takes half of the time of mapping, at
16 MiB mapping takes half of the time of reading, at 128 MiB a sixteenth."""
MAX_PARTS = 512
"""Buffers in one vectored write: below IOV_MAX (1024) everywhere."""
ATTEMPTS = 5
"""How often a put makes its folder and its staged file anew when others remove them under its hands."""

_serial = itertools.count()
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or point store.uri to another disk, then resume the run",
    errno.EDQUOT: "the disk quota is used up: free some space or raise it, then resume the run",
    errno.EFBIG: "the file is larger than the process may write: raise the limit (ulimit -f), then resume the run",
    errno.EROFS: "the file system is read-only: mount it writable or point store.uri elsewhere",
    errno.EACCES: "permission is denied: let this user write there or point store.uri elsewhere",
    errno.EPERM: "the operation is not permitted (hard links are needed): point store.uri to another file system",
    errno.EOPNOTSUPP: "the file system has no hard links: point store.uri to another file system",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another key or store.uri",
    errno.EISDIR: "the key is a folder of other objects: choose another key",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter store.uri",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
}
_REASONS = {errno.ENOSPC: "DiskFull", errno.EDQUOT: "DiskFull"} | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), "StoreRefused"
)


class LocalStore:
    """Objects as files under ``root``, for the processes of one machine or of machines that share the folder.

    Example: ``LocalStore(Path("runs")).put("digits/run.json", b"{}", if_absent=True)``
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._staging = self.root / STAGING
        self._host = socket.gethostname()
        self._clean()

    @property
    def uri(self) -> str:
        """The folder as a ``file://`` URI."""
        return self.root.as_uri()

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path]]:
        return LocalStore, (self.root,)

    def put(self, key: str, data: Data, *, if_absent: bool = False) -> ObjectRef:
        """Writes an object, with ``if_absent`` only where there is none. Raises ObjectExistsError, StoreError."""
        path = self._path(key)
        views = byte_views(data)
        ref = make_ref(key, views)
        if if_absent and os.path.lexists(path):
            raise self._exists(key, path)
        with self._reported("write", key):
            staged = self._stage(views, durable=if_absent)
            try:
                for attempt in itertools.count(1):
                    try:
                        self._name(staged, path, if_absent=if_absent)
                        break
                    except FileNotFoundError:
                        if attempt == ATTEMPTS:
                            raise
                        path.parent.mkdir(parents=True, exist_ok=True)
                        if not staged.exists():
                            staged = self._stage(views, durable=if_absent)
            except FileExistsError as error:
                raise self._exists(key, path) from error
            finally:
                staged.unlink(missing_ok=True)
            if if_absent:
                _fsync(path.parent)
        return ref

    def flush(self, keys: Iterable[str]) -> None:
        """Returns once those objects survive a power loss. Raises ObjectMissingError, StoreError."""
        folders = set()
        for key in keys:
            path = self._path(key)
            with self._reported("flush", key):
                _fsync(path)
            folders.add(path.parent)
        for folder in sorted(folders):
            with self._reported("flush", str(folder.relative_to(self.root))):
                _fsync(folder)

    def get(self, key: str) -> memoryview:
        """The object's bytes, read-only: a private mapping of the file where it is large. Raises ObjectMissingError."""
        with self._reported("read", key):
            descriptor = os.open(self._path(key), os.O_RDONLY)
            try:
                size = os.fstat(descriptor).st_size
                if size >= MMAP_BYTES:
                    return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ))
                return memoryview(_pread(descriptor, 0, size))
            finally:
                os.close(descriptor)

    def read(self, ref: ObjectRef) -> memoryview:
        """The object's bytes, verified. Raises ObjectMissingError, CorruptObjectError."""
        return verify(self.get(ref.key), ref, self.uri)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly the bytes ``[start, start + length)``. Raises ObjectMissingError, StoreError."""
        with self._reported("read", key):
            descriptor = os.open(self._path(key), os.O_RDONLY)
            try:
                size = os.fstat(descriptor).st_size
                check_range(key, start, length, size)
                return _pread(descriptor, start, length)
            finally:
                os.close(descriptor)

    def list(self, prefix: str) -> Iterator[str]:
        """The keys that begin with the string ``prefix``, in the order of their UTF-8 bytes."""
        folder, slash, _ = check_prefix(prefix).rpartition("/")
        yield from self._walk(self.root / folder, folder + slash, prefix)

    def exists(self, key: str) -> bool:
        """Whether there is an object of that key."""
        with self._reported("look up", key):
            return self._path(key).is_file()

    def delete(self, key: str) -> None:
        """Removes the object and the folders that it leaves empty; without effect where there is none."""
        path = self._path(key)
        with self._reported("delete", key):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return
        for folder in path.parents:
            if folder == self.root:
                return
            try:
                folder.rmdir()
            except OSError:  # not empty: the usual case
                return

    def sweep(self, prefix: str, *, dry_run: bool = False) -> tuple[str, ...]:
        """Nothing: staged files that were left behind went when this store was opened."""
        return ()

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _stage(self, views: Sequence[memoryview], *, durable: bool) -> Path:
        """Writes the bytes to a file that no other writer, thread or machine uses."""
        staged = self._staging / f"{self._host}-{os.getpid()}-{next(_serial)}-{time.time_ns():x}"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            descriptor = os.open(staged, flags, 0o644)
        except FileNotFoundError:
            self._staging.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(staged, flags, 0o644)
        try:
            _write(descriptor, views)
            if durable:
                os.fsync(descriptor)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return staged

    def _name(self, staged: Path, path: Path, *, if_absent: bool) -> None:
        if if_absent:
            os.link(staged, path)
        else:
            staged.replace(path)

    def _exists(self, key: str, path: Path) -> StoreError:
        if path.is_dir():
            return StoreError(f"cannot write {key!r} in {self.uri}: {_REMEDIES[errno.EISDIR]}")
        return ObjectExistsError(f"object {key!r} exists already in {self.uri}: another writer was first")

    def _walk(self, folder: Path, base: str, prefix: str) -> Iterator[str]:
        """Keys under ``folder``, whose own key is ``base``; a folder sorts as its name with a slash behind."""
        try:
            with os.scandir(folder) as entries:
                found = [entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise self._error("list", base, error) from error
        for name in sorted(found, key=lambda name: name.encode("utf-8", "surrogateescape")):
            key = base + name
            if not base and name.startswith("."):
                continue
            if name.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(folder / name, key, prefix)
            elif key.startswith(prefix):
                yield key

    def _clean(self) -> None:
        """Removes staged files of writers that are long gone; whoever may not is no writer."""
        oldest = time.time() - STALE_S
        with contextlib.suppress(OSError), os.scandir(self._staging) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.stat().st_mtime < oldest:
                        Path(entry.path).unlink()

    @contextlib.contextmanager
    def _reported(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._error(verb, key, error) from error

    def _error(self, verb: str, key: str, error: OSError) -> StoreError:
        absent = isinstance(error, FileNotFoundError) or (isinstance(error, NotADirectoryError) and verb != "write")
        if isinstance(error, IsADirectoryError) and verb == "read":
            absent = True
        if absent and verb != "write":
            return ObjectMissingError(
                f"there is no object {key!r} in {self.uri}: it was never put, or a clean-up removed it"
            )
        code = errno.EISDIR if isinstance(error, IsADirectoryError) else error.errno or 0
        if isinstance(error, FileExistsError):
            code = errno.ENOTDIR  # mkdir met an object where a folder should be
        return StoreError(f"cannot {verb} {key!r} in {self.uri}: {remedy(error, code)}", _REASONS.get(code, ""))


def remedy(error: OSError, code: int = 0) -> str:
    """What ``error`` (counted as ``code`` where that is given) means and what to do about it, to end a message with."""
    words = f"{error.strerror or error}: check the disk, then resume the run"
    return _REMEDIES.get(code or error.errno or 0, words)


def check_range(key: str, start: int, length: int, size: int) -> None:
    """Raises StoreError unless ``[start, start + length)`` lies within an object of ``size`` bytes."""
    if start < 0 or length < 0 or start + length > size:
        raise StoreError(f"cannot read {length} bytes from {start} on of {key!r}: it has {size} bytes")


def _write(descriptor: int, views: Sequence[memoryview]) -> None:
    """Writes all of ``views``, in as few system calls as the system allows."""
    todo = [view for view in views if view.nbytes]
    while todo:
        written = os.writev(descriptor, todo[:MAX_PARTS])
        done = 0
        while done < len(todo) and written >= todo[done].nbytes:
            written -= todo[done].nbytes
            done += 1
        todo = todo[done:]
        if written:
            todo[0] = todo[0][written:]


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """``length`` bytes from ``start`` on; fewer where the file ends before."""
    data = os.pread(descriptor, length, start)
    if len(data) == length:
        return data
    parts = [data]
    while data:
        start += len(data)
        length -= len(data)
        data = os.pread(descriptor, length, start)
        parts.append(data)
    return b"".join(parts)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
