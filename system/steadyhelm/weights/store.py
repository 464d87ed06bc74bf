"""Weights through the object store: a full safetensors anchor now and then, lossless deltas in between.

::

    version    0        1       2    …    20        21
    object     anchor ← delta ← delta …   anchor  ← delta          ← is: applies to

Whoever has a version follows the arrows back to it from the one it is to take; whoever has none, or whose tensors turn
out to be others than it thought, follows them to an anchor.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TypeVar

import torch

from steadyhelm.data.types import ObjectRef, PolicyVersion, WeightsRecord
from steadyhelm.errors import CorruptObjectError
from steadyhelm.store import ObjectStore
from steadyhelm.store.records import from_json, to_json
from steadyhelm.weights import blocks, codec
from steadyhelm.weights.blocks import Flat, Models
from steadyhelm.weights.checksum import combined, digest, in_threads, require_checksum
from steadyhelm.weights.delta import Delta, check_parts
from steadyhelm.weights.entropy import ChangeModel
from steadyhelm.weights.layout import Block, Layout, flat_words
from steadyhelm.weights.share import Share

T = TypeVar("T")

MAX_OBJECT_BYTES = 1 << 30
"""Largest anchor object; a tensor above it gets an object of its own."""
READERS = 8
"""Objects that are read at a time."""

ANCHOR_EVERY = 20
"""Versions from one anchor to the next."""


class FetchedTensors(dict[str, torch.Tensor]):
    """Tensors by name that nobody writes to for as long as this object lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A version, and a copy of its tensors that nobody else writes to; ``deltas`` is its distance from an anchor.

    ``lent`` is what a reader gave out of them; None for nothing.
    """

    record: WeightsRecord
    layout: Layout
    tensors: dict[str, torch.Tensor]
    deltas: int = 0
    lent: weakref.ref[FetchedTensors] | None = None

    @property
    def in_use(self) -> bool:
        """Whether somebody may still read what was given out."""
        return self.lent is not None and self.lent() is not None


class StoreWeights:
    """Publishes versions as anchors and deltas in an object store, and fetches them.

    Objects are ``<key>/anchor-<part>-<n>.safetensors``, tensors in sorted order of name, or ``<key>/delta-<part>``. To
    code the next delta, publisher and reader each keep a copy of the tensors in memory; a reader keeps two where its
    caller goes on using the tensors that it was given. One call at a time.

    Args:
        store: where objects are put and read.
        anchor_every: versions from one anchor to the next; 1 makes no deltas, and the publisher keeps no copy.
        threads: blocks that are worked on at a time.
        share: this publisher's part; None for all of whatever is published.
        max_object_bytes: largest anchor object.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        anchor_every: int = ANCHOR_EVERY,
        threads: int = 1,
        share: Share | None = None,
        max_object_bytes: int = MAX_OBJECT_BYTES,
    ) -> None:
        self._store = store
        self._anchor_every = anchor_every
        self._threads = threads
        self._share = share
        self._max_object_bytes = max_object_bytes
        self._published: _Held | None = None
        self._held: _Held | None = None
        self._spare: _Held | None = None

    def publish(
        self,
        version: PolicyVersion,
        key: str,
        tensors: Mapping[str, torch.Tensor],
        known: WeightsRecord | None = None,
    ) -> WeightsRecord:
        """Puts ``tensors`` under the prefix ``key``, unless they are those of ``known``.

        A delta is to the version that this publisher put last, in the same attempt. After an error, a start and
        ``known`` weights there is none that it can vouch for: the next is an anchor.

        Raises:
            StoreError: an object could not be put.
        """
        share = self._share or Share(layout=Layout.of(tensors))
        base, self._published = self._published, None
        if base is not None and not self._continues(base, version, share.layout):
            base = None
        coding = _Coding(share, base, {name: tensors[name] for name in share.names}, self._threads)
        digests = "".join(share.exchange(coding.run))
        checksum = combined(share.layout, bytes.fromhex(digests))
        if known is not None and known.checksum == checksum:
            return known
        told = share.exchange(lambda: self._put(key, coding, version, checksum))
        refs = chain.from_iterable(json.loads(text) for text in told)
        record = WeightsRecord(
            version=version,
            objects=tuple(from_json(ObjectRef, ref, "a rank's objects") for ref in refs),
            checksum=checksum,
            base=base.record.version if base else None,
        )
        if self._anchor_every > 1:
            self._published = coding.result(record)
        return record

    def fetch(self, record: WeightsRecord) -> FetchedTensors:
        """The tensors of ``record``, verified as a whole against its checksum.

        They are on the CPU, and as they are for as long as the mapping lives: where it does at the next call, that
        makes the new version in other memory, else in the same. Where deltas lead from the version fetched before to
        this one, only those are read.

        Raises:
            ObjectMissingError, CorruptObjectError: neither from there nor from an anchor is there a way to ``record``.
        """
        start, steps = self._way(record, self._held.record if self._held else None)
        held = self._held
        if held is not None and start == held.record:
            try:
                return self._lend(self._follow(held, steps, record))
            except CorruptObjectError:  # our copy is not what it was: an anchor knows better
                start, steps = self._way(record, None)
        if held is not None and not held.in_use:
            self._held = None  # its memory goes before an anchor comes
        del held
        return self._lend(self._follow(self._anchor(start), steps, record))

    def _lend(self, found: _Held) -> FetchedTensors:
        """Keeps ``found`` for the next call, and gives its tensors out."""
        lent = found.lent() if found.lent is not None else None
        if lent is None:
            lent = FetchedTensors(found.tensors)
        if self._held is not None and self._held.tensors is not found.tensors:
            self._spare = self._held
        self._held = replace(found, lent=weakref.ref(lent))
        return lent

    def close(self) -> None:
        """Nothing: what it put is the store's."""

    def _continues(self, base: _Held, version: PolicyVersion, layout: Layout) -> bool:
        """Whether the next version may be a delta to ``base``."""
        last = base.record.version
        follows = last.attempt == version.attempt and last.iteration < version.iteration
        return follows and base.layout.checksum == layout.checksum and base.deltas + 1 < self._anchor_every

    def _put(self, key: str, coding: _Coding, version: PolicyVersion, checksum: str) -> str:
        """Puts this rank's objects and returns their references as a JSON list."""
        share, base = coding.share, coding.base
        if base is not None:
            delta = Delta(
                version=version,
                checksum=checksum,
                layout=share.layout.checksum,
                base=base.record,
                part=share.index,
                parts=share.count,
                models=coding.models,
                codes=tuple(coding.codes),
            )
            refs = [self._store.put(f"{key}/delta-{share.index:04d}", delta.to_bytes())]
        else:
            whole = {name: coding.tensors[name] for name in share.anchored}
            refs = [
                self._store.put(f"{key}/anchor-{share.index:04d}-{number:04d}.safetensors", codec.encode(part))
                for number, part in enumerate(_parts(whole, self._max_object_bytes))
            ]
        return json.dumps([to_json(ref) for ref in refs])

    def _way(
        self, record: WeightsRecord, known: WeightsRecord | None
    ) -> tuple[WeightsRecord, list[tuple[WeightsRecord, list[Delta]]]]:
        """The deltas to ``record``, first to last, and what the first applies to: ``known``, or else an anchor."""
        steps = []
        while record.base is not None and record != known:
            deltas = self._read(record.objects, Delta.from_bytes)
            steps.append((record, deltas))
            record = check_parts(deltas, record)
        return record, steps[::-1]

    def _read(self, refs: Sequence[ObjectRef], make: Callable[[memoryview, str], T]) -> list[T]:
        """What ``make`` makes of each object, verified, several read at a time."""
        return in_threads(lambda ref: make(self._store.read(ref), ref.key), refs, min(READERS, len(refs)) or 1)

    def _anchor(self, record: WeightsRecord) -> _Held:
        """An anchor's tensors, unverified as a set."""
        tensors: dict[str, torch.Tensor] = {}
        for part, _ in self._read(record.objects, codec.decode):
            tensors.update(part)
        return _Held(record=record, layout=Layout.of(tensors), tensors=tensors)

    def _follow(self, held: _Held, steps: Sequence[tuple[WeightsRecord, list[Delta]]], record: WeightsRecord) -> _Held:
        """Takes ``held`` along ``steps`` to ``record``; it is void afterwards unless it is in use.

        Raises CorruptObjectError.
        """
        layout = held.layout
        tensors = self._free_memory(held) if steps and held.in_use else held.tensors
        if tensors is held.tensors:
            self._held = None  # what begins here may not come to its end
        base = {name: flat_words(tensor) for name, tensor in held.tensors.items()}
        flat = {name: flat_words(tensor) for name, tensor in tensors.items()}
        work = [_Work(layout, to, deltas) for to, deltas in steps]
        for step in work[:-1]:
            in_threads(partial(step.apply, base, flat), range(len(layout.blocks)), self._threads)
            base = flat

        def finish(index: int) -> bytes:
            if work:
                work[-1].apply(base, flat, index)
            return digest(layout.blocks[index].views(flat))

        require_checksum(
            combined(layout, b"".join(in_threads(finish, range(len(layout.blocks)), self._threads))), record
        )
        return _Held(record=record, layout=layout, tensors=tensors, lent=None if steps else held.lent)

    def _free_memory(self, held: _Held) -> dict[str, torch.Tensor]:
        """Tensors like those of ``held`` that nobody reads."""
        spare, self._spare = self._spare, None
        if spare is not None and not spare.in_use and spare.layout.checksum == held.layout.checksum:
            return spare.tensors
        return {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in held.tensors.items()}


