"""Weights through the object store: a full safetensors anchor per version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from steadyhelm.data.types import PolicyVersion, WeightsRecord
from steadyhelm.errors import CorruptObjectError
from steadyhelm.store import ObjectStore
from steadyhelm.weights.checksum import set_checksum
from steadyhelm.weights.codec import decode, encode

MAX_OBJECT_BYTES = 1 << 30
"""Largest anchor object; a tensor above it gets an object of its own."""


class StoreWeights:
    """Publishes and fetches anchors in an object store.

    The anchor's objects are ``<key>/anchor-<n>.safetensors``, tensors in sorted order of name.
    """

    def __init__(self, store: ObjectStore, *, max_object_bytes: int = MAX_OBJECT_BYTES) -> None:
        self._store = store
        self._max_object_bytes = max_object_bytes

    def publish(
        self,
        version: PolicyVersion,
        key: str,
        tensors: Mapping[str, torch.Tensor],
        known: WeightsRecord | None = None,
    ) -> WeightsRecord:
        """Puts ``tensors`` under the prefix ``key``, unless they are those of ``known``. Raises StoreError."""
        checksum = set_checksum(tensors)
        if known is not None and known.checksum == checksum:
            return known
        objects = tuple(
            self._store.put(f"{key}/anchor-{number:04d}.safetensors", encode(part))
            for number, part in enumerate(_parts(tensors, self._max_object_bytes))
        )
        return WeightsRecord(version=version, objects=objects, checksum=checksum)

    def fetch(self, record: WeightsRecord, base: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of an anchor, verified, on the CPU and in memory of their own.

        Raises ObjectMissingError and CorruptObjectError; the latter for a record that is no anchor too.
        """
        if record.base is not None:
            raise CorruptObjectError(
                f"weights {record.version} are a delta to {record.base}, which this reader cannot apply: "
                "fetch them with the publisher's own kind of weight sync"
            )
        tensors: dict[str, torch.Tensor] = {}
        for ref in record.objects:
            part, _ = decode(self._store.read(ref), ref.key)
            tensors.update(part)
        found = set_checksum(tensors)
        if found != record.checksum:
            raise CorruptObjectError(
                f"weights {record.version} have checksum {found}, but their record says {record.checksum}: "
                "take another version"
            )
        return tensors


def _parts(tensors: Mapping[str, torch.Tensor], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part
