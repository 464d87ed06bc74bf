"""Batches to come: their shards are read, and their images prepared, while engines still sample the rest.

A cache and nothing more. Objects are kept by their references, checksums included, and what is trained on is what the
committed manifest names: a shard that was dropped or made anew costs the work, and one that cannot be read is left to
whoever needs it, who says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Event, Lock

from steadyhelm.data.types import ImageKey, ObjectRef, ShardRecord
from steadyhelm.errors import SteadyhelmError
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.images import CACHE_BYTES
from steadyhelm.store import ObjectStore
from steadyhelm.store.codec import decode_rollout

ROOM_BYTES = 256 << 20
"""Bound on the objects of batches to come that a rank keeps."""
FETCHERS = 4
"""Images that are fetched and prepared at a time: most of it is waiting for the store."""


@dataclass(frozen=True, slots=True)
class _Kept:
    iteration: int
    data: memoryview


class ShardsAhead:
    """A ``Reader`` of the store that has some of its objects already; safe to call from several threads.

    Args:
        store: where shards are.
        encoder: keeps the prepared images.
        gives_way: whether images wait while a batch is trained on, as they should where both would take turns on cores.
        max_bytes: bound on the objects kept; what does not fit is read when it is needed.
        max_image_bytes: bound on the images that are prepared for one batch, below what ``encoder`` keeps.
    """

    def __init__(
        self,
        store: ObjectStore,
        encoder: PromptEncoder,
        *,
        gives_way: bool,
        max_bytes: int = ROOM_BYTES,
        max_image_bytes: int = CACHE_BYTES // 2,
    ) -> None:
        self._store = store
        self._encoder = encoder
        self._gives_way = gives_way
        self._max_bytes = max_bytes
        self._max_image_bytes = max_image_bytes
        self._lock = Lock()
        self._kept: dict[ObjectRef, _Kept] = {}
        self._image_bytes: dict[int, int] = {}
        self._reached: float = 0  # the batch that is, or was last, trained on
        self._idle = Event()  # cleared while images have to wait
        self._idle.set()
        self._asked_bytes, self._found_bytes = 0, 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the objects kept."""
        with self._lock:
            return sum(ref.num_bytes for ref in self._kept)

    @property
    def share(self) -> float:
        """Share of the bytes read since the last ``training`` began that were there already."""
        return self._found_bytes / max(1, self._asked_bytes)

    def fetch(self, iteration: int, shard: ShardRecord) -> None:
        """Reads what ``shard`` names and is not there yet, then prepares its images; blocks meanwhile.

        Without effect once the batch of ``iteration`` is trained on.
        """
        for ref in (shard.rollout, shard.reward, shard.reference):
            if ref is None or not self._wants(iteration, ref):
                continue
            with suppress(SteadyhelmError):
                data = self._store.read(ref)
                self._keep(iteration, ref, data)
                if ref == shard.rollout:
                    self._prepare(iteration, data)

    def read(self, ref: ObjectRef) -> memoryview:
        """The object's bytes, verified, and kept no longer. Raises ObjectMissingError, CorruptObjectError."""
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
        """Fetches nothing any more."""
        self._reached = math.inf
        self._idle.set()

    def _wants(self, iteration: int, ref: ObjectRef) -> bool:
        with self._lock:
            size = sum(kept.num_bytes for kept in self._kept) + ref.num_bytes
            return iteration > self._reached and ref not in self._kept and size <= self._max_bytes

    def _keep(self, iteration: int, ref: ObjectRef, data: memoryview) -> None:
        with self._lock:
            if iteration > self._reached:
                self._kept[ref] = _Kept(iteration, data)

    def _prepare(self, iteration: int, rollout: memoryview) -> None:
        """Raises DataError where ``rollout`` is no shard."""
        images = dict.fromkeys(image for row in decode_rollout(rollout) for image in row.prompt.images)
        with ThreadPoolExecutor(FETCHERS, "images-ahead") as threads:
            for _ in threads.map(partial(self._prepare_image, iteration), images):
                pass

    def _prepare_image(self, iteration: int, image: ImageKey) -> None:
        if iteration > self._reached:
            self._idle.wait()  # no longer than the step in progress, which has a deadline
        with self._lock:
            wanted = iteration > self._reached and self._image_bytes.get(iteration, 0) < self._max_image_bytes
        if wanted:
            with suppress(SteadyhelmError):
                size = self._encoder.keep((image,))
                with self._lock:
                    self._image_bytes[iteration] = self._image_bytes.get(iteration, 0) + size
