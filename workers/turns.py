"""Whose request comes next where several sessions use one worker: no clock, no socket.

Start-time fair queueing by the time that requests took (Goyal, Vin and Cheng, 1996): who has had less comes first, and who
was away gains nothing by it. With a short wait for who is about to ask again, as disks have it (Iyer and Druschel, 2001):
a client's tokens are asked for one after the other, and without the wait a piece of another's long prompt would go between
any two of them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator

from protocol.frames import Message
from protocol.messages import Command
from workers.work import Key

WAIT_S = 0.003
"""So long after a compute its session may ask for the next one before others come."""
MANY = 100
"""Who has more requests waiting has FLOOD_SHARE of the time that others have: for him the last of them counts."""
FLOOD_SHARE = 0.25
AWAY_S = 1.0
"""One who did not is not waited for in this time."""


class Turns:
    """Times are seconds; those of requests count for the turns, those of the clock for the wait."""

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


Request = tuple[bytes, Message]
"""With the routing id of its peer."""


class Waiting:
    """Requests that wait, in the order in which they came."""

    def __init__(self) -> None:
        self._queue: deque[Request] = deque()
        self._n_of: Counter[tuple[bytes, int]] = Counter()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._queue)

    def append(self, rid: bytes, message: Message) -> None:
        self._queue.append((rid, message))
        self._n_of[_place(rid, message)] += 1

    def insert(self, rid: bytes, message: Message) -> None:
        """Before all that its peer sent after it."""
        at = (i for i, (r, q) in enumerate(self._queue) if r == rid and q.seq > message.seq)
        self._queue.insert(next(at, len(self._queue)), (rid, message))
        self._n_of[_place(rid, message)] += 1

    def firsts(self) -> Iterator[tuple[bytes, int, int]]:
        """Where the first request of each session on each channel is: routing id, session, index. What concerns a device as
        a whole counts as a session of its own, 0; HELLO keeps its place, and nothing behind it is a first one."""
        seen: set[tuple[bytes, int]] = set()
        for i, (rid, message) in enumerate(self._queue):
            if message.command == Command.HELLO:
                return
            place = _place(rid, message)
            if place not in seen:
                seen.add(place)
                yield (*place, i)
            if len(seen) == len(self._n_of):  # a flood of one is not gone through for each of its requests
                return

    def flood(self, rid: bytes, message: Message) -> bool:
        """Whether this one's session has so many waiting that it cannot be in a hurry for each."""
        return self._n_of[_place(rid, message)] > MANY

    def take(self, i: int) -> Request:
        taken = self._queue[i]
        del self._queue[i]
        self._forget(taken)
        return taken

    def remove(self, wanted: Callable[[bytes, Message], bool]) -> list[Request]:
        """Take out all that are meant."""
        taken = [of for of in self._queue if wanted(*of)]
        if taken:
            self._queue = deque(of for of in self._queue if not wanted(*of))
            for of in taken:
                self._forget(of)
        return taken

    def _forget(self, taken: Request) -> None:
        place = _place(*taken)
        self._n_of[place] -= 1
        if not self._n_of[place]:
            del self._n_of[place]


def _place(rid: bytes, message: Message) -> tuple[bytes, int]:
    return rid, getattr(message.header, "session", 0)
