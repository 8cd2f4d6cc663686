"""Whose request comes next where several sessions use one worker: no clock, no socket.

Start-time fair queueing by the time that requests took (Goyal, Vin and Cheng, 1996): who has had less comes first, and who
was away gains nothing by it. With a short wait for who is about to ask again, as disks have it (Iyer and Druschel, 2001):
a client's tokens are asked for one after the other, and without the wait a piece of another's long prompt would go between
any two of them.
"""

from __future__ import annotations

from collections.abc import Collection

from workers.work import Key

WAIT_S = 0.003
"""So long after a compute its session may ask for the next one before others come."""
AWAY_S = 1.0
"""One who did not is not waited for in this time."""


class Turns:
    """Times are seconds; those of computes count for the turns, those of the clock for the wait."""

    def __init__(self) -> None:
        self._used_s: dict[Key, float] = {}
        self._virtual_s = 0.0
        self._away_until_s: dict[Key, float] = {}
        self._due_s: dict[Key, float] = {}

    def choose(self, waiting: Collection[Key], now_s: float) -> Key | None:
        """Whose turn it is, of those who wait, in the order in which they came; None: nobody's yet, ask again soon."""
        chosen = min(waiting, key=self._start_s)
        before = [k for k in self._due_s if k not in waiting and self._start_s(k) <= self._start_s(chosen)]
        if any(now_s < self._due_s[k] for k in before):
            return None
        for key in before:
            del self._due_s[key]
            self._away_until_s[key] = now_s + AWAY_S
        self._due_s.pop(chosen, None)
        self._virtual_s = self._start_s(chosen)
        return chosen

    def ran(self, key: Key, took_s: float, now_s: float, goes_on: bool = True) -> None:
        """What was chosen is done. goes_on: its session is about to ask again, if it does as it did."""
        self._used_s[key] = self._start_s(key) + took_s
        if goes_on and now_s >= self._away_until_s.get(key, 0.0):
            self._due_s[key] = now_s + WAIT_S

    def keep(self, living: Collection[Key]) -> None:
        """Forget all others."""
        self._used_s = {key: s for key, s in self._used_s.items() if key in living}
        self._away_until_s = {key: s for key, s in self._away_until_s.items() if key in living}
        self._due_s = {key: s for key, s in self._due_s.items() if key in living}

    def _start_s(self, key: Key) -> float:
        return max(self._used_s.get(key, 0.0), self._virtual_s)