class _Coding:
    """One rank's part of a publication: digests of its blocks and, where there is a base, their codes."""

    def __init__(self, share: Share, base: _Held | None, tensors: dict[str, torch.Tensor], threads: int) -> None:
        self.share = share
        self.base = base
        self.tensors = tensors
        self.models: dict[torch.dtype, ChangeModel] = {}
        self.codes: list[bytes] = []
        self._threads = threads

    def run(self) -> str:
        """Digests in hex, one behind the other. The base's tensors become the new ones."""
        mine = self.share.blocks
        flat = {name: flat_words(tensor) for name, tensor in self.tensors.items()}
        if self.base is None:
            return b"".join(in_threads(lambda block: digest(block.views(flat)), mine, self._threads)).hex()
        old = {name: flat_words(tensor) for name, tensor in self.base.tensors.items()}
        models = self.models = blocks.models_of(mine, old, flat)

        def code(block: Block) -> tuple[bytes, bytes]:
            return blocks.encode(block, old, flat, models), digest(block.views(flat))

        done = in_threads(code, mine, self._threads)
        self.codes = [found for found, _ in done]
        return b"".join(found for _, found in done).hex()

    def result(self, record: WeightsRecord) -> _Held:
        """What was published, in memory of its own: the former base, brought up to date, or a copy."""
        if self.base is not None:
            return replace(self.base, record=record, deltas=self.base.deltas + 1)
        copies = {  # on the host, where the next delta is made
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in self.tensors.items()
        }
        return _Held(record=record, layout=self.share.layout, tensors=copies)


class _Work:
    """What a version's deltas do to each block of a layout. Raises CorruptObjectError for another set's."""

    def __init__(self, layout: Layout, record: WeightsRecord, deltas: Sequence[Delta]) -> None:
        self._layout = layout
        self._codes: list[tuple[memoryview, Models, str]] = []
        for delta in deltas:
            place = f"part {delta.part} of the delta to weights {record.version}"
            if delta.layout != layout.checksum or len(delta.codes) != len(layout.part(delta.part, delta.parts)):
                raise CorruptObjectError(f"{place} is for another set of tensors: take another version")
            self._codes += [(memoryview(code), delta.models, place) for code in delta.codes]

    def apply(self, base: Flat, flat: Flat, index: int) -> None:
        """Makes a block of ``flat`` the new one, from ``base``, which may be the same arrays."""
        block = self._layout.blocks[index]
        if flat is not base:
            for before, after in zip(block.views(base), block.views(flat), strict=True):
                after[:] = before
        blocks.decode(flat, block, *self._codes[index])


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
