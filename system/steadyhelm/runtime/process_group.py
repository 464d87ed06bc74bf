"""``torch.distributed`` among a learner group's ranks.

Ray Train's own way to it imports torch in the driver and in its controller too: 400 MB and seconds in each of two
processes that compute nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.collective import broadcast_from_rank_zero


class _Ranks(Backend):  # type: ignore[misc]
    """Nothing to do outside the ranks, which see all GPUs of their node and take the one of their local rank."""

    share_cuda_visible_devices = True


class RanksConfig(BackendConfig):  # type: ignore[misc]  # Ray's have no types
    """Ray Train's configuration for a training function that enters ``joined``."""

    @property
    def backend_cls(self) -> type[Backend]:
        """See ``BackendConfig``."""
        return _Ranks


@contextmanager
def joined(*, gpu: bool, deadline_s: float) -> Iterator[None]:
    """Within it this rank is in the default process group; all ranks of a training function enter it first.

    Args:
        gpu: NCCL among GPUs instead of gloo among CPUs.
        deadline_s: longest wait for the other ranks, here and in each collective.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    context = ray.train.get_context()
    rank, world, local = context.get_world_rank(), context.get_world_size(), context.get_local_rank()
    timeout = timedelta(seconds=deadline_s)
    if gpu:
        torch.cuda.set_device(local)
    host = ray.util.get_node_ip_address()
    meet = partial(TCPStore, wait_for_workers=False, timeout=timeout)
    ours = meet(host, 0, is_master=True) if rank == 0 else None
    address = broadcast_from_rank_zero(f"{host}:{ours.port}" if ours else None)
    master, _, port = address.rpartition(":")
    store = ours or meet(master, int(port), is_master=False)
    os.environ |= {  # DeepSpeed reads them
        "MASTER_ADDR": master,
        "MASTER_PORT": port,
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        "LOCAL_SIZE": str(context.get_local_world_size()),
    }
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
