"""What the ranks tell each other besides gradients: sums, flags and short texts; never a pickled object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from steadyhelm import errors
from steadyhelm.errors import FatalError, SteadyhelmError

T = TypeVar("T")


def device() -> torch.device:
    """Where tensors of a collective have to be: on the CPU for gloo, on this rank's GPU for NCCL."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor summed over ranks, on the device it came from."""
    total = tensor.to(device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def sums(values: Mapping[str, float]) -> dict[str, float]:
    """Each value summed over ranks in float64; all ranks give the same names in the same order."""
    return dict(zip(values, summed(torch.tensor(list(values.values()), dtype=torch.float64)).tolist(), strict=True))


def largest(value: float) -> float:
    """The largest of the ranks' values."""
    found = torch.tensor([value], dtype=torch.float64, device=device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is True on any rank."""
    return largest(float(flag)) > 0.0


def texts(text: str) -> list[str]:
    """Each rank's text, in the ranks' order, on every rank."""
    data = text.encode()
    size = int(largest(len(data)))
    mine = torch.zeros(8 + size, dtype=torch.uint8)
    mine[:8] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
    if data:
        mine[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    gathered = [torch.empty_like(mine, device=device()) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine.to(device()))
    found = [bytes(item.cpu().numpy()) for item in gathered]
    return [item[8 : 8 + int.from_bytes(item[:8], "little")].decode() for item in found]


def together(work: Callable[[], T]) -> T:
    """``work()`` on every rank; where it fails on one, all raise, so that none waits for it in the next collective.

    ``work`` must not hold a collective itself. Raises the rank's own error, or the first failed rank's by class and
    message.
    """
    failure: SteadyhelmError | None = None
    try:
        result = work()
    except SteadyhelmError as error:
        failure = error
    told = texts("" if failure is None else f"{type(failure).__name__}\n{failure}")
    if failure is not None:
        raise failure
    for text in told:
        if text:
            kind, _, message = text.partition("\n")
            raise getattr(errors, kind, FatalError)(message)
    return result
