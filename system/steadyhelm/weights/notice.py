"""Notices in the store of weights that are elsewhere: one small object for a version, in place of its tensors."""

from __future__ import annotations

import json
from typing import TypeVar

from steadyhelm.data.types import PolicyVersion, WeightsRecord
from steadyhelm.errors import CorruptObjectError
from steadyhelm.store import ObjectStore
from steadyhelm.store.records import dumps, from_json, loads, to_json
from steadyhelm.weights.share import Share

N = TypeVar("N")


def announce(
    store: ObjectStore, share: Share, key: str, notice: object, version: PolicyVersion, checksum: str
) -> WeightsRecord:
    """Has rank 0 put ``notice``, a dataclass, under ``key``; all ranks get the version's record. Raises StoreError."""

    def put() -> str:
        if share.index:
            return ""
        ref = store.put(key, dumps(to_json(notice)))
        return json.dumps(to_json(WeightsRecord(version=version, objects=(ref,), checksum=checksum)))

    return from_json(WeightsRecord, json.loads(share.exchange(put)[0]), "rank 0's weights")


def read_notice(kind: type[N], store: ObjectStore, record: WeightsRecord, where: str) -> N:
    """What ``announce`` put. ``where`` says where the weights should be, for messages: ``"in shared memory"``.

    Raises ObjectMissingError, CorruptObjectError.
    """
    if len(record.objects) != 1:
        raise CorruptObjectError(f"weights {record.version} were not published {where}: publish them anew")
    ref = record.objects[0]
    return from_json(kind, loads(store.read(ref), ref.key), ref.key)
