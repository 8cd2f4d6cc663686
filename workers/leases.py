"""Weights that stay when their session has ended, for a while, so that the next one which wants the same has them at once;
and memory of sessions whose broker has gone, for those who were its clients.

A buffer of weights is kept only if its client said by name what it was to hold (`protocol.content`), and the tensors that
this worker verified itself make up that name; one of memory has a secret for its name. Whoever asks for a buffer of that
name takes it over, packed as it is; it belongs to one session or to none. What is kept counts as free: it goes as soon as
memory is short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from config.clock import LivedClock
from protocol.content import Part, content_name
from protocol.graph import Graph
from protocol.ops import op_of
from workers.devices.base import Buffer, Device
from workers.ticks import Tick, nothing

MAX_PARTS = 1 << 16
MAX_KEPT = 4096


def overlap(a: range, b: range) -> bool:
    """Whether two ranges of bytes have some in common."""
    return a.start < b.stop and b.start < a.stop


class Content:
    """What a session's buffer holds, as far as it counts for its name.

    Attributes:
        name: what the client said that it will hold.
    """

    def __init__(self, name: bytes, n_bytes: int, parts: Iterable[Part] = ()) -> None:
        """parts: what it holds already."""
        self.name, self.n_bytes = name, n_bytes
        self._spoilt = False
        self._parts: dict[int, Part] = {p.offset: p for p in parts}

    def verified(self, part: Part) -> None:
        """A tensor is there, and its bytes have its hash."""
        self._parts[part.offset] = part
        self._spoilt |= len(self._parts) > MAX_PARTS

    def holds(self, part: Part) -> bool:
        """Whether this tensor has been verified here, and nothing came into it since."""
        return not self._spoilt and self._parts.get(part.offset) == part

    def part_of(self, digest: bytes, n_bytes: int) -> Part | None:
        """A tensor of this hash that has been verified here, and that nothing came into since."""
        if self._spoilt:
            return None
        return next((p for p in self._parts.values() if p.hash == digest and p.n_bytes == n_bytes), None)

    def changed(self, part: range) -> None:
        """Something else has come into these bytes, or will."""
        for p in [p for p in self._parts.values() if overlap(range(p.offset, p.offset + p.n_bytes), part)]:
            del self._parts[p.offset]

    def spoil(self) -> None:
        """A graph may write there, whenever it is computed."""
        self._spoilt = True
        self._parts.clear()

    @property
    def complete(self) -> bool:
        return not self._spoilt and content_name(self.n_bytes, self._parts.values()) == self.name

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(self._parts.values())


def written(graph: Graph) -> set[int]:
    """Ids of the buffers that a graph writes to."""
    nodes = (i for i, t in enumerate(graph.tensors) if t.op != "NONE" and not op_of(t).view)
    return {graph.tensors[graph.root(i)[0]].buffer for i in nodes} - {0}


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """A buffer that is kept until a time, in the seconds of the clock, and the tensors in it."""

    name: bytes
    buffer: Buffer
    parts: tuple[Part, ...]
    until_s: float


class Leases:
    """The buffers of one device that are kept, the oldest first.

    Threads: use from one.
    """

    def __init__(self, device: Device[Any], keep_s: float, clock: Callable[[], float] | None = None) -> None:
        """keep_s: for how long; 0: nothing is kept."""
        self.device, self.keep_s = device, keep_s
        self._now_s = clock or LivedClock().now_s
        self._kept: deque[Lease] = deque()

    @property
    def n_bytes(self) -> int:
        return sum(lease.buffer.n_bytes for lease in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def leave(
        self, name: bytes, buffer: Buffer, tick: Tick = nothing, parts: tuple[Part, ...] = (), at_least_s: float = 0.0
    ) -> None:  # fmt: skip
        """A session that had this buffer has ended. at_least_s: whoever had it may come back within so long."""
        keep_s = max(self.keep_s, at_least_s)
        if keep_s <= 0:
            self.device.free(buffer, tick)
            return
        if len(self._kept) >= MAX_KEPT:
            self.give_up(tick)
        self._kept.append(Lease(name, buffer, parts, self._now_s() + keep_s))

    def take(self, name: bytes, n_bytes: int) -> Lease | None:
        """A buffer of this content, which is the caller's from now on; the one that was left last."""
        for lease in reversed(self._kept):
            if lease.name == name and lease.buffer.n_bytes == n_bytes:
                self._kept.remove(lease)
                return lease
        return None

    def holder(self, digest: bytes, n_bytes: int) -> tuple[Buffer, int] | None:
        """A buffer that holds a tensor of this hash, and where."""
        found = ((lease.buffer, p.offset) for lease in self._kept for p in lease.parts
                 if p.hash == digest and p.n_bytes == n_bytes)  # fmt: skip
        return next(found, None)

    def give_up(self, tick: Tick = nothing) -> bool:
        """Free the oldest. Returns: whether there was one."""
        if not self._kept:
            return False
        self.device.free(self._kept.popleft().buffer, tick)
        return True

    def expire(self, tick: Tick = nothing) -> None:
        """Free what has been kept for its time, and all when the host is short of memory. Call it some times a second."""
        now_s = self._now_s()
        while self._kept and (now_s >= self._kept[0].until_s or self.device.short()):
            self.give_up(tick)
