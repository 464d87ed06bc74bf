"""From components to one reward per sample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from steadyhelm.config.reward import CustomTerm, Reward, Term


def component_name(term: Term) -> str:
    """The name of a term's component in metrics, reports and ``Rewards.components``."""
    return term.name if isinstance(term, CustomTerm) else term.type


def combine(components: Mapping[str, NDArray[np.float32]], config: Reward) -> NDArray[np.float32]:
    """The total reward [N] of components [N] each (R1-Reward §4.3; spec §2.5).

    ``r1_reward``: w_f·format + choice·(w_c + w_k·consistency) + Σ w·custom. ``sum``: Σ w·component. A NaN in any
    component makes the total NaN, also where it would be multiplied by 0. Computed in float64.
    """
    size = len(next(iter(components.values())))
    part = {name: values.astype(np.float64) for name, values in components.items()}
    weighted = {component_name(term): term.weight * part[component_name(term)] for term in config.terms}
    if config.combine == "r1_reward" and "consistency" in weighted:
        weighted["consistency"] = part["choice"] * weighted["consistency"]
    total = np.zeros(size)
    for values in weighted.values():
        total += values
    with np.errstate(over="ignore"):
        return total.astype(np.float32)
