r"""The object that carries a part of the lossless difference between two versions of a set of tensors.

::

    "SHDELTA\n" │ length │ header in JSON │ models, one per type │ codes, one per block │ xxh3-128 of all before

The header says which version this makes of which base, the base's whole record included: a reader finds its way back to
an anchor with nothing but the objects. Each publishing rank puts one object, for its own range of the set's blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import xxhash

from steadyhelm.data.types import PolicyVersion, WeightsRecord
from steadyhelm.errors import CorruptObjectError, StoreError
from steadyhelm.store.records import dumps, from_json, loads, to_json
from steadyhelm.weights.codec import DTYPE_NAMES, DTYPES
from steadyhelm.weights.entropy import ChangeModel

FORMAT = 2
"""Version of the objects' format."""
_MAGIC = b"SHDELTA\n"
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 16
_REMEDY = "the weights are to be taken from an anchor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    r"""A part of a version's delta.

    ``version`` and ``checksum`` are those of the result, ``base`` is the record of what it applies to, ``layout`` the
    checksum of the set's names, types and shapes. ``part`` of ``parts`` has the ``codes`` of its range of blocks.

    Example: ``Delta(version=PolicyVersion(iteration=7, attempt=1), checksum="9a…", layout="3c…", base=record, part=0,
    parts=1, models={torch.bfloat16: model}, codes=(b"", b"\x01…"))``
    """

    version: PolicyVersion
    checksum: str
    layout: str
    base: WeightsRecord
    part: int
    parts: int
    models: Mapping[torch.dtype, ChangeModel]
    codes: tuple[bytes | memoryview, ...]

    def to_bytes(self) -> list[bytes | memoryview]:
        """The object, in pieces to be written one behind the other."""
        models = {DTYPE_NAMES[dtype]: model.to_bytes() for dtype, model in self.models.items()}
        header = dumps(
            {
                "format": FORMAT,
                "version": str(self.version),
                "checksum": self.checksum,
                "layout": self.layout,
                "base": to_json(self.base),
                "part": self.part,
                "parts": self.parts,
                "models": {name: len(model) for name, model in models.items()},
                "codes": [len(code) for code in self.codes],
            }
        )
        ordered = (models[name] for name in sorted(models))
        pieces = [_MAGIC + _LENGTH.pack(len(header)) + header, *ordered, *(code for code in self.codes if code)]
        digest = xxhash.xxh3_128()
        for piece in pieces:
            digest.update(piece)
        return [*pieces, digest.digest()]

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, place: str) -> Delta:
        """The delta in an object.

        Args:
            data: the object; the codes stay views of it.
            place: its key, for the error's message.

        Raises:
            CorruptObjectError: it is truncated, damaged or no delta.
            StoreError: it is whole, but of a format of a later version.
        """
        view = memoryview(data).cast("B")
        start = len(_MAGIC) + _LENGTH.size
        if view.nbytes < start + _DIGEST_BYTES or view[: len(_MAGIC)] != _MAGIC:
            raise CorruptObjectError(f"{place} is not a weight delta: {_REMEDY}")
        body = view[:-_DIGEST_BYTES]
        if xxhash.xxh3_128_digest(body) != bytes(view[-_DIGEST_BYTES:]):
            raise CorruptObjectError(f"{place} is truncated or damaged: {_REMEDY}")
        (length,) = _LENGTH.unpack_from(view, len(_MAGIC))
        header = loads(body[start : start + length], place)
        if header.get("format") != FORMAT:
            raise StoreError(
                f"{place} is a weight delta of format {header.get('format')}, which this version does not know: use "
                "the version of Steadyhelm that wrote it"
            )
        try:
            names = sorted(header["models"])
            ends = list(accumulate((header["models"][name] for name in names), initial=start + length))
            models = {
                DTYPES[name]: ChangeModel.from_bytes(bytes(body[first:last]), place)
                for name, (first, last) in zip(names, pairwise(ends), strict=True)
            }
            ends = list(accumulate(header["codes"], initial=ends[-1]))
            if ends != sorted(ends) or ends[-1] != body.nbytes:
                raise ValueError(f"its parts add up to {ends[-1]} bytes")
            return cls(
                version=PolicyVersion.parse(header["version"]),
                checksum=str(header["checksum"]),
                layout=str(header["layout"]),
                base=from_json(WeightsRecord, header["base"], place),
                part=int(header["part"]),
                parts=int(header["parts"]),
                models=models,
                codes=tuple(body[first:last] for first, last in pairwise(ends)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptObjectError(f"{place} has a damaged header ({error!r}): {_REMEDY}") from error


def check_parts(deltas: Sequence[Delta], record: WeightsRecord) -> WeightsRecord:
    """The base's record, where ``deltas`` are all parts of ``record`` and nothing else. Raises CorruptObjectError."""
    first = deltas[0] if deltas else None
    fits = first is not None and all(
        (delta.version, delta.checksum, delta.layout, delta.base, delta.part, delta.parts)
        == (record.version, record.checksum, first.layout, first.base, number, len(deltas))
        for number, delta in enumerate(deltas)
    )
    if first is None or not fits or first.base.version != record.base:
        raise CorruptObjectError(
            f"the objects of weights {record.version} are not the parts of one delta to {record.base}: {_REMEDY}"
        )
    if first.base.version.iteration >= record.version.iteration:
        raise CorruptObjectError(f"weights {record.version} are a delta to {record.base}, which is no older: {_REMEDY}")
    return first.base
