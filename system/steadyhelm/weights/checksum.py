"""One checksum over a whole set of named tensors, which several processes can work out together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import xxhash
from numpy.typing import NDArray

from steadyhelm.data.types import WeightsRecord
from steadyhelm.errors import CorruptObjectError
from steadyhelm.weights.layout import Layout, flat_words

DIGEST_BYTES = 16

T = TypeVar("T")
R = TypeVar("R")


def set_checksum(tensors: Mapping[str, torch.Tensor], threads: int = 1) -> str:
    """xxh3-128 in hex over names, types, shapes and the digests of all blocks (``layout``) of ``tensors``.

    Proof against corruption and mix-ups; it is not a signature.
    """
    layout = Layout.of(tensors)
    flat = {name: flat_words(tensor) for name, tensor in tensors.items()}
    return combined(layout, b"".join(in_threads(lambda block: digest(block.views(flat)), layout.blocks, threads)))


def combined(layout: Layout, digests: bytes) -> str:
    """The set's checksum from its blocks' digests, one behind the other."""
    assert len(digests) == DIGEST_BYTES * len(layout.blocks)
    return xxhash.xxh3_128_hexdigest(layout.checksum.encode() + digests)


def require_checksum(found: str, record: WeightsRecord) -> None:
    """Raises CorruptObjectError where ``found`` is not the checksum of ``record``."""
    if found != record.checksum:
        raise CorruptObjectError(
            f"weights {record.version} have checksum {found}, but their record says {record.checksum}: take another "
            "version"
        )


def digest(views: Iterable[NDArray[Any]]) -> bytes:
    """xxh3-128 over the bytes of arrays, one behind the other."""
    found = xxhash.xxh3_128()
    for view in views:
        found.update(view.data)
    return found.digest()


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """``work`` of each item, in order, by so many threads; with 1 in the caller's."""
    if threads == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        return list(pool.map(work, items))
