"""What every function here asks of its tensors, and the tokens that count."""

from __future__ import annotations

from torch import Tensor
from torch import bool as bool_


def check_sequences(valid: Tensor, *scalars: Tensor) -> None:
    """Asserts that ``valid`` is bool [N] and that each of ``scalars`` is [N] too."""
    assert valid.ndim == 1, f"valid must be [N], not {tuple(valid.shape)}"
    assert valid.dtype == bool_, f"valid must be bool, not {valid.dtype}"
    for scalar in scalars:
        assert scalar.shape == valid.shape, f"shape {tuple(scalar.shape)} is not valid's {tuple(valid.shape)}"


def check_tokens(mask: Tensor, *values: Tensor) -> None:
    """Asserts that ``mask`` is bool [N, T] and that each of ``values`` is floating point of the same shape."""
    assert mask.ndim == 2, f"mask must be [N, T], not {tuple(mask.shape)}"
    assert mask.dtype == bool_, f"mask must be bool, not {mask.dtype}"
    for value in values:
        assert value.is_floating_point(), f"values must be floating point, not {value.dtype}"
        assert value.shape == mask.shape, f"shape {tuple(value.shape)} is not the mask's {tuple(mask.shape)}"


def check_pair(values: Tensor, others: Tensor) -> None:
    """Asserts that both are floating point [N, T] of the same shape."""
    assert values.ndim == 2, f"values must be [N, T], not {tuple(values.shape)}"
    assert values.is_floating_point(), f"values must be floating point, not {values.dtype}"
    assert others.is_floating_point(), f"values must be floating point, not {others.dtype}"
    assert others.shape == values.shape, f"shapes {tuple(values.shape)} and {tuple(others.shape)} differ"


def active_tokens(mask: Tensor, valid: Tensor) -> Tensor:
    """The tokens that count: completion tokens of valid sequences, bool [N, T]."""
    check_tokens(mask)
    check_sequences(valid)
    assert mask.shape[0] == valid.shape[0], f"mask has {mask.shape[0]} sequences, valid has {valid.shape[0]}"
    return mask & valid[:, None]
