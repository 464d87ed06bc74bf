"""A model's weights by name: what is published, and how a serving model takes it.

Names are those of the Transformers module in memory; tied parameters come once, under their first name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from steadyhelm.errors import CorruptObjectError


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter of ``model`` once, by name, without gradients and without a copy."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def apply_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies ``tensors`` into ``model``, all or none of them, cast to its parameters' types.

    Raises:
        CorruptObjectError: names or shapes are not the model's; it is then unchanged.
    """
    own = named_weights(model)
    strange = sorted(own.keys() ^ tensors.keys())
    strange = strange or sorted(name for name in own if own[name].shape != tensors[name].shape)
    if strange:
        raise CorruptObjectError(
            f"the published weights do not fit the serving model in {len(strange)} tensors, the first of them "
            f"{strange[0]!r}: learner and engine need the same model folder"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
