"""From the engine's threads to an event loop: events of jobs as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from ggmq.service import Delta, Event

PACE_S = 0.004
QUIET_S = 15.0
"""After so long without an event whoever waits is told so."""


class Feed:
    """Events of several jobs, by number, in the order in which they came.

    Small models make thousands of tokens a second, and waking the loop for each would take the time to make them. So what
    comes within PACE_S of what was taken last is taken with what follows; and where nobody looks before the end, only the
    end wakes it.
    Threads: `emit` may be called from any.
    """

    def __init__(self, eager: bool = True) -> None:
        """eager: text is wanted as it comes."""
        self._loop, self._eager = asyncio.get_running_loop(), eager
        self._events: deque[tuple[int, Event]] = deque()
        self._there = asyncio.Event()
        self._woken, self._ended = False, False
        self._taken_s = 0.0

    def emit_as(self, number: int) -> Callable[[Event], None]:
        """What a job is given to emit with."""

        def emit(event: Event) -> None:
            self._events.append((number, event))
            ends = not isinstance(event, Delta)
            self._ended |= ends
            if not self._woken and (ends or self._eager):  # at worst it is woken twice
                self._woken = True
                self._loop.call_soon_threadsafe(self._there.set)

        return emit

    async def take(self) -> list[tuple[int, Event]]:
        """All events that are there, once there is one; none after QUIET_S."""
        try:
            async with asyncio.timeout(QUIET_S):
                while not self._events or not (self._eager or self._ended):
                    self._there.clear()
                    await self._there.wait()
        except TimeoutError:
            return []
        wait_s = self._taken_s + PACE_S - self._loop.time()
        if wait_s > 0 and not self._ended:
            await asyncio.sleep(wait_s)
        self._taken_s = self._loop.time()
        self._woken = self._ended = False  # before the events are taken: what comes after it wakes again
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken
