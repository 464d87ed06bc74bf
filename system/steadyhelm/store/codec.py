"""Shards as objects: trajectories, scores and reference log-probs as columns of numbers and of text.

Decoding makes arrays that are views of the object's bytes and touches no text; trajectories are made when they are
asked for. What repeats is written once: equal texts and equal prompts through an index, images as their hashes,
policy versions as runs. Token ids take two bytes where the vocabulary allows and are widened to int32 on reading;
four-byte ids are views.

All arrays that decoding returns are read-only.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from steadyhelm.config.place import IMAGES
from steadyhelm.data.types import FinishReason, ImageKey, Prompt, PromptId, Rewards, Trajectory
from steadyhelm.errors import DataError
from steadyhelm.store.columns import Array, Column, Columns, Pieces, broken, narrow, offsets, pack, unpack

_FINISH = tuple(FinishReason)
_HASHED = re.compile(rf"{IMAGES}/([0-9a-f]{{64}})")
_HASH_BYTES = 32
_TEXTS = ("prompt_id", "group_id", "pair_id", "text", "trace", "meta", "completion_text")
_NUMBERS = ("label", "swapped", "seed", "attempt", "finish")
_MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)


def encode_rollout(trajectories: Sequence[Trajectory]) -> list[memoryview]:
    """The parts of a rollout shard. Raises DataError where tokens, log-probs and versions differ in number."""
    for row in trajectories:
        if not len(row.tokens) == len(row.logprobs) == len(row.versions):
            raise DataError(
                f"the trajectory of prompt {row.prompt.prompt_id} has {len(row.tokens)} tokens, {len(row.logprobs)} "
                f"log-probs and {len(row.versions)} versions: the engine must answer one of each per token"
            )
    prompts = [row.prompt for row in trajectories]
    columns: dict[str, Column] = {}
    texts: tuple[Sequence[str], ...] = (
        [prompt.prompt_id for prompt in prompts],
        [prompt.group_id for prompt in prompts],
        [prompt.pair_id for prompt in prompts],
        [prompt.text for prompt in prompts],
        ["" if prompt.trace is None else "=" + prompt.trace for prompt in prompts],
        [json.dumps(dict(prompt.meta), separators=(",", ":")) if prompt.meta else "" for prompt in prompts],
        [row.completion_text for row in trajectories],
    )
    for name, values in zip(_TEXTS, texts, strict=True):
        columns.update(_pack_blobs(name, [value.encode("utf-8", "surrogatepass") for value in values]))
    numbers = (
        [prompt.label for prompt in prompts],
        [int(prompt.swapped) for prompt in prompts],
        [prompt.seed for prompt in prompts],
        [row.attempt for row in trajectories],
        [_FINISH.index(row.finish) for row in trajectories],
    )
    columns.update({name: narrow(values) for name, values in zip(_NUMBERS, numbers, strict=True)})
    columns.update(_pack_images([prompt.images for prompt in prompts]))
    columns.update(_pack_prompts([row.prompt_tokens for row in trajectories]))
    columns["lengths"] = narrow([len(row.tokens) for row in trajectories])
    columns["tokens"] = _ids([row.tokens for row in trajectories])
    columns["logprobs"] = _floats([row.logprobs for row in trajectories])
    columns.update(_pack_runs([row.versions for row in trajectories]))
    return pack("rollout", {"trajectories": len(trajectories)}, columns)


def decode_rollout(data: bytes | memoryview, place: str = "an object") -> RolloutShard:
    """The shard in ``data``; ``place`` is its key for the message. Raises CorruptObjectError."""
    facts, columns = unpack(data, "rollout", place)
    try:
        return RolloutShard(facts, columns, place)
    except _MALFORMED as error:
        raise broken(place, "rollout", error) from error


class RolloutShard(Sequence[Trajectory]):
    """A rollout shard: a sequence of trajectories, made at first use, over flat arrays.

    Attributes:
        lengths: [N] completion tokens of each trajectory.
        offsets: [N + 1] int64; trajectory n's tokens are ``[offsets[n], offsets[n + 1])`` of the flat arrays.
        tokens: [sum T] int32.
        logprobs: [sum T] float32.
        versions: [sum T] int32, made from runs at first use.
    """

    def __init__(self, facts: Mapping[str, Any], columns: Columns, place: str) -> None:
        self._columns = columns
        self._place = place
        self._num = int(facts["trajectories"])
        self._made: tuple[Trajectory, ...] | None = None
        self.lengths = columns["lengths"]
        self.offsets = offsets(self.lengths, columns["tokens"].size)
        self.tokens = _frozen(columns["tokens"].astype(np.int32, copy=False))
        self.logprobs: NDArray[np.float32] = columns["logprobs"]
        offsets(columns["versions#"], self.tokens.size)
        if self.logprobs.dtype != np.float32 or self.logprobs.size != self.tokens.size:
            raise ValueError("log-probs do not fit the tokens")
        if columns["versions"].size != columns["versions#"].size:
            raise ValueError("versions do not fit their runs")
        if columns.sizes(("lengths", *_NUMBERS)) != {self._num}:
            raise ValueError("columns of unequal length")

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | Sequence[Trajectory]:
        return self.trajectories[index]

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    @cached_property
    def versions(self) -> NDArray[np.int32]:
        """[sum T] int32: the policy iteration that sampled each token."""
        return _frozen(np.repeat(self._columns["versions"].astype(np.int32), self._columns["versions#"]))

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """The trajectories in order; their arrays are views. Raises CorruptObjectError where texts are damaged."""
        if self._made is None:
            try:
                self._made = tuple(self._make())
            except _MALFORMED as error:
                raise broken(self._place, "rollout", error) from error
        return self._made

    def _make(self) -> Iterator[Trajectory]:
        columns, num = self._columns, self._num
        texts = [_unpack_texts(columns, name, num) for name in _TEXTS]
        numbers = [columns[name].tolist() for name in _NUMBERS]
        images = _unpack_images(columns, num)
        prompt_tokens = _unpack_prompts(columns, num)
        ends = self.offsets.tolist()
        rows = zip(*texts, *numbers, images, prompt_tokens, itertools.pairwise(ends), strict=True)
        for row in rows:
            prompt_id, group_id, pair_id, text, trace, meta, completion = row[:7]
            label, swapped, seed, attempt, finish, keys, tokens, (start, end) = row[7:]
            yield Trajectory(
                prompt=Prompt(
                    prompt_id=PromptId(prompt_id),
                    group_id=group_id,
                    text=text,
                    images=keys,
                    label=label,
                    swapped=bool(swapped),
                    seed=seed,
                    pair_id=pair_id,
                    trace=trace[1:] if trace else None,
                    meta=json.loads(meta) if meta else {},
                ),
                prompt_tokens=tokens,
                tokens=self.tokens[start:end],
                logprobs=self.logprobs[start:end],
                versions=self.versions[start:end],
                attempt=attempt,
                finish=_FINISH[finish],
                completion_text=completion,
            )


def encode_rewards(rewards: Rewards) -> list[memoryview]:
    """The parts of a reward shard. Raises DataError where its arrays differ in length."""
    num = len(rewards.total)
    sizes = {len(rewards.valid), len(rewards.detail), *(len(part) for part in rewards.components.values())}
    if sizes != {num}:
        raise DataError(f"rewards of {num} samples have parts of {sorted(sizes)} samples: mend the reward service")
    columns: dict[str, Column] = {
        "total": np.ascontiguousarray(rewards.total, np.float32),
        "valid": np.ascontiguousarray(rewards.valid, np.bool_).view(np.uint8),
    }
    for number, part in enumerate(rewards.components.values()):
        columns[f"component{number}"] = np.ascontiguousarray(part, np.float32)
    details = [json.dumps(dict(detail), separators=(",", ":")).encode() for detail in rewards.detail]
    columns.update(_pack_blobs("detail", details))
    return pack("reward", {"components": list(rewards.components)}, columns)


def decode_rewards(data: bytes | memoryview, place: str = "an object") -> Rewards:
    """The scores in ``data``; ``place`` is its key for the message. Raises CorruptObjectError."""
    facts, columns = unpack(data, "reward", place)
    try:
        num = columns["total"].size
        names = [str(name) for name in facts["components"]]
        components = {name: columns[f"component{number}"] for number, name in enumerate(names)}
        floats = (columns["total"], *components.values())
        if any(part.size != num or part.dtype != np.float32 for part in floats):
            raise ValueError("components do not fit the total")
        valid = columns["valid"]
        if valid.size != num or valid.dtype != np.uint8 or (num and valid.max() > 1):
            raise ValueError("valid is no column of booleans")
        details = tuple(json.loads(text) for text in _unpack_texts(columns, "detail", num))
        return Rewards(total=columns["total"], valid=valid.view(np.bool_), components=components, detail=details)
    except _MALFORMED as error:
        raise broken(place, "reward", error) from error


def encode_reference(logprobs: Sequence[NDArray[np.float32]]) -> list[memoryview]:
    """The parts of a reference shard: the frozen model's log-probs [T] of each trajectory, in the shard's order."""
    columns: dict[str, Column] = {"lengths": narrow([len(row) for row in logprobs]), "logprobs": _floats(logprobs)}
    return pack("reference", {}, columns)


def decode_reference(data: bytes | memoryview, place: str = "an object") -> list[NDArray[np.float32]]:
    """The log-probs [T] of each trajectory, views of ``data``; ``place`` is its key. Raises CorruptObjectError."""
    _, columns = unpack(data, "reference", place)
    try:
        flat = columns["logprobs"]
        if flat.dtype != np.float32:
            raise ValueError("log-probs are no float32")
        ends = offsets(columns["lengths"], flat.size).tolist()
        return [flat[start:end] for start, end in itertools.pairwise(ends)]
    except _MALFORMED as error:
        raise broken(place, "reference", error) from error


def _floats(rows: Sequence[NDArray[np.float32]]) -> Pieces:
    return Pieces(np.dtype("<f4"), [np.ascontiguousarray(row, np.float32) for row in rows])


def _ids(rows: Sequence[NDArray[np.int32]]) -> Column:
    """Token ids as uint8 or uint16 where all fit, else the rows themselves."""
    whole = [np.ascontiguousarray(row, np.int32) for row in rows]
    longest = max(whole, key=len, default=np.empty(0, np.int32))
    if len(longest) and int(longest.max()) > np.iinfo(np.uint16).max:  # one row tells already that they do not fit
        return Pieces(np.dtype("<i4"), whole)
    return narrow(np.concatenate(whole) if whole else longest)


def _frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array


def _index(values: Iterable[bytes | memoryview]) -> tuple[list[int], Array | None]:
    """The places of the distinct values, and which of those each value is; None where all are distinct.

    Values are looked up by xxh3: Python's own hash of bytes takes longer than writing them.
    """
    digests = list(map(xxhash.xxh3_128_digest, values))
    first = {digest: number for number, digest in reversed(list(enumerate(digests)))}
    if len(first) == len(digests):
        return list(range(len(digests))), None
    distinct = sorted(first.values())
    places = {digests[number]: place for place, number in enumerate(distinct)}
    return distinct, narrow([places[digest] for digest in digests])


def _pack_blobs(name: str, values: Sequence[bytes]) -> dict[str, Column]:
    """A column of byte strings: ``name`` joined, ``name#`` lengths, ``name@`` index where values repeat."""
    first, index = _index(values)
    distinct = [values[place] for place in first]
    columns: dict[str, Column] = {
        name: Pieces(np.dtype("u1"), distinct),
        f"{name}#": narrow([len(value) for value in distinct]),
    }
    if index is not None:
        columns[f"{name}@"] = index
    return columns


