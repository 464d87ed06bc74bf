"""95 % confidence intervals of shares, also where answers come in dependent pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""


def wilson(share: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of ``share`` successes in ``count`` independent trials (Wilson 1927).

    (p + z²/2n ± z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n); ``count`` may be an effective, fractional one.
    Raises ValueError where ``count`` is not positive or ``share`` is not in [0, 1].
    """
    if count <= 0 or not 0 <= share <= 1:
        raise ValueError(f"share {share} of {count} trials: the share must be in [0, 1] and there must be trials")
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def clustered(scores: Sequence[float], answers_per_cluster: int) -> tuple[float, float]:
    """Wilson's interval of the mean of ``scores`` [clusters], each the share of right answers in one cluster.

    A pair's two orders are answered dependently, so clusters are what is independent. The effective number of trials
    is p(1−p)/(s²/n) with the clusters' population variance s², at most the number of answers; where all clusters
    agree on 0 or 1 it is the number of clusters, the cautious end.
    """
    count = len(scores)
    if count == 0:
        raise ValueError("no clusters: there is nothing to take an interval of")
    share = math.fsum(scores) / count
    variance = math.fsum((score - share) ** 2 for score in scores) / count
    spread = share * (1 - share)
    effective = float(count) if spread == 0 else count * answers_per_cluster
    if variance > 0:
        effective = min(effective, count * spread / variance)
    return wilson(share, effective)
