"""A rank's share of the fp32 masters and of Adam's moments, parameter by parameter, under any ZeRO stage.

DeepSpeed lays parameters out in flat buffers that it cuts at rank borders; how depends on stage and number of ranks.
A ``Fragment`` says which elements of which parameter a rank holds and where, so that what is written under one layout
can be read under another, bit for bit and without a collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's first and second moment, by their names in the optimiser's state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """Elements ``start`` to ``start + numel`` of the flattened parameter ``name``.

    They lie at ``offset`` of ``flat``, the fp32 tensor that the optimiser steps. ``owned`` is False for the copies of
    a fragment (stage 0) that another rank saves.
    """

    name: str
    start: int
    numel: int
    flat: torch.Tensor
    offset: int
    owned: bool = True

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fragment's elements [numel] of ``tensor``, which is laid out like ``flat``."""
        return tensor.detach().reshape(-1).narrow(0, self.offset, self.numel)


def fragments(engine: Any, names: dict[torch.nn.Parameter, str], rank: int, world_size: int) -> Iterator[Fragment]:
    """What this rank holds of each trained parameter.

    Args:
        engine: a DeepSpeed engine of stage 0 (fp32 without a ZeRO optimiser), 1, 2 or 3.
        names: name of every trained parameter.
        rank: of this process.
        world_size: number of ranks.
    """
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage == 0:
        for index, (parameter, name) in enumerate(names.items()):
            owned = index % world_size == rank
            yield Fragment(name=name, start=0, numel=parameter.numel(), flat=parameter, offset=0, owned=owned)
    elif stage < 3:
        for group, parameters in enumerate(optimizer.bit16_groups):
            flat = optimizer.single_partition_of_fp32_groups[group]
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:  # None where another rank holds all of it
                    here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                    yield Fragment(
                        name=names[parameter], start=here.start, numel=here.numel, flat=flat, offset=there.start
                    )
    else:
        for parameter, name in names.items():
            group, offset, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * partition
            whole = int(getattr(parameter, "ds_numel"))  # noqa: B009 - DeepSpeed's attribute; the tensor itself may be empty
            numel = max(0, min(partition, whole - start))  # the last ranks' partitions are padded
            if numel:
                flat = optimizer.fp32_partitioned_groups_flat[group]
                yield Fragment(name=name, start=start, numel=numel, flat=flat, offset=offset)


def masters_changed(engine: Any) -> None:
    """Makes the model's parameters those of the fp32 masters; all ranks call it together."""
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_prologue()  # partitions what is gathered
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # gathers again what stays gathered


class Moments:
    """Adam's state behind a DeepSpeed engine: the moments beside each flat tensor, and the common step count."""

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        self._adam = getattr(optimizer, "optimizer", optimizer)  # a ZeRO optimiser wraps ours

    @property
    def steps(self) -> int:
        """Optimiser steps that the moments have seen; 0 before the first."""
        return max((int(state["step"]) for state in self._adam.state.values() if "step" in state), default=0)

    def get(self, flat: torch.Tensor, moment: str) -> torch.Tensor:
        """The moment's tensor, laid out like ``flat``. Raises KeyError before the first step."""
        tensor: torch.Tensor = self._adam.state[flat][moment]
        return tensor

    def clear(self) -> None:
        """Back to the state before the first step."""
        for state in self._adam.state.values():
            state.clear()

    def create(self, flat: torch.Tensor, steps: int) -> None:
        """Zero moments for ``flat`` after ``steps`` steps, to be filled in."""
        state = self._adam.state[flat]
        offloaded = type(self._adam).__name__ == "DeepSpeedCPUAdam"  # counts in an int, torch in a tensor
        state["step"] = steps if offloaded else torch.tensor(float(steps), device=flat.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(flat, requires_grad=False)
