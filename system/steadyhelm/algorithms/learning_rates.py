"""The learning rate of each optimiser step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    total: int,
    peak: float,
    schedule: Literal["constant", "cosine", "linear"],
    warmup: int,
    min_ratio: float,
) -> float:
    """The rate of optimiser step ``step``: linear warm-up to the peak, then the schedule.

    Warm-up (step ≤ W): peak·step/W. Behind it, with p = (step − W)/(total − W) and m = ``min_ratio``, ``constant``:
    peak; ``linear``: peak·(1 − (1 − m)·p); ``cosine``: peak·(m + (1 − m)·(1 + cos πp)/2). So the last step takes
    m·peak, and steps behind it stay there.

    Args:
        step: optimiser step, from 1.
        total: the run's optimiser steps.
        peak: highest rate.
        schedule: what follows the warm-up.
        warmup: W, steps of warm-up.
        min_ratio: m.
    """
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 1.0 - progress if schedule == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0
    return peak * (min_ratio + (1.0 - min_ratio) * left)
