"""What the bus does, looked at twice a second by a client of its own: devices, their memory and work, how far away they are.

It disturbs no token: a worker answers STATS between the nodes of a graph.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import msgspec
from msgspec import Struct, field

from ggmq.cluster import Client
from protocol import messages as m
from protocol.errors import Cancelled, GgmqError

EVERY_S = 0.5
ANSWER_S = 0.25
LOST_KEPT_S = 300.0
"""So long a device that is lost stays in the picture."""


class Watched(Struct):
    """A device as it was seen last.

    Attributes:
        info: as the broker has it.
        stats: what it said of itself last; None before the first time.
        round_trip_s: from here through the broker to its worker and back.
        seen_s: when it was ready last, by time.monotonic.
    """

    info: m.ListedDevice
    stats: m.Stats | None = None
    round_trip_s: float = 0.0
    seen_s: float = 0.0


class Picture(Struct, frozen=True):
    """All devices by their numbers, and what is wrong with the bus itself; empty for nothing."""

    devices: dict[int, Watched] = field(default_factory=dict)
    error: str = ""


class BusWatch:
    """Threads: `picture` may be read from any."""

    def __init__(self, client: Client, on_change: Callable[[Watched], None] = lambda device: None) -> None:
        """on_change: is told of each device whose state is another one than before, in the thread that looks."""
        self._client, self._on_change = client, on_change
        self._asked: dict[int, tuple[int, float]] = {}
        self._closing = threading.Event()
        self.picture = Picture()
        self._client.on_wait = self._end
        self._thread = threading.Thread(target=self._run, name="watch of the bus", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent."""
        self._closing.set()
        self._thread.join()
        self._client.close()

    def _end(self) -> None:
        """Nothing is waited for when it is closing."""
        if self._closing.is_set():
            raise Cancelled("the bus is not watched any more")

    def _run(self) -> None:
        while not self._closing.wait(EVERY_S if self.picture.devices else 0.0):
            try:
                self.picture = Picture(self._look())
            except GgmqError as e:
                self.picture = Picture({i: _lost(d) for i, d in self.picture.devices.items()}, str(e))
                if self._client.lost:
                    self._asked.clear()
                    with contextlib.suppress(GgmqError):
                        self._client.reopen(0.0)

    def _look(self) -> dict[int, Watched]:
        now, before, after = time.monotonic(), self.picture.devices, dict[int, Watched]()
        for i, info in enumerate(self._client.devices()):
            if info.state != "none":
                after[i] = self._seen(before.get(i), info, now)
        for i, d in before.items():  # a number that is given to another is another device
            back = any(x.info.worker == d.info.worker and x.info.name == d.info.name for x in after.values())
            if i not in after and not back and now - d.seen_s < LOST_KEPT_S:
                after[i] = _lost(d)
        for i, d in after.items():
            if i not in before or before[i].info.state != d.info.state:
                self._on_change(d)
            if d.info.state == "ready" and i not in self._asked:
                self._asked[i] = (self._client.submit(m.StatsQuery(), device=i), time.monotonic())
        for i, (seq, asked_s) in list(self._asked.items()):
            self._answer(after.get(i), i, seq, asked_s)
        return after

    def _seen(self, before: Watched | None, info: m.ListedDevice, now: float) -> Watched:
        """What is listed, with the names of a lost device, which the list may lack, from before."""
        if before is None:
            return Watched(info, seen_s=now)
        if info.state == "lost" and not info.worker:
            return _lost(before)
        seen_s = now if info.state == "ready" else before.seen_s
        return msgspec.structs.replace(before, info=info, seen_s=seen_s)

    def _answer(self, device: Watched | None, i: int, seq: int, asked_s: float) -> None:
        """What a device says of itself, if it says it now; one that is busy is asked no second time."""
        with contextlib.suppress(GgmqError):
            self._client.await_reply(seq, ANSWER_S if device is not None and device.info.state == "ready" else 0.0)
            del self._asked[i]
            header = self._client.wait(seq).header
            if device is not None and isinstance(header, m.Stats):
                device.stats, device.round_trip_s = header, time.monotonic() - asked_s


def _lost(d: Watched) -> Watched:
    return msgspec.structs.replace(d, info=msgspec.structs.replace(d.info, state="lost"))
