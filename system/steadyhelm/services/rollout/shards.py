"""Putting of trajectory shards, each under its key once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steadyhelm import telemetry
from steadyhelm.data.types import FinishReason, ObjectRef, ShardRecord, Trajectory
from steadyhelm.errors import CorruptObjectError, ObjectExistsError
from steadyhelm.services import ShardOrder
from steadyhelm.store import ObjectStore
from steadyhelm.store.checksum import byte_views, make_ref
from steadyhelm.store.codec import decode_rollout, encode_rollout
from steadyhelm.telemetry import metrics as names


@dataclass(frozen=True, slots=True, kw_only=True)
class PutShard:
    """A shard that is in the store: its record, and its metrics by the names of ``telemetry``.

    Both are of the stored trajectories, so every try of an order answers with the same ones.

    Example: ``PutShard(record=ShardRecord(...), metrics={"rollout/tokens": 4210.0, ...})``
    """

    record: ShardRecord
    metrics: Mapping[str, float]


def put_shard(store: ObjectStore, order: ShardOrder, trajectories: Sequence[Trajectory]) -> PutShard:
    """Puts the order's shard; where another try of the same order was first, that one's stands.

    Raises CorruptObjectError where the object under the order's key is not its shard, StoreError.
    """
    with telemetry.span("rollout", "put shard"):
        try:
            ref = store.put(order.key, encode_rollout(list(trajectories)), if_absent=True)
        except ObjectExistsError:
            adopted = adopt_shard(store, order)
            assert adopted is not None
            return adopted
        return _put(order, ref, trajectories)


def adopt_shard(store: ObjectStore, order: ShardOrder) -> PutShard | None:
    """The order's shard as an earlier try left it, or None. Raises CorruptObjectError."""
    if not store.exists(order.key):
        return None
    data = store.get(order.key)
    ref = make_ref(order.key, byte_views(data))
    trajectories = decode_rollout(data, order.key)
    wanted = {prompt.prompt_id: place for place, prompt in enumerate(order.prompts)}
    places = [wanted.get(trajectory.prompt.prompt_id, -1) for trajectory in trajectories]
    if -1 in places or places != sorted(set(places)):
        raise CorruptObjectError(
            f"object {order.key} holds the trajectories of other prompts than its order names: two runs share one "
            "store folder, or the run file changed; use another run name"
        )
    return _put(order, ref, trajectories)


def shard_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Counts and lengths [tokens] of a shard's completions; a shard without any has no lengths."""
    lengths = [len(trajectory.tokens) for trajectory in trajectories]
    found = {names.ROLLOUT_SAMPLES: float(len(lengths)), names.ROLLOUT_TOKENS: float(sum(lengths))}
    if lengths:
        truncated = sum(trajectory.finish is FinishReason.LENGTH for trajectory in trajectories)
        found[names.LENGTH_MEAN] = sum(lengths) / len(lengths)
        found[names.LENGTH_MAX] = float(max(lengths))
        found[names.TRUNCATED_RATE] = truncated / len(lengths)
    return found


def _put(order: ShardOrder, ref: ObjectRef, trajectories: Sequence[Trajectory]) -> PutShard:
    versions = [int(item.versions.min()) for item in trajectories]
    attempts = [item.attempt for item in trajectories]
    oldest = min(zip(versions, attempts, strict=True), default=(order.min_version, 0))
    record = ShardRecord(
        shard=order.shard,
        rollout=ref,
        prompt_ids=tuple(trajectory.prompt.prompt_id for trajectory in trajectories),
        num_tokens=sum(len(trajectory.tokens) for trajectory in trajectories),
        min_version=oldest[0],
        max_version=max((int(item.versions.max()) for item in trajectories), default=order.min_version),
        attempt=oldest[1],
        oldest=tuple(versions) if len(set(versions)) > 1 else (),
    )
    return PutShard(record=record, metrics=shard_metrics(trajectories))
