"""Bytes to and from a CUDA device, by way of staging memory: several pieces are on their way at once."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from workers.devices.cuda.driver import Driver
from workers.tensors import Bytes
from workers.ticks import PIECE_BYTES, TICK_S, Tick, completing, pieces

IN_FLIGHT = 4
"""Pieces."""


def wait(done: Callable[[], bool], tick: Tick) -> None:
    """Until that is so, looking at the sockets meanwhile."""
    due = time.monotonic() + TICK_S
    while not done():
        if time.monotonic() >= due:
            tick()
            due = time.monotonic() + TICK_S


def wait_for_all(driver: Driver, tick: Tick) -> None:
    """Until the stream has done all that is on it. What needs that goes on then, whatever is wanted meanwhile."""
    with completing(tick) as steady:
        wait(driver.record(), steady)


class Copies:
    """Threads: the device's."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._rooms: list[memoryview] = []
        self._busy: list[Callable[[], bool]] = []
        self._next = 0

    def room(self, n_bytes: int, tick: Tick) -> memoryview:
        """Staging memory for one piece; `sent` must follow when what uses it is on the stream."""
        if not self._rooms or len(self._rooms[0]) < n_bytes:
            self.settle(tick)
            size = max(n_bytes, PIECE_BYTES)
            self._rooms = [self._driver.staging(size) for _ in range(IN_FLIGHT)]
            self._busy = [lambda: True] * IN_FLIGHT
        wait(self._busy[self._next], tick)
        return self._rooms[self._next][:n_bytes]

    def sent(self) -> None:
        """What uses the last room is on the stream."""
        self._busy[self._next] = self._driver.record()
        self._next = (self._next + 1) % IN_FLIGHT

    def settle(self, tick: Tick) -> None:
        """Wait for all that is on its way; whatever was asked for is done whole."""
        with completing(tick) as steady:
            for busy in self._busy:
                wait(busy, steady)

    def put(self, address: int, data: memoryview, tick: Tick) -> None:
        """Put a copy of one piece on the stream; the data may be overwritten afterwards."""
        room = self.room(len(data), tick)
        room[:] = data
        self._driver.upload(address, room)
        self.sent()
        tick()

    def store(self, address: int, data: memoryview, tick: Tick) -> None:
        """Bytes to the device; they are there for whatever is put on the stream afterwards."""
        data = data.cast("B")
        with completing(tick) as steady:
            for at, n in pieces(len(data)):
                self.put(address + at, data[at : at + n], steady)

    def fetch(self, address: int, n_bytes: int, tick: Tick) -> Bytes:
        """Bytes from the device, when all that is on the stream has been done. Shapes: uint8 [n_bytes]."""
        out = np.empty(n_bytes, np.uint8)
        waiting: list[tuple[int, memoryview, Callable[[], bool]]] = []

        def take() -> None:
            at, room, done = waiting.pop(0)
            wait(done, steady)
            out[at : at + len(room)] = np.frombuffer(room, np.uint8)

        with completing(tick) as steady:
            for at, n in pieces(n_bytes):
                if len(waiting) == IN_FLIGHT:
                    take()
                room = self.room(n, steady)
                self._driver.download(room, address + at)
                waiting.append((at, room, self._driver.record()))
                self.sent()
                steady()
            while waiting:
                take()
        return out
