"""How published weights travel from the learner to the engines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from steadyhelm.config.base import Count, Part


class StoreTransport(Part):
    """Weights through the object store: lossless deltas, and all of them now and then."""

    type: Literal["store"] = "store"
    """Discriminator."""
    anchor_every: Count = 20
    """Versions from one that is stored whole (an anchor) to the next; those in between are stored as the difference to
    the version before. 1 stores each one whole, and saves learner and engines a copy of the weights in memory."""


class LocalTransport(Part):
    """Weights through shared memory, for a learner and engines on one machine that see the same ``/dev/shm``.

    It has to hold three versions. Nothing but a notice goes to the store; a run that is resumed publishes anew.
    """

    type: Literal["local"] = "local"
    """Discriminator."""


class BroadcastTransport(Part):
    """Whole weights by collectives, from each learner rank to all engines at a time, for a fast network.

    Engines connect to the learner's ranks, on any port. Nothing but a notice goes to the store; a run that is resumed
    publishes anew.
    """

    type: Literal["broadcast"] = "broadcast"
    """Discriminator."""


Weights = Annotated[StoreTransport | LocalTransport | BroadcastTransport, Field(discriminator="type")]
"""How weights travel; ``type`` says which way."""
