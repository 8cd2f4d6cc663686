"""Whose request comes next where several sessions use one worker: no clock, no socket.

Start-time fair queueing by the time that requests took (Goyal, Vin and Cheng, 1996): who has had less comes first, and who
was away gains nothing by it. With a short wait for who is about to ask again, as disks have it (Iyer and Druschel, 2001):
a client's tokens are asked for one after the other, and without the wait a piece of another's long prompt would go between
any two of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from protocol.frames import Message
from protocol.messages import Command
from workers.work import Key

WAIT_S = 0.003
"""So long after a compute its session may ask for the next one before others come."""
MANY = 4
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
        self._ran_at_s: dict[Key, float] = {}

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

    def overtakes(self, waiting: Collection[Key], running: Key, ran_s: float) -> Key | None:
        """Whose request need not wait until the one is done that has run for so long: of those who wait, who has had least
        of the time, if that is less than `running` has had with it."""
        chosen = min((k for k in waiting if k != running), key=self._start_s, default=None)
        return chosen if chosen is not None and self._start_s(chosen) < self._start_s(running) + ran_s else None

    def others(self, key: Key, now_s: float) -> bool:
        """Whether somebody else asked lately."""
        return any(now_s - s < AWAY_S for k, s in self._ran_at_s.items() if k != key)

    def ran(self, key: Key, took_s: float, now_s: float, goes_on: bool = True) -> None:
        """What was chosen is done. goes_on: its session is about to ask again, if it does as it did."""
        self._used_s[key] = self._start_s(key) + took_s
        self._ran_at_s[key] = now_s
        if goes_on and now_s >= self._away_until_s.get(key, 0.0):
            self._due_s[key] = now_s + WAIT_S

    def keep(self, living: Collection[Key]) -> None:
        """Forget all others."""
        self._used_s = {key: s for key, s in self._used_s.items() if key in living}
        self._away_until_s = {key: s for key, s in self._away_until_s.items() if key in living}
        self._due_s = {key: s for key, s in self._due_s.items() if key in living}
        self._ran_at_s = {key: s for key, s in self._ran_at_s.items() if key in living}

    def _start_s(self, key: Key) -> float:
        return max(self._used_s.get(key, 0.0), self._virtual_s)


Request = tuple[bytes, Message]
"""With the routing id of its peer."""
Place = tuple[bytes, int]
"""A session on one channel: routing id and number. What concerns a device as a whole counts as a session of its own, 0."""


class Waiting:
    """Requests that wait: a queue for each session on each channel, so that many in one cost the others nothing. HELLO is in
    none: what came before it is done before it, and what came behind waits for it."""

    def __init__(self) -> None:
        self._of: dict[Place, deque[tuple[int, Message]]] = {}
        self._hellos: deque[tuple[int, Request]] = deque()
        self._n_came = self._n = 0

    def __len__(self) -> int:
        return self._n

    def peers(self) -> set[bytes]:
        """Routing ids of all who wait."""
        return {rid for rid, _ in self._of} | {rid for _, (rid, _) in self._hellos}

    def append(self, rid: bytes, message: Message) -> None:
        self._n_came += 1
        self._n += 1
        if message.command == Command.HELLO:
            self._hellos.append((self._n_came, (rid, message)))
        else:
            self._of.setdefault(_place(rid, message), deque()).append((self._n_came, message))

    def insert(self, rid: bytes, message: Message) -> None:
        """Before all that its session sent after it."""
        queue = self._of.get(_place(rid, message), ())
        at = next((i for i, (_, q) in enumerate(queue) if q.seq > message.seq), None)
        if at is None or isinstance(queue, tuple):
            self.append(rid, message)
        else:
            self._n += 1
            queue.insert(at, (queue[at][0], message))

    def firsts(self) -> list[Place]:
        """Whose first request may be done now, in the order in which these came."""
        before = self._hellos[0][0] if self._hellos else self._n_came + 1
        heads = sorted((queue[0][0], place) for place, queue in self._of.items() if queue[0][0] < before)
        return [place for _, place in heads]

    def flood(self, place: Place) -> bool:
        """Whether so many wait there that none of them can be in a hurry."""
        return len(self._of.get(place, ())) > MANY

    def first(self, place: Place) -> Message:
        """That which `take` would give."""
        return self._of[place][0][1]

    def take(self, place: Place | None) -> Request:
        """The first there; None: the first HELLO."""
        self._n -= 1
        if place is None:
            return self._hellos.popleft()[1]
        queue = self._of[place]
        _, message = queue.popleft()
        if not queue:
            del self._of[place]
        return place[0], message

    def remove(self, rid: bytes, seq: int) -> list[Request]:
        """Take out what a peer sent under a number."""
        taken: list[Request] = []
        for place in [p for p in self._of if p[0] == rid]:
            queue = self._of[place]
            found = [q for q in queue if q[1].seq == seq]
            for q in found:
                queue.remove(q)
                taken.append((rid, q[1]))
            if not queue:
                del self._of[place]
        self._n -= len(taken)
        return taken


def _place(rid: bytes, message: Message) -> Place:
    return rid, getattr(message.header, "session", 0)
