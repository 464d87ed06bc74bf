"""Images in the store: each once, under the SHA-256 of its encoded bytes."""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from steadyhelm.config.place import IMAGES
from steadyhelm.data.types import ImageKey
from steadyhelm.errors import CorruptObjectError, ObjectMissingError
from steadyhelm.store import ObjectStore
from steadyhelm.store.layout import image_key

WRITERS = 16
"""Images that are put at a time."""
MAX_PENDING = 256
"""Images that wait for that; a data set is read no further ahead."""


def put_image(store: ObjectStore, data: bytes) -> ImageKey:
    """Stores an image unless the store has it, and returns its key.

    A stored image that does not match its name any more is put again: its right bytes are at hand.
    """
    key = image_key(hashlib.sha256(data).hexdigest())
    try:
        if store.get(key) == data:
            return key
    except ObjectMissingError:
        pass
    store.put(key, data)
    return key


@contextlib.contextmanager
def putting_images(store: ObjectStore) -> Iterator[Callable[[bytes], ImageKey]]:
    """Yields ``put_image`` for many images: it answers at once, and they are all in the store when the body is left.

    Raises StoreError, in the body or behind it.
    """
    with ThreadPoolExecutor(WRITERS, "steadyhelm-images") as threads:
        pending: deque[Future[ImageKey]] = deque()

        def put(data: bytes) -> ImageKey:
            if len(pending) == MAX_PENDING:
                pending.popleft().result()
            pending.append(threads.submit(put_image, store, data))
            return image_key(hashlib.sha256(data).hexdigest())

        yield put
        for future in pending:
            future.result()


def get_image(store: ObjectStore, key: ImageKey) -> bytes:
    """The encoded bytes of an image, verified. Raises ObjectMissingError, CorruptObjectError."""
    data = bytes(store.get(key))
    if key != image_key(hashlib.sha256(data).hexdigest()):
        raise CorruptObjectError(
            f"image {key!r} in {store.uri} does not match its SHA-256: delete it under {IMAGES}/ and resume the run, "
            "which puts it again from the data set"
        )
    return data
