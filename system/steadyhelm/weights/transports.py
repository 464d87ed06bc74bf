"""From the run file's ``weights`` to what moves them."""

from __future__ import annotations

from steadyhelm.config.weights import Weights
from steadyhelm.store import ObjectStore
from steadyhelm.weights import WeightSync
from steadyhelm.weights.local import LocalWeights
from steadyhelm.weights.share import Share
from steadyhelm.weights.store import StoreWeights


def make_sync(transport: Weights, store: ObjectStore, *, threads: int, share: Share | None = None) -> WeightSync:
    """The transport that the run file names.

    Args:
        transport: the run file's part.
        store: the run's store.
        threads: blocks that are worked on at a time.
        share: a publisher's part; None for a reader, or for one who publishes all.
    """
    match transport.type:
        case "store":
            return StoreWeights(store, anchor_every=transport.anchor_every, threads=threads, share=share)
        case "local":
            return LocalWeights(store, threads=threads, share=share)