def _unpack_texts(columns: Mapping[str, Array], name: str, num: int) -> list[str]:
    joined = columns[name].tobytes()
    ends = offsets(columns[f"{name}#"], len(joined)).tolist()
    distinct = [joined[start:end].decode("utf-8", "surrogatepass") for start, end in itertools.pairwise(ends)]
    return _spread(distinct, columns.get(f"{name}@"), num)


def _spread(distinct: list[Any], index: Array | None, num: int) -> list[Any]:
    values = distinct if index is None else [distinct[place] for place in index.tolist()]
    if len(values) != num:
        raise ValueError(f"{len(values)} values for {num} trajectories")
    return values


def _pack_prompts(rows: Sequence[NDArray[np.int32]]) -> dict[str, Column]:
    """Prompt tokens, equal prompts once: the samples of one prompt share them."""
    first, index = _index([np.ascontiguousarray(row, np.int32).data for row in rows])
    distinct = [rows[place] for place in first]
    columns: dict[str, Column] = {"prompt_tokens": _ids(distinct), "prompt_tokens#": narrow([len(r) for r in distinct])}
    if index is not None:
        columns["prompt_tokens@"] = index
    return columns


def _unpack_prompts(columns: Mapping[str, Array], num: int) -> list[NDArray[np.int32]]:
    flat = _frozen(columns["prompt_tokens"].astype(np.int32, copy=False))
    ends = offsets(columns["prompt_tokens#"], flat.size).tolist()
    return _spread([flat[a:b] for a, b in itertools.pairwise(ends)], columns.get("prompt_tokens@"), num)


