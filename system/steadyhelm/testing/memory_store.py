"""An object store in memory, with faults to inject."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from steadyhelm.data.types import ObjectRef
from steadyhelm.errors import ObjectExistsError, ObjectMissingError, StoreError
from steadyhelm.store.checksum import Data, byte_views, make_ref, verify
from steadyhelm.store.keys import check_key, check_prefix
from steadyhelm.store.local import check_range

_serial = itertools.count()


class InjectedCrash(BaseException):
    """What a fault raises by default. Like a killed process, it passes every ``except Exception``."""


@dataclass(slots=True, kw_only=True)
class Fault:
    """One failure to come: at the ``nth`` put from now whose key matches ``pattern``, before or after its effect."""

    pattern: str
    nth: int
    when: Literal["before", "after"]
    error: BaseException


Faults: TypeAlias = list[Fault]
Keys: TypeAlias = list[str]


class MemoryStore:
    """An ObjectStore for tests: a dictionary under a lock.

    ``puts`` lists the keys of all successful puts in order, so that a test can enumerate the points to crash at.
    ``capacity_bytes`` is the size of its disk, None for an endless one.

    Example::

        store = MemoryStore()
        store.fail("digits/log/*", nth=3, when="after")  # the third log entry is written, its answer is lost
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.puts: Keys = []
        self.uri = f"memory://{next(_serial)}"
        self._objects: dict[str, bytes] = {}
        self._faults: Faults = []
        self._lock = threading.RLock()

    def fail(
        self,
        pattern: str,
        *,
        nth: int = 1,
        when: Literal["before", "after"] = "before",
        error: BaseException | None = None,
    ) -> None:
        """Makes the ``nth`` put from now of a key like ``pattern`` (fnmatch) raise ``error``, once.

        ``before``: nothing is stored. ``after``: the object is stored and only the answer is lost.
        """
        what = InjectedCrash(f"injected crash {when} put {nth} of {pattern}") if error is None else error
        self._faults.append(Fault(pattern=pattern, nth=nth, when=when, error=what))

    def damage(self, key: str, *, keep_bytes: int | None = None, flip_bit: int | None = None) -> None:
        """Truncates the object to ``keep_bytes``, or flips its bit number ``flip_bit``."""
        with self._lock:
            data = bytearray(self._objects[key])
            if flip_bit is not None:
                data[flip_bit // 8] ^= 1 << flip_bit % 8
            self._objects[key] = bytes(data[:keep_bytes])

    def copy(self) -> MemoryStore:
        """A store with the same objects and no faults: what a process that starts after a crash finds."""
        other = MemoryStore(self.capacity_bytes)
        with self._lock:
            other._objects = dict(self._objects)
        return other

    def put(self, key: str, data: Data, *, if_absent: bool = False) -> ObjectRef:
        """Writes an object, with ``if_absent`` only where there is none. Raises ObjectExistsError, StoreError."""
        check_key(key)
        views = byte_views(data)
        ref = make_ref(key, views)
        with self._lock:
            due = self._due(key)
            for fault in due:
                if fault.when == "before":
                    raise fault.error
            self._refuse(key, ref.num_bytes, if_absent=if_absent)
            self._objects[key] = b"".join(views)
            self.puts.append(key)
            for fault in due:
                raise fault.error
        return ref

    def flush(self, keys: Iterable[str]) -> None:
        """Checks that the objects exist. Raises ObjectMissingError."""
        for key in keys:
            self.get(key)

    def get(self, key: str) -> memoryview:
        """The object's bytes, read-only. Raises ObjectMissingError."""
        with self._lock:
            data = self._objects.get(check_key(key))
        if data is None:
            raise ObjectMissingError(f"there is no object {key!r} in {self.uri}: it was never put")
        return memoryview(data)

    def read(self, ref: ObjectRef) -> memoryview:
        """The object's bytes, verified. Raises ObjectMissingError, CorruptObjectError."""
        return verify(self.get(ref.key), ref, self.uri)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly the bytes ``[start, start + length)``. Raises ObjectMissingError, StoreError."""
        data = self.get(key)
        check_range(key, start, length, data.nbytes)
        return bytes(data[start : start + length])

    def list(self, prefix: str) -> Iterator[str]:
        """The keys that begin with ``prefix``, in the order of their UTF-8 bytes."""
        check_prefix(prefix)
        with self._lock:
            keys = [key for key in self._objects if key.startswith(prefix)]
        yield from sorted(keys, key=str.encode)

    def exists(self, key: str) -> bool:
        """Whether there is an object of that key."""
        with self._lock:
            return check_key(key) in self._objects

    def delete(self, key: str) -> None:
        """Removes the object; without effect where there is none."""
        with self._lock:
            self._objects.pop(check_key(key), None)

    def sweep(self, prefix: str, *, dry_run: bool = False) -> tuple[str, ...]:
        """Nothing: a put here is whole or not at all."""
        return ()

    def _due(self, key: str) -> Faults:
        due: Faults = []
        for fault in self._faults[:]:
            if fnmatchcase(key, fault.pattern):
                fault.nth -= 1
                if fault.nth == 0:
                    self._faults.remove(fault)
                    due.append(fault)
        return due

    def _refuse(self, key: str, size: int, *, if_absent: bool) -> None:
        if if_absent and key in self._objects:
            raise ObjectExistsError(f"object {key!r} exists already in {self.uri}: another writer was first")
        parents = key.split("/")[:-1]
        above = any("/".join(parents[: depth + 1]) in self._objects for depth in range(len(parents)))
        if above or any(other.startswith(key + "/") for other in self._objects):
            raise StoreError(f"cannot write {key!r} in {self.uri}: a key is a folder of another; choose another key")
        others = sum(len(data) for other, data in self._objects.items() if other != key)
        if self.capacity_bytes is not None and others + size > self.capacity_bytes:
            raise StoreError(f"cannot write {key!r} in {self.uri}: the disk is full: free some space, then resume")
