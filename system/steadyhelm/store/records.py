"""The wire records of ``data.types`` as JSON, and back, exactly.

A record is an object with one member per field, a mapping an object, a tuple an array, an enum its value, a number
that JSON lacks one of the strings ``"nan"``, ``"inf"`` and ``"-inf"``. Reading is
strict: a missing or unknown member or a value of another type is a CorruptObjectError that names the place. Only what
has a default may be missing: a field that came later is absent in what was written before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from steadyhelm.data.types import BatchManifest, CheckpointRecord, ObjectRef, ShardRecord, WeightsRecord
from steadyhelm.errors import CorruptObjectError

R = TypeVar("R")
NON_FINITE = ("nan", "inf", "-inf")
Json = dict[str, Any]
"""A JSON object."""


def to_json(record: object) -> Json:
    """The record as a JSON object. Raises TypeError for a value that JSON has no form for."""
    if not dataclasses.is_dataclass(record) or isinstance(record, type):
        raise TypeError(f"{type(record).__name__} is not a record")
    return {field.name: plain(getattr(record, field.name)) for field in dataclasses.fields(record)}


def from_json(kind: type[R], data: object, place: str) -> R:
    """The record of type ``kind`` that ``to_json`` made ``data`` of.

    Args:
        kind: a dataclass of ``data.types``.
        data: parsed JSON.
        place: what holds it, for the error's message: ``"entry 12 of digits/log"``.

    Raises:
        CorruptObjectError: a member is missing, unknown or of another type.
    """
    return cast(R, _decode(kind, data, place))


def dumps(data: object) -> bytes:
    """``data`` as canonical JSON in UTF-8: sorted members, no spaces, no NaN. Raises ValueError, TypeError."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def loads(data: bytes | memoryview, place: str) -> Json:
    """The JSON object in ``data``. Raises CorruptObjectError for anything else."""
    try:
        value = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise CorruptObjectError(f"{place} is not JSON ({error}): it was damaged after it was written") from error
    if not isinstance(value, dict):
        raise CorruptObjectError(f"{place} is not a JSON object: it was damaged after it was written")
    return value


def object_refs(record: BatchManifest | WeightsRecord | CheckpointRecord) -> tuple[ObjectRef, ...]:
    """The objects that the record refers to."""
    if not isinstance(record, BatchManifest):
        return record.objects
    return tuple(ref for shard in record.shards for ref in _shard_refs(shard))


def _shard_refs(shard: ShardRecord) -> tuple[ObjectRef, ...]:
    return tuple(ref for ref in (shard.rollout, shard.reference, shard.reward) if ref is not None)


def plain(value: object) -> Any:
    """What JSON writes for ``value``: a record, a number, a string, or tuples, lists and mappings of such.

    Raises TypeError for anything else.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {_key(key): plain(item) for key, item in value.items()}
    return to_json(value)


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"the key {key!r} of a mapping is not a string")
    return key


@cache
def _fields(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


@cache
def _required(kind: Any) -> frozenset[str]:
    absent = dataclasses.MISSING
    return frozenset(f.name for f in dataclasses.fields(kind) if f.default is absent and f.default_factory is absent)


def _decode(kind: Any, data: object, place: str) -> object:
    while hasattr(kind, "__supertype__"):
        kind = kind.__supertype__
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in get_args(kind):
            return None
        (kind,) = (option for option in get_args(kind) if option is not type(None))
        return _decode(kind, data, place)
    if origin is tuple and isinstance(data, list):
        item = get_args(kind)[0]
        return tuple(_decode(item, value, f"{place}[{number}]") for number, value in enumerate(data))
    if origin is Mapping and isinstance(data, dict):
        return {key: _decode(get_args(kind)[1], value, f"{place}.{key}") for key, value in data.items()}
    if isinstance(kind, type):
        if dataclasses.is_dataclass(kind) and isinstance(data, dict):
            return _record(kind, data, place)
        if issubclass(kind, Enum) and isinstance(data, str) and data in {member.value for member in kind}:
            return kind(data)
        if kind is float and (type(data) in (int, float) or data in NON_FINITE):
            return float(cast(float, data))
        if kind in (str, bool, int) and type(data) is kind:
            return data
    expected = getattr(kind, "__name__", str(kind)) if origin is None else getattr(origin, "__name__", str(origin))
    raise CorruptObjectError(
        f"{place} is {str(data)[:80]!r} where a {expected} belongs: it was damaged, or another version wrote it"
    )


def _record(kind: type, data: Json, place: str) -> object:
    fields = _fields(kind)
    missing, unknown = sorted(_required(kind) - data.keys()), sorted(data.keys() - fields.keys())
    if missing or unknown:
        raise CorruptObjectError(
            f"{place} is no {kind.__name__}: missing {missing}, unknown {unknown}; another version of Steadyhelm "
            "wrote it, use that one"
        )
    return kind(**{name: _decode(fields[name], value, f"{place}.{name}") for name, value in data.items()})