def _pack_images(rows: Sequence[tuple[ImageKey, ...]]) -> dict[str, Column]:
    """Image keys: the 32 bytes of each hash once, or whole keys where one is of another form."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    places = {key: place for place, key in enumerate(keys)}
    columns: dict[str, Column] = {
        "images#": narrow([len(row) for row in rows]),
        "images@": narrow([places[key] for row in rows for key in row]),
    }
    hashes = [match[1] for key in keys if (match := _HASHED.fullmatch(key))]
    if len(hashes) == len(keys):
        columns["image_hashes"] = Pieces(np.dtype("u1"), [bytes.fromhex(key) for key in hashes])
    else:
        columns.update(_pack_blobs("image_keys", [key.encode() for key in keys]))
    return columns


def _unpack_images(columns: Mapping[str, Array], num: int) -> list[tuple[ImageKey, ...]]:
    if "image_hashes" in columns:
        joined = columns["image_hashes"].tobytes().hex()
        size = 2 * _HASH_BYTES
        if len(joined) % size:
            raise ValueError("image hashes of another length")
        keys = [f"{IMAGES}/{joined[start : start + size]}" for start in range(0, len(joined), size)]
    else:
        keys = _unpack_texts(columns, "image_keys", columns["image_keys#"].size)
    flat = [ImageKey(keys[place]) for place in columns["images@"].tolist()]
    ends = offsets(columns["images#"], len(flat)).tolist()
    return _spread([tuple(flat[start:end]) for start, end in itertools.pairwise(ends)], None, num)


def _pack_runs(rows: Sequence[NDArray[np.int32]]) -> dict[str, Column]:
    """Versions as runs of equal ones over all trajectories: mostly a single one."""
    versions: list[int] = []
    lengths: list[int] = []
    for row in rows:
        raw = np.ascontiguousarray(row, np.int32).tobytes()
        same = raw[4:] == raw[:-4]  # one comparison of memory: nearly every row is of one version
        starts = [0][: len(row)] if same else [0, *(np.flatnonzero(row[1:] != row[:-1]) + 1).tolist()]
        for start, end in itertools.pairwise([*starts, len(row)]):
            if versions and versions[-1] == row[start]:
                lengths[-1] += end - start
            else:
                versions.append(int(row[start]))
                lengths.append(end - start)
    return {"versions": narrow(versions), "versions#": narrow(lengths)}
