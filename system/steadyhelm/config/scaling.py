"""How many engines a run may have, and what decides between."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from steadyhelm.config.base import Count, Part


class Scaling(Part):
    """Engines that come and go with the load, between two bounds."""

    min: Count = 1
    """Fewest engines."""
    max: Count
    """Most engines."""
    learner_wait: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of an iteration that the learner may wait for its batch. Where ``schedule.max_staleness`` is 0 it always
    waits while the engines work: 0.2 then means engines enough to roll a batch out in a quarter of the time that all
    the rest of an iteration takes."""
    settle: Count = 2
    """Whole iterations that a decision looks at; half of them are enough for one that asks for more engines. The first
    one behind a change never counts."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(
                f"rollout.scaling.min is {self.min}, but rollout.scaling.max is {self.max}: lower the former or raise "
                "the latter"
            )
        return self
