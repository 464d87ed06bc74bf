"""Host copies of tensors that live on a device, kept up to date by what changes there.

::

    device   former copy ─┬─ compare ─► places and values of what changed ─┐
             new tensor ──┘                                                │ the only transfer
    host     copy ◄──────────────────────────── written in its place ◄─────┘

An optimiser step at RL learning rates changes a percent or two of bf16 weights, so that the bus carries a tenth of the
whole. The price is the former copy on the device, and the one on the host. Everything is torch's own operations, which
do the same on every device.
"""

from __future__ import annotations

import torch

CHUNK = 1 << 26
"""Elements that are compared at a time: half a gigabyte of places at most."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mirror:
    """Keeps a copy of each tensor that it was shown, by name."""

    def __init__(self) -> None:
        self._copies: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def host(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the host, bit for bit, contiguous, and as it is until the next call with this name."""
        former, copy = self._copies.pop(name, (None, None))  # what fails half way is not built on
        if former is None or copy is None or (former.shape, former.dtype) != (tensor.shape, tensor.dtype):
            former = tensor.detach().clone(memory_format=torch.contiguous_format)
            copy = former.to("cpu", copy=True)
        elif former.device != tensor.device:
            former = tensor.detach().clone(memory_format=torch.contiguous_format)
            copy.copy_(former)
        else:
            _bring(words(former), words(tensor.detach()), words(copy))
        self._copies[name] = former, copy
        return copy


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bit patterns as integers [elements], in row-major order; shares a contiguous tensor's memory."""
    whole = tensor.contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # of a single element contiguous() may leave any stride
    return flat.view(_WORDS[tensor.element_size()])


def changes(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where words [n] differ, int64 in rising order, and the new words there; on the words' device."""
    places = torch.nonzero(old != new).reshape(-1)
    return places, new[places]


def _bring(former: torch.Tensor, new: torch.Tensor, copy: torch.Tensor) -> None:
    """Makes ``former``, on the device of ``new``, and ``copy``, on the host, equal to ``new``: all words [n]."""
    for begin in range(0, len(new), CHUNK):
        part = slice(begin, begin + CHUNK)
        places, values = changes(former[part], new[part])
        copy[part][places.cpu()] = values.cpu()
        former[part][places] = values
