"""The learning rate of each optimiser step."""

from __future__ import annotations

import math

from steadyhelm.config.run import Learner


def learning_rate(step: int, total: int, learner: Learner) -> float:
    """The rate of optimiser step ``step`` (from 0) of the run's ``total``: linear warm-up, then the schedule.

    Warm-up (step < W): lr·(step + 1)/W. Behind it, with p = (step − W)/(total − W) and m = ``min_lr_ratio``,
    ``constant``: lr; ``linear``: lr·(1 − (1 − m)·p); ``cosine``: lr·(m + (1 − m)·(1 + cos πp)/2).
    """
    if step < learner.warmup_steps:
        return learner.lr * (step + 1) / learner.warmup_steps
    if learner.schedule == "constant":
        return learner.lr
    done = min(1.0, (step - learner.warmup_steps) / max(1, total - learner.warmup_steps))
    left = 1.0 - done if learner.schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2.0
    return learner.lr * (learner.min_lr_ratio + (1.0 - learner.min_lr_ratio) * left)
