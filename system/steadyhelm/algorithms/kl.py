"""Estimators of the divergence KL(π ‖ π_ref) from the log-probs of tokens that π sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from steadyhelm.algorithms.shapes import check_pair


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The unbiased estimator k1 = log π − log π_ref, per token; it may be negative.

    Args:
        logprobs: log π [N, T].
        reference: log π_ref [N, T].

    Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    check_pair(logprobs, reference)
    return logprobs - reference


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The unbiased, never negative estimator k3 = exp(−k1) − 1 + k1, per token.

    Args:
        logprobs: log π [N, T].
        reference: log π_ref [N, T].

    Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    difference = k1(logprobs, reference)
    return torch.expm1(-difference) + difference
