"""Whose turn it is: keys that are due at a time, each in at most one pair of hands."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class WorkQueue(Generic[Key]):
    """Keys with the times at which they are due; a key is there once, at its earliest time.

    ``add`` of a key that is being worked on makes it due again once ``done`` says so. All methods may be called from
    any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._held: set[Key] = set()
        self._after: dict[Key, float] = {}
        self._number = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nothing is given out any more."""
        return self._closed

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: Key, delay_s: float = 0.0) -> None:
        """Makes ``key`` due in ``delay_s`` seconds, or earlier where it is due earlier."""
        when = self._clock() + delay_s
        with self._changed:
            if key in self._held:
                self._after[key] = min(when, self._after.get(key, when))
            elif when < self._due.get(key, float("inf")):
                self._put(key, when)

    def get(self, timeout_s: float = 1.0) -> Key | None:
        """The key that is due longest, which is then the caller's until ``done``; None where none gets due in time."""
        ends = self._clock() + timeout_s
        with self._changed:
            while not self._closed:
                now = self._clock()
                while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
                    heapq.heappop(self._heap)  # it was made due earlier, or is in somebody's hands
                if self._heap and self._heap[0][0] <= now:
                    _, _, key = heapq.heappop(self._heap)
                    del self._due[key]
                    self._held.add(key)
                    return key
                if now >= ends:
                    return None
                upcoming = self._heap[0][0] if self._heap else ends
                self._changed.wait(max(0.0, min(upcoming, ends) - now))
        return None

    def done(self, key: Key) -> None:
        """Gives a key back."""
        with self._changed:
            self._held.discard(key)
            when = self._after.pop(key, None)
            if when is not None:
                self._put(key, when)

    def close(self) -> None:
        """Wakes everybody up; nothing is given out any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _put(self, key: Key, when: float) -> None:
        self._due[key] = when
        self._number += 1
        heapq.heappush(self._heap, (when, self._number, key))
        self._changed.notify()
