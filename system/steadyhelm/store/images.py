"""Images in the store: each once, under the SHA-256 of its encoded bytes."""

from __future__ import annotations

import hashlib

from steadyhelm.data.types import ImageKey
from steadyhelm.errors import CorruptObjectError, ObjectMissingError
from steadyhelm.store import ObjectStore
from steadyhelm.store.layout import IMAGES, image_key


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


def get_image(store: ObjectStore, key: ImageKey) -> bytes:
    """The encoded bytes of an image, verified. Raises ObjectMissingError, CorruptObjectError."""
    data = bytes(store.get(key))
    if key != image_key(hashlib.sha256(data).hexdigest()):
        raise CorruptObjectError(
            f"image {key!r} in {store.uri} does not match its SHA-256: delete it under {IMAGES}/ and resume the run, "
            "which puts it again from the data set"
        )
    return data
