"""Batches to come: what they will need is read and prepared while engines still sample.

A cache and nothing more. Objects are kept by their references, checksums included, and what is trained on is what the
committed manifest names: a shard that was dropped or made anew costs the work, and what cannot be read or prepared is
left to whoever needs it, who says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock
from typing import TypeVar

from steadyhelm.data.types import ImageKey, ObjectRef
from steadyhelm.errors import FatalError, SteadyhelmError
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.images import CACHE_BYTES
from steadyhelm.services import Coming
from steadyhelm.store import ObjectStore

Key = TypeVar("Key", ObjectRef, ImageKey)

ROOM_BYTES = 256 << 20
"""Bound on the objects of batches to come that a rank keeps."""
WAIT_S = 600.0
"""How long an image waits for a step unless told otherwise."""
READERS, PREPARERS = 2, 4
"""Objects that are read, and images that are fetched and prepared, at a time: most of it is waiting for the store."""


@dataclass(frozen=True, slots=True)
class _Kept:
    iteration: int
    data: memoryview


class BatchesAhead:
    """A ``Reader`` of the store that has some of its objects already; safe to call from several threads.

    Args:
        store: where shards are.
        encoder: keeps the prepared images.
        gives_way: whether images wait while a batch is trained on, as they should where both would take turns on cores.
        max_bytes: bound on the objects kept; what does not fit is read when it is needed.
        max_image_bytes: bound on the images that are prepared for one batch, below what ``encoder`` keeps.
        wait_s: how long an image waits for a step, which should be as long as a step may take; then it is left.
    """

    def __init__(
        self,
        store: ObjectStore,
        encoder: PromptEncoder,
        *,
        gives_way: bool,
        max_bytes: int = ROOM_BYTES,
        max_image_bytes: int = CACHE_BYTES // 2,
        wait_s: float = WAIT_S,
    ) -> None:
        self._store = store
        self._encoder = encoder
        self._gives_way = gives_way
        self._max_bytes = max_bytes
        self._max_image_bytes = max_image_bytes
        self._wait_s = wait_s
        self._readers = ThreadPoolExecutor(READERS, "read-ahead")
        self._preparers = ThreadPoolExecutor(PREPARERS, "images-ahead")
        self._lock = Lock()
        self._kept: dict[ObjectRef, _Kept] = {}
        self._image_bytes: dict[int, int] = {}
        self._reached: float = 0  # the batch that is, or was last, trained on
        self._idle = Event()  # cleared while images have to wait
        self._idle.set()
        self._asked_bytes, self._found_bytes = 0, 0
        self._failure: BaseException | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the objects kept."""
        with self._lock:
            return self._sum()

    @property
    def share(self) -> float:
        """Share of the bytes read since the last ``training`` began that were there already."""
        return self._found_bytes / max(1, self._asked_bytes)

    def expect(self, coming: Coming) -> tuple[Future[None], ...]:
        """Begins to read and prepare what a batch will need, on threads that are scheduled as the caller's is.

        Without effect once that batch is trained on. Returns the work under way; what it fails with is told by ``read``
        where it is no error of what was to be read.
        """
        iteration = coming.iteration
        with self._lock:
            if self._reached >= iteration:
                return ()
            return (
                *(self._readers.submit(self._guarded, self._fetch, iteration, ref) for ref in coming.objects),
                *(self._preparers.submit(self._guarded, self._prepare, iteration, key) for key in coming.images),
            )

    def read(self, ref: ObjectRef) -> memoryview:
        """The object's bytes, verified, and kept no longer.

        Raises ObjectMissingError, CorruptObjectError; FatalError where the work ahead has met an error of ours.
        """
        if self._failure is not None:
            found = f"{type(self._failure).__name__}: {self._failure}"
            raise FatalError(f"preparing a batch ahead failed, report it: {found}") from self._failure
        with self._lock:
            kept = self._kept.pop(ref, None)
            self._asked_bytes += ref.num_bytes
            self._found_bytes += ref.num_bytes if kept else 0
        return self._store.read(ref) if kept is None else kept.data

    @contextmanager
    def training(self, iteration: int) -> Iterator[None]:
        """While the batch of ``iteration`` is read and trained on: nothing is fetched for it any more.

        What is left of it, or of those before, goes afterwards.
        """
        with self._lock:
            self._reached = iteration
            self._asked_bytes, self._found_bytes = 0, 0
        if self._gives_way:
            self._idle.clear()
        try:
            yield
        finally:
            with self._lock:
                self._kept = {ref: kept for ref, kept in self._kept.items() if kept.iteration > iteration}
                self._image_bytes = {of: size for of, size in self._image_bytes.items() if of > iteration}
            self._idle.set()

    def close(self) -> None:
        """Begins nothing any more."""
        with self._lock:
            self._reached = math.inf
        self._idle.set()
        for threads in (self._readers, self._preparers):
            threads.shutdown(wait=False, cancel_futures=True)

    def _sum(self) -> int:
        return sum(ref.num_bytes for ref in self._kept)

    def _guarded(self, work: Callable[[int, Key], None], iteration: int, key: Key) -> None:
        try:
            work(iteration, key)
        except (SteadyhelmError, MemoryError, OSError):
            pass  # whoever needs it asks again, and says what is wrong
        except Exception as error:  # a thread's only way to tell
            self._failure = error

    def _fetch(self, iteration: int, ref: ObjectRef) -> None:
        with self._lock:
            is_wanted = iteration > self._reached and ref not in self._kept
            if not is_wanted or self._sum() + ref.num_bytes > self._max_bytes:
                return
        data = self._store.read(ref)
        with self._lock:
            if iteration > self._reached:
                self._kept[ref] = _Kept(iteration, data)

    def _prepare(self, iteration: int, image: ImageKey) -> None:
        if iteration > self._reached and not self._idle.wait(self._wait_s):
            return
        with self._lock:
            if iteration <= self._reached or self._image_bytes.get(iteration, 0) >= self._max_image_bytes:
                return
        size = self._encoder.keep((image,))
        with self._lock:
            self._image_bytes[iteration] = self._image_bytes.get(iteration, 0) + size
