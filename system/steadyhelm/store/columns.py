"""The container of a shard: named columns of numbers behind a JSON header, read without a copy.

::

    8 bytes   magic, the last of them the format's version
    8 bytes   length of the header in bytes, little-endian
    header    JSON: {"kind": …, "facts": {…}, "columns": [[name, dtype, elements], …]}
    columns   little-endian, one behind the other, each at the next multiple of 8

The object's reference (xxh3-128) finds damaged bits; the container finds what is truncated, of another kind or garbage.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from steadyhelm.errors import CorruptObjectError

MAGIC = b"STHELM\x00\x01"
_PREFIX = struct.Struct("<8sQ")
_ALIGN = 8
_DTYPES = {name: np.dtype(name) for name in ("<u1", "<u2", "<i4", "<i8", "<f4")}
_DTYPES["<u1"] = np.dtype("u1")
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NARROW = tuple((name, np.iinfo(_DTYPES[name]).min, np.iinfo(_DTYPES[name]).max) for name in ("<u1", "<u2", "<i4"))

Array = NDArray[Any]


JOIN_BYTES = 4096
"""Pieces shorter than that on average are joined: below, a part of its own in the write costs more than the copy;
above, fresh memory for the copy costs more (measured: a shard of 2.6 MB takes 2.4 ms to encode and put, 4 to 7 joined).
"""


class Pieces(NamedTuple):
    """A column in pieces that lie apart in memory: ``dtype`` of the column, and the pieces in order."""

    dtype: np.dtype[Any]
    pieces: Sequence[bytes] | Sequence[Array]


Column = Array | Pieces


def pack(kind: str, facts: Mapping[str, Any], columns: Mapping[str, Column]) -> list[memoryview]:
    """The parts of a container: views of the columns' memory; only many small pieces are copied together.

    Args:
        kind: what the container holds; ``unpack`` wants the same.
        facts: what else belongs in the header, as JSON.
        columns: one-dimensional contiguous arrays, whole or in pieces, of uint8, uint16, int32, int64 or float32.
    """
    described = []
    bodies: list[list[memoryview]] = []
    for name, column in columns.items():
        pieces: Sequence[bytes] | Sequence[Array] = [column] if isinstance(column, np.ndarray) else column.pieces
        body = [memoryview(cast(bytes, piece)).cast("B") for piece in pieces if len(piece)]
        size = sum(part.nbytes for part in body)
        if len(body) > 1 and size < JOIN_BYTES * len(body):
            body = [memoryview(b"".join(body))]
        described.append([name, _NAMES[column.dtype], size // column.dtype.itemsize])
        bodies.append(body)
    header = json.dumps({"kind": kind, "facts": facts, "columns": described}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGN)
    parts = [memoryview(_PREFIX.pack(MAGIC, len(header)) + header)]
    for body in bodies:
        parts += body
        if gap := -sum(part.nbytes for part in body) % _ALIGN:
            parts.append(memoryview(bytes(gap)))
    return parts


class Columns(Mapping[str, Array]):
    """The columns of a container by name; each is made, as a read-only view, when it is asked for."""

    def __init__(self, view: memoryview, places: Mapping[str, tuple[np.dtype[Any], int, int]]) -> None:
        self._view = view
        self._places = places

    def __getitem__(self, name: str) -> Array:
        dtype, size, start = self._places[name]
        return np.frombuffer(self._view, dtype, size, start) if size else np.frombuffer(b"", dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def sizes(self, names: Iterable[str]) -> set[int]:
        """The different numbers of elements that these columns have."""
        return {self._places[name][1] for name in names}


def unpack(data: bytes | memoryview, kind: str, place: str) -> tuple[dict[str, Any], Columns]:
    """The facts and the columns, read-only views of ``data``.

    Raises CorruptObjectError where the bytes are no whole container of that kind.
    """
    view = memoryview(data).cast("B").toreadonly()
    try:
        magic, length = _PREFIX.unpack_from(view)
        if magic != MAGIC:
            raise ValueError("it begins with other bytes than a shard does")
        start = _PREFIX.size + length
        header = json.loads(bytes(view[_PREFIX.size : start]))
        if header["kind"] != kind:
            raise ValueError(f"it is of kind {str(header['kind'])[:40]!r}")
        places = {}
        for name, code, size in header["columns"]:
            dtype = _DTYPES[code]
            if type(size) is not int or size < 0:
                raise ValueError(f"column {name!r} has {size} elements")
            places[name] = (dtype, size, start)
            start += size * dtype.itemsize
            start += -start % _ALIGN
        if start != view.nbytes:
            raise ValueError(f"it has {view.nbytes} bytes, its columns end at {start}")
        return dict(header["facts"]), Columns(view, places)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise broken(place, kind, error) from error


def broken(place: str, kind: str, error: Exception) -> CorruptObjectError:
    """The error for an object that is no shard of that kind."""
    return CorruptObjectError(
        f"{place} is no whole {kind} shard ({type(error).__name__}: {error}): it was damaged or cut off after it was "
        "written; delete it and resume the run"
    )


def narrow(values: Array | Sequence[int]) -> Array:
    """The integers [n] in the narrowest of uint8, uint16, int32 and int64 that holds them; OverflowError where none."""
    array = np.ascontiguousarray(values, dtype=None if len(values) else np.uint8)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for name, smallest, largest in _NARROW:
        if smallest <= low and high <= largest:
            return array.astype(_DTYPES[name], copy=False)
    if array.dtype.kind not in "iub" or high >= 1 << 63:
        raise OverflowError(f"{low} to {high} do not fit 64 bits")
    return array.astype(_DTYPES["<i8"], copy=False)


def offsets(lengths: Array, total: int) -> NDArray[np.int64]:
    """Where each of ``lengths`` [n] starts, and the end: [n + 1]. Raises ValueError unless they sum to ``total``."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    if ends[-1] != total or (len(lengths) and lengths.min() < 0):
        raise ValueError(f"lengths sum to {ends[-1]}, not to {total}")
    return ends
