"""Putting of trajectory shards, each under its key once."""

from __future__ import annotations

from collections.abc import Sequence

from steadyhelm import telemetry
from steadyhelm.data.types import ObjectRef, ShardRecord, Trajectory
from steadyhelm.errors import CorruptObjectError, ObjectExistsError
from steadyhelm.services import ShardOrder
from steadyhelm.store import ObjectStore
from steadyhelm.store.checksum import byte_views, make_ref
from steadyhelm.store.codec import decode_rollout, encode_rollout


def put_shard(store: ObjectStore, order: ShardOrder, trajectories: Sequence[Trajectory]) -> ShardRecord:
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
        return _record(order, ref, trajectories)


def adopt_shard(store: ObjectStore, order: ShardOrder) -> ShardRecord | None:
    """The record of the order's shard as an earlier try left it, or None. Raises CorruptObjectError."""
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
    return _record(order, ref, trajectories)


def _record(order: ShardOrder, ref: ObjectRef, trajectories: Sequence[Trajectory]) -> ShardRecord:
    versions = [version for item in trajectories for version in (int(item.versions.min()), int(item.versions.max()))]
    return ShardRecord(
        shard=order.shard,
        rollout=ref,
        prompt_ids=tuple(trajectory.prompt.prompt_id for trajectory in trajectories),
        num_tokens=sum(len(trajectory.tokens) for trajectory in trajectories),
        min_version=min(versions, default=order.min_version),
        max_version=max(versions, default=order.min_version),
    )
