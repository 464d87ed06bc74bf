"""Machines that are about to go: what Ray knows of spot notices and of nodes that its autoscaler takes away."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ray._private.state import state

POLL_S = 5.0
"""Seconds between two looks."""
UNKNOWN_S = 60.0
"""How long a node that is drained without a deadline is taken to last."""


def leaving_nodes() -> Mapping[str, float]:
    """Seconds left to each node that is being drained, by its id.

    Ray has no public call for it; its own services (Serve, Train) ask the same one.
    """
    try:
        return seconds_left(state.get_draining_nodes(), time.time())
    except Exception:  # Ray raises anything while its head restarts; a node that then goes costs its calls a second try
        return {}


def seconds_left(deadlines_ms: Mapping[str, int], now_s: float) -> dict[str, float]:
    """Seconds to each node's deadline in Unix milliseconds, where 0 stands for none."""
    return {
        node: max(0.0, deadline / 1000 - now_s) if deadline else UNKNOWN_S for node, deadline in deadlines_ms.items()
    }
