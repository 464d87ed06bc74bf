"""Checkpoints of the learner: fp32 masters and Adam's moments, bit for bit, under any number of ranks and ZeRO stage.

Each rank writes the fragments that it holds as safetensors; ``state.json`` says which elements of which parameter are
where. A rank reads the objects that have elements of its own fragments, whatever layout wrote them. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from steadyhelm.data.types import CheckpointRecord, ObjectRef, PolicyVersion
from steadyhelm.errors import CorruptObjectError
from steadyhelm.services.learner import collectives
from steadyhelm.services.learner.engine import TrainEngine
from steadyhelm.services.learner.fragments import MOMENTS, Fragment, Moments, fragments, masters_changed
from steadyhelm.store import ObjectStore
from steadyhelm.store.records import from_json, to_json
from steadyhelm.weights.codec import decode, encode

FORMAT = 1
MAX_OBJECT_BYTES = 1 << 30
"""Largest object; a fragment above it gets an object of its own."""
_MASTER = "master"
_RNG = "rng"


def save(store: ObjectStore, key: str, version: PolicyVersion, engine: TrainEngine) -> CheckpointRecord:
    """Puts the engine's state under the prefix ``key``; the same record on all ranks. Raises StoreError."""
    steps = Moments(engine.engine).steps

    def write() -> list[dict[str, Any]]:
        written = []
        for number, (part, tensors) in enumerate(_objects(engine, steps)):
            ref = store.put(f"{key}/rank{engine.rank:04d}-{number:04d}.safetensors", encode(tensors))
            places = [[fragment.name, fragment.start, fragment.numel] for fragment in part]
            written.append({"ref": to_json(ref), "rank": engine.rank, "fragments": places})
        return written

    objects = [item for text in collectives.texts(json.dumps(collectives.together(write))) for item in json.loads(text)]
    state = {
        "format": FORMAT,
        "iteration": version.iteration,
        "attempt": version.attempt,
        "optimizer_steps": steps,
        "world_size": engine.world_size,
        "zero_stage": engine.stage,
        "objects": objects,
    }

    def write_state() -> ObjectRef | None:
        return store.put(f"{key}/state.json", json.dumps(state, indent=1).encode()) if engine.rank == 0 else None

    mine = collectives.together(write_state)
    first = json.loads(collectives.texts(json.dumps(to_json(mine) if mine else None))[0])
    refs = tuple(from_json(ObjectRef, found, "a rank's object") for found in (first, *(i["ref"] for i in objects)))
    return CheckpointRecord(version=version, objects=refs)


def restore(store: ObjectStore, record: CheckpointRecord, engine: TrainEngine, seed: int) -> None:
    """Makes the engine's state that of ``record``, verified.

    Args:
        store: where the checkpoint is.
        record: what ``save`` answered.
        engine: of the same model under any layout.
        seed: of the random numbers of a rank that the checkpoint does not know.

    Raises:
        CorruptObjectError: an object is not the one that the record names, or the checkpoint is of another model; the
            engine's state is then undefined until the next ``restore``.
        ObjectMissingError: an object is gone.
    """

    def read() -> None:
        state = _read_state(store, record)
        table = _table(engine)
        missing = {item.name: item.numel for item in table}
        moments = Moments(engine.engine)
        moments.clear()
        if state["optimizer_steps"] > 0:
            for flat in {id(item.flat): item.flat for item in table}.values():
                moments.create(flat, state["optimizer_steps"])
        torch.manual_seed(seed + engine.rank)
        refs = {ref.key: ref for ref in record.objects}
        for entry in state["objects"]:
            mine = [place for place in entry["fragments"] if any(_overlap(item, place) for item in table)]
            if mine or entry["rank"] == engine.rank:
                ref = refs[entry["ref"]["key"]]
                tensors, _ = decode(store.read(ref), ref.key)
                _fill(table, mine, tensors, moments, state["optimizer_steps"] > 0, missing)
                if entry["rank"] == engine.rank and _RNG in tensors:
                    torch.set_rng_state(tensors[_RNG])
        lacking = [name for name, numel in missing.items() if numel]
        if lacking:
            raise CorruptObjectError(
                f"checkpoint {record.version} lacks elements of {len(lacking)} parameters, the first of them "
                f"{lacking[0]!r}: it is of another model, start a new run"
            )

    collectives.together(read)
    masters_changed(engine.engine)


def reset(engine: TrainEngine, weights: Mapping[str, torch.Tensor], seed: int) -> None:
    """Makes the engine's state that before the first step from ``weights``, whole parameters by the engine's names."""
    Moments(engine.engine).clear()
    torch.manual_seed(seed + engine.rank)
    for item in _table(engine):
        flat = weights[item.name].detach().reshape(-1)
        item.of(item.flat).copy_(flat[item.start : item.start + item.numel])
    masters_changed(engine.engine)


def _table(engine: TrainEngine) -> list[Fragment]:
    return list(fragments(engine.engine, engine.names, engine.rank, engine.world_size))


def _objects(engine: TrainEngine, steps: int) -> Iterator[tuple[list[Fragment], dict[str, torch.Tensor]]]:
    """This rank's fragments in parts of bounded size, each with its tensors by name."""
    moments = Moments(engine.engine)
    part: list[Fragment] = []
    tensors: dict[str, torch.Tensor] = {_RNG: torch.get_rng_state()}
    size = 0
    for item in _table(engine):
        if not item.owned:
            continue
        found = {f"{_MASTER}/{item.name}": item.of(item.flat)}
        if steps:
            found |= {f"{name}/{item.name}": item.of(moments.get(item.flat, name)) for name in MOMENTS}
        more = sum(tensor.nbytes for tensor in found.values())
        if part and size + more > MAX_OBJECT_BYTES:
            yield part, tensors
            part, tensors, size = [], {}, 0
        part.append(item)
        tensors |= found
        size += more
    yield part, tensors


def _read_state(store: ObjectStore, record: CheckpointRecord) -> dict[str, Any]:
    ref = record.objects[0]
    state: dict[str, Any] = json.loads(bytes(store.read(ref)))
    if state.get("format") != FORMAT:
        raise CorruptObjectError(
            f"{ref.key} has checkpoint format {state.get('format')!r}, but this version reads {FORMAT}: resume with "
            "the version that wrote it"
        )
    return state


def _overlap(item: Fragment, place: Sequence[Any]) -> int:
    name, start, numel = place
    return max(0, min(item.start + item.numel, start + numel) - max(item.start, start)) if item.name == name else 0


def _fill(
    table: Sequence[Fragment],
    places: Sequence[Sequence[Any]],
    tensors: Mapping[str, torch.Tensor],
    moments: Moments,
    with_moments: bool,
    missing: dict[str, int],
) -> None:
    """Copies what the object's fragments have of this rank's; counts ``missing`` down."""
    by_name = {item.name: item for item in table}
    for place in places:
        name, start, _ = place
        item = by_name[name]
        count = _overlap(item, place)
        low = max(item.start, start)
        wanted = {_MASTER: item.flat} | {m: moments.get(item.flat, m) for m in MOMENTS if with_moments}
        for kind, flat in wanted.items():
            source = tensors[f"{kind}/{name}"]
            item.of(flat)[low - item.start : low - item.start + count].copy_(source[low - start : low - start + count])
        missing[name] -= count
