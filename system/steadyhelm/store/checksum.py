"""The bytes of an object: their parts, their checksum, and whether they are the ones that a reference means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import xxhash

from steadyhelm.data.types import ObjectRef
from steadyhelm.errors import CorruptObjectError

Data: TypeAlias = bytes | bytearray | memoryview | Sequence[bytes | bytearray | memoryview]
"""What can be put: one contiguous buffer, or several that are written one behind the other without a copy."""


def byte_views(data: Data) -> list[memoryview]:
    """The non-empty parts of ``data`` as flat views of bytes. Raises TypeError where a part is not contiguous."""
    parts = [data] if isinstance(data, bytes | bytearray | memoryview) else data
    views = (memoryview(part) for part in parts)
    return [view.cast("B") for view in views if view.nbytes]


def make_ref(key: str, views: Sequence[memoryview]) -> ObjectRef:
    """The reference of an object that consists of ``views``: its size in bytes and its xxh3-128 in hex."""
    digest = xxhash.xxh3_128()
    for view in views:
        digest.update(view)
    return ObjectRef(key=key, num_bytes=sum(view.nbytes for view in views), xxh3=digest.hexdigest())


def verify(data: memoryview, ref: ObjectRef, store: str) -> memoryview:
    """``data`` itself where it has the size and the checksum of ``ref``; CorruptObjectError otherwise."""
    if data.nbytes != ref.num_bytes:
        found = f"{data.nbytes} bytes instead of {ref.num_bytes}"
    else:
        checksum = xxhash.xxh3_128_hexdigest(data)
        if checksum == ref.xxh3:
            return data
        found = f"checksum {checksum} instead of {ref.xxh3}"
    raise CorruptObjectError(
        f"object {ref.key!r} in {store} has {found}: it was damaged after it was written; a resume goes "
        "on without checkpoints and weights that are damaged, anything else has to come back from a copy"
    )
