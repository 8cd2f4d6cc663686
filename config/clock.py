"""Time as a process lives it: what it sleeps through, because it was suspended, is not held against its peers."""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST_STEP_S = 1.0


class LivedClock:
    """Monotonic seconds, of which one call to the next counts one at most, or `longest_step_s`: whoever calls some times a
    second misses nothing that others did, and has not waited for them while the process, or the whole host, was asleep.

    Threads: use from one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, longest_step_s: float = LONGEST_STEP_S) -> None:
        self._clock, self._longest_step_s = clock, longest_step_s
        self._last = self._now = clock()

    def now_s(self) -> float:
        last, self._last = self._last, self._clock()
        self._now += min(self._last - last, self._longest_step_s)
        return self._now
