"""The batch plane: immutable objects by key, and what is made of them.

``ObjectStore`` is the seam; ``local`` is the store in a folder, ``s3`` the one in a bucket. On it stand the shard
``codec``, the names of a run's objects (``layout``), the commit ``log`` with its ``records`` and ``ledger``,
``folders`` and ``images``, and what keeps a run to itself and small: ``probe``, ``liveness`` and ``retention``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from steadyhelm.config.place import parse_place
from steadyhelm.data.types import ObjectRef
from steadyhelm.errors import ConfigError
from steadyhelm.store.checksum import Data
from steadyhelm.store.local import LocalStore

READERS = 8
"""Objects that ``read_all`` reads at a time."""


class ObjectStore(Protocol):
    """Objects by key. ``store.keys`` says what a key is; no key is a folder of another (``a`` and ``a/b``).

    An object becomes visible as a whole or not at all, and whoever starts to read after ``put`` has returned sees it.
    Objects are immutable by convention: a plain ``put`` over an object puts the same bytes again, or bytes that
    nothing committed refers to. All methods are safe to call from several threads and raise StoreError where the
    store is full, read-only, unreachable or given a bad key.
    """

    @property
    def uri(self) -> str:
        """What ``open_store`` opens this store by, in any process and any working directory."""
        ...

    def put(self, key: str, data: Data, *, if_absent: bool = False) -> ObjectRef:
        """Writes an object; with ``if_absent`` only where there is none: of several such puts exactly one succeeds.

        A put with ``if_absent`` survives a power loss when it returns, a plain one when ``flush`` has named it. Where
        the answer of a server can be lost, one that meets the very bytes that it brings has succeeded: they are its
        own. Raises ObjectExistsError.
        """
        ...

    def flush(self, keys: Iterable[str]) -> None:
        """Returns once those objects survive a power loss. Raises ObjectMissingError."""
        ...

    def get(self, key: str) -> memoryview:
        """The object's bytes, read-only, unverified; they stay valid when it is deleted. Raises ObjectMissingError."""
        ...

    def read(self, ref: ObjectRef) -> memoryview:
        """The object's bytes, verified against ``ref``. Raises ObjectMissingError, CorruptObjectError."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly the bytes ``[start, start + length)``. Raises StoreError where the object ends before."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """The keys that begin with the string ``prefix``, in the order of their UTF-8 bytes."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is an object of that key."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object; without effect where there is none."""
        ...

    def sweep(self, prefix: str, *, dry_run: bool = False) -> tuple[str, ...]:
        """Removes what writers that died in the middle of an object below ``prefix`` have left; returns its keys.

        With ``dry_run`` nothing is removed. What a living writer is at is too young to be taken for left over.
        """
        ...


def open_store(uri: str) -> ObjectStore:
    """The store of ``store.uri``: a folder, relative to the working directory or not, a ``file://`` or ``s3://`` URI.

    Nothing is created, and no server asked, before the first call. Raises ConfigError for any other kind of URI.
    """
    place = parse_place(uri)
    if isinstance(place, Path):
        return LocalStore(place)
    from steadyhelm.store.s3 import S3Store

    return S3Store(place)


class Reader(Protocol):
    """Whoever reads objects and verifies them."""

    def read(self, ref: ObjectRef) -> memoryview:
        """As ``ObjectStore.read``; safe to call from several threads."""
        ...


def read_all(store: Reader, refs: Sequence[ObjectRef]) -> list[memoryview]:
    """The objects' bytes, verified, in the order of ``refs``, read side by side.

    Raises ObjectMissingError, CorruptObjectError.
    """
    with ThreadPoolExecutor(READERS, "steadyhelm-read") as threads:
        return list(threads.map(store.read, refs))


def run_uri(store: ObjectStore, run: str) -> str:
    """The place of a run in a line: the store's URI with the run's name behind its path. ``open_run`` reads it."""
    place, mark, settings = store.uri.partition("?")
    return f"{place}/{run}{mark}{settings}"


def open_run(place: str) -> tuple[ObjectStore, str]:
    """Store and name of the run at ``place``: ``<store>/<run>``, a folder or a URI as ``run_uri`` writes it.

    Raises ConfigError where it does not name a run.
    """
    path, mark, settings = place.partition("?") if "://" in place else (str(Path(place).absolute()), "", "")
    store, _, run = path.rstrip("/").rpartition("/")
    if not run or store.endswith(("/", ":")):
        raise ConfigError(f"{place!r} names no run: give <store>/<run>, like 'runs/digits-transformers'")
    return open_store(store + mark + settings), run


__all__ = ["Data", "LocalStore", "ObjectStore", "Reader", "open_run", "open_store", "read_all", "run_uri"]
