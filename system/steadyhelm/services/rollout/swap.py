"""New weights for a model that serves: all work is done beside it, and the model pauses only while pointers change.

A tensor of the model is given the new one's memory, where it has memory of its own; one that shares it with a tensor of
another shape (a part of a fused one) is copied into while the model pauses. Names of one tensor stay one tensor. On a
CPU the model serves the very tensors that were fetched; on another device they are copied there first, which takes
memory for a second set of weights until the swap. Where the device has none left, they are copied in the pause.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from steadyhelm.data.types import PolicyVersion
from steadyhelm.errors import ModelError
from steadyhelm.weights.mirror import words


class Swap:
    """A version's tensors, ready to be put into a model at once.

    Whoever serves the model keeps it as long as the model has these tensors: it keeps them from being written to.

    Args:
        model: may serve meanwhile.
        tensors: by the names of the model's ``state_dict``.
        version: whose they are, for messages.

    Raises:
        ModelError: names, shapes or types are not the model's.
    """

    def __init__(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], version: PolicyVersion) -> None:
        self._tensors = tensors
        self._exchanges: list[tuple[list[torch.Tensor], torch.Tensor]] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._former: list[torch.Tensor] = []
        own: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        groups = _groups(own)
        _require_fit(own, groups, tensors, version)
        shared = _overlapping((*(own[names[0]] for names in groups), *model.buffers()))
        for names in groups:
            target = own[names[0]]
            given = tensors[next(name for name in names if name in tensors)]
            new = None if _memory(target) in shared or not target.is_contiguous() else _on_device(given, target.device)
            if new is None:
                self._copies.append((target, given))
            else:
                unnamed = [buffer for buffer in model.buffers() if _memory(buffer) == _memory(target)]
                self._exchanges.append(([*(own[name] for name in names), *unnamed], new))

    def put(self) -> None:
        """Gives the model the tensors; no other thread may use it meanwhile."""
        for holders, new in self._exchanges:
            self._former.append(holders[0].data)  # giving memory back takes time: see ``forget_former``
            for holder in holders:
                holder.data = new
        with torch.inference_mode():
            for target, new in self._copies:
                target.copy_(new)

    def forget_former(self) -> None:
        """Gives back the memory that the model used before ``put``, and the tensors that it has copies of."""
        self._former.clear()
        self._copies.clear()
        fetched = {tensor.data_ptr() for tensor in self._tensors.values() if tensor.numel()}
        if not any(new.data_ptr() in fetched for _, new in self._exchanges):
            self._tensors = {}


Memory = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Where a tensor's elements are: address, shape and strides."""


def _memory(tensor: torch.Tensor) -> Memory:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _groups(own: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names of each tensor: those that are the same elements."""
    groups: dict[Memory, list[str]] = {}
    for name, tensor in own.items():
        groups.setdefault(_memory(tensor), []).append(name)
    return list(groups.values())


def _overlapping(tensors: Iterable[torch.Tensor]) -> set[Memory]:
    """The tensors that have bytes in common with other elements than theirs."""
    ends: dict[Memory, int] = {}
    for tensor in tensors:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            ends[_memory(tensor)] = tensor.data_ptr() + (last + 1) * tensor.element_size()
    found: set[Memory] = set()
    reach, last_to_reach = 0, None
    for memory in sorted(ends):
        if last_to_reach is not None and memory[0] < reach:
            found |= {memory, last_to_reach}
        if ends[memory] > reach:
            reach, last_to_reach = ends[memory], memory
    return found


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """The tensor, contiguous, where ``device`` has room for it."""
    try:
        return tensor.to(device).contiguous()
    except torch.OutOfMemoryError:
        return None


def _require_fit(
    own: Mapping[str, torch.Tensor],
    groups: Iterable[list[str]],
    tensors: Mapping[str, torch.Tensor],
    version: PolicyVersion,
) -> None:
    """Raises ModelError unless ``tensors`` fit a model's own exactly.

    A tensor of several names (a tied output layer) may come under one of them or under several with equal values.
    """
    where = f"weights {version} do not fit the engine's model"
    remedy = "engine and learner need the same model.path and model.dtype"
    for name, tensor in tensors.items():
        if name not in own:
            raise ModelError(f"{where}: it has no tensor {name!r}; {remedy}")
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise ModelError(
                f"{where}: {name!r} is {tensor.dtype} {tuple(tensor.shape)} but must be {own[name].dtype} "
                f"{tuple(own[name].shape)}; {remedy}"
            )
    for names in groups:
        given = [name for name in names if name in tensors]
        if not given:
            raise ModelError(f"{where}: the tensor {names[0]!r} is missing; {remedy}")
        if any(not torch.equal(words(tensors[given[0]]), words(tensors[name])) for name in given[1:]):
            raise ModelError(f"{where}: {', '.join(given)} are one tensor in the model but come with unequal values")
