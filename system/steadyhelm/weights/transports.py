"""From the run file's ``weights`` to what moves them."""

from __future__ import annotations

from threading import Thread

import torch

from steadyhelm.config.weights import Weights
from steadyhelm.store import ObjectStore
from steadyhelm.weights import WeightSync
from steadyhelm.weights.blocks import compile_for
from steadyhelm.weights.broadcast import LOOPBACK, BroadcastWeights
from steadyhelm.weights.local import LocalWeights
from steadyhelm.weights.share import Share
from steadyhelm.weights.store import StoreWeights


def make_sync(
    transport: Weights,
    store: ObjectStore,
    *,
    dtype: torch.dtype,
    threads: int,
    share: Share | None = None,
    host: str = LOOPBACK,
) -> WeightSync:
    """The transport that the run file names. What it has to compile it compiles beside the caller's further start.

    Args:
        transport: the run file's part.
        store: the run's store.
        dtype: of most of the tensors.
        threads: blocks that are worked on at a time.
        share: a publisher's part; None for a reader, or for one who publishes all.
        host: a publisher's address, under which readers reach it.
    """
    match transport.type:
        case "store":
            if transport.anchor_every > 1:
                Thread(target=compile_for, args=(dtype,), name="weights").start()
            return StoreWeights(store, anchor_every=transport.anchor_every, threads=threads, share=share)
        case "local":
            return LocalWeights(store, threads=threads, share=share)
        case "broadcast":
            return BroadcastWeights(store, host=host, threads=threads, share=share)
