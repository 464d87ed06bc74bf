"""How busy a pool is between two looks: means over time, not moments."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steadyhelm.runtime.routing import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a pool had in hand since the look before.

    ``saturation`` is the mean share of a whole order that a serving member had in hand, at most 1 each;
    ``in_flight_tokens`` the mean of the expected tokens of all calls that were sent; ``at_hand`` the most calls that
    were sent or waiting at once.

    Example: ``Load(saturation=0.93, in_flight_tokens=6100.0, at_hand=8)``
    """

    saturation: float
    in_flight_tokens: float
    at_hand: int


class LoadMeter:
    """Integrates over time what a pool has in hand; ``clock`` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._serving: tuple[int, ...] = ()
        self._tokens = 0.0
        self._at_hand = 0
        self._whole = 1
        self._most = 0
        self._reset()

    def note(self, serving: Sequence[int], sent: Sequence[Work], waiting: int) -> None:
        """Takes in what holds from now on.

        Args:
            serving: samples that each serving member has in hand.
            sent: all calls that members have in hand.
            waiting: calls that wait for a member.
        """
        self._pass()
        self._serving = tuple(serving)
        self._tokens = sum(work.tokens for work in sent)
        self._at_hand = len(sent) + waiting
        self._whole = max([self._whole, *(work.samples for work in sent)])
        self._most = max(self._most, self._at_hand)

    def read(self) -> Load:
        """What was in hand since the last call, or since the beginning."""
        load = self.glance()
        self._reset()
        return load

    def glance(self) -> Load:
        """The same, up to now; the next ``read`` still counts it."""
        self._pass()
        return Load(
            saturation=self._saturated_s / self._served_s if self._served_s else 0.0,
            in_flight_tokens=self._token_s / self._total_s if self._total_s else 0.0,
            at_hand=self._most,
        )

    def _pass(self) -> None:
        now = self._clock()
        passed, self._since = now - self._since, now
        self._total_s += passed
        self._served_s += passed * len(self._serving)
        self._saturated_s += passed * sum(min(1.0, samples / self._whole) for samples in self._serving)
        self._token_s += passed * self._tokens

    def _reset(self) -> None:
        self._total_s = self._served_s = self._saturated_s = self._token_s = 0.0
        self._most = self._at_hand
