"""Whose turn it is: requests wait in queues by key, bounded, and the key that was served least comes next.

Source: Demers, Keshav, Shenker: Analysis and simulation of a fair queueing algorithm (start-time form).

Threads: use from one at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from protocol.errors import Overloaded

T = TypeVar("T")
SHARE = 0.75
"""A key may fill so much of the room; the rest is for others."""


class FairQueue(Generic[T]):
    """Attributes:
    n_max: requests that may wait, of all keys.
    """

    def __init__(self, n_max: int) -> None:
        self.n_max = n_max
        self._waiting: dict[str, deque[T]] = {}
        self._served: dict[str, float] = {}
        self._now = 0.0
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[T]:
        for queue in self._waiting.values():
            yield from queue

    def n_of(self, key: str) -> int:
        """Requests of one key that wait."""
        return len(self._waiting.get(key, ()))

    def put(self, key: str, request: T) -> None:
        """Errors: Overloaded when there is no room, for anyone or for this key."""
        if self._n >= self.n_max:
            raise Overloaded(f"queue: {self._n} requests wait, and there is room for {self.n_max}; try again later")
        most = max(1, int(SHARE * self.n_max))
        if self.n_of(key) >= most:
            raise Overloaded(f"queue: {most} of your requests wait, and no key may have more; try again later")
        self._waiting.setdefault(key, deque()).append(request)
        self._n += 1

    def take(self) -> T:
        """The next request: the oldest of the key that was served least. Errors: IndexError when none waits."""
        if not self._n:
            raise IndexError("nobody waits")
        key = min(self._waiting, key=lambda k: max(self._served.get(k, 0.0), self._now))
        self._now = max(self._served.get(key, 0.0), self._now)
        self._served[key] = self._now
        queue = self._waiting[key]
        request = queue.popleft()
        self._emptied(key)
        return request

    def remove(self, key: str, request: T) -> bool:
        """Take out one that does not want to wait any more. Returns: whether it was there."""
        queue = self._waiting.get(key)
        if queue is None or request not in queue:
            return False
        queue.remove(request)
        self._emptied(key)
        return True

    def charge(self, key: str, cost: float) -> None:
        """A key was served: with so many tokens, say. Keys that were away do not save up for later."""
        self._served[key] = max(self._served.get(key, 0.0), self._now) + cost
        if len(self._served) > 4096:  # whoever is no longer ahead of the others need not be remembered
            self._served = {k: at for k, at in self._served.items() if at > self._now}

    def _emptied(self, key: str) -> None:
        self._n -= 1
        if not self._waiting[key]:
            del self._waiting[key]
