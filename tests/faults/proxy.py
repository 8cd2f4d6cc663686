"""A bad network between two TCP peers, as a program: `python -m tests.faults.proxy --to HOST:PORT`.

It prints the port that it listens on. Each line on its standard input is a JSON object, answered with a line of counters:
`{"up": {...}, "down": {...}}` changes conditions (`Conditions`) towards the target and back, `{"cut": true}` closes all
connections, `{"open": false}` takes no new ones. Conditions hold for all connections together, as a link's do. What a hole
holds back comes when the hole closes, as TCP sends again what a network has lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field, fields
from typing import Any

from tests.faults.zmtp import Splitter

CHUNK_BYTES = 1 << 16
PACED_BYTES = 4096
"""Pieces in which a slow link takes bytes, so that connections share it."""
WINDOW_BYTES = 8 << 20
"""What is on its way at once; beyond it the sender waits."""
OVERTAKEN_S = 0.02
"""A message that is to be overtaken goes after so long if none comes."""
N_REMEMBERED = 64


@dataclass
class Conditions:
    """One direction. `mbit`: 10^6 bits a second, 0 for no limit; `hole`: nothing passes. Of whole messages, where the stream
    is not encrypted, the parts that are lost, come twice, are overtaken by the next, or are followed by an earlier one."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    mbit: float = 0.0
    hole: bool = False
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    replay: float = 0.0

    @property
    def by_message(self) -> bool:
        return bool(self.drop or self.duplicate or self.reorder or self.replay)

    def change(self, values: dict[str, Any]) -> None:
        for f in fields(self):
            if f.name in values:
                setattr(self, f.name, type(f.default)(values[f.name]))


@dataclass
class Direction:
    """Attributes: free_s: when the slow link has sent what it took. gone: counters, `bytes` among them."""

    conditions: Conditions = field(default_factory=Conditions)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    gone: Counter[str] = field(default_factory=Counter)
    free_s: float = 0.0

    async def passable(self) -> None:
        while self.conditions.hole:
            self.changed.clear()
            await self.changed.wait()


class Way:
    """One direction of one connection: what comes, what becomes of it, when it goes on."""

    def __init__(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
                 rng: random.Random) -> None:  # fmt: skip
        self.direction, self.reader, self.writer, self.rng = direction, reader, writer, rng
        self._queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._queued_bytes = 0
        self._room = asyncio.Event()
        self._last_due_s = 0.0
        self._splitter = Splitter()
        self._seen: deque[bytes] = deque(maxlen=N_REMEMBERED)
        self._behind: tuple[bytes, asyncio.TimerHandle] | None = None

    async def run(self) -> None:
        sending = asyncio.create_task(self._send())
        try:
            while data := await self.reader.read(CHUNK_BYTES):
                for unit, whole in self._splitter.feed(data):
                    self._take(unit, whole)
                while self._queued_bytes > WINDOW_BYTES:
                    self._room.clear()
                    await self._room.wait()
            self._let_go()
            self._put(b"")
            await sending
        finally:
            sending.cancel()

    def _take(self, unit: bytes, whole: bool) -> None:
        c, count = self.direction.conditions, self.direction.gone
        if not whole or not c.by_message:
            self._let_go()
            self._put(unit)
            if whole:
                self._seen.append(unit)
                count["messages"] += 1
            return
        count["messages"] += 1
        kind = self.rng.random()
        earlier = self.rng.choice(self._seen) if self._seen else None
        self._seen.append(unit)
        if kind < c.drop:
            count["dropped"] += 1
        elif (kind := kind - c.drop) < c.duplicate:
            count["duplicated"] += 1
            self._put(unit)
            self._put(unit)
        elif (kind := kind - c.duplicate) < c.replay and earlier is not None:
            count["replayed"] += 1
            self._put(unit)
            self._put(earlier)
        elif kind - c.replay < c.reorder and self._behind is None:
            count["reordered"] += 1
            self._behind = unit, asyncio.get_running_loop().call_later(OVERTAKEN_S, self._let_go)
            return
        else:
            self._put(unit)
        self._let_go()

    def _let_go(self) -> None:
        """Send what waits to be overtaken."""
        if self._behind is not None:
            unit, timer = self._behind
            timer.cancel()
            self._behind = None
            self._put(unit)

    def _put(self, data: bytes) -> None:
        c = self.direction.conditions
        due = time.monotonic() + c.delay_s + self.rng.random() * c.jitter_s
        self._last_due_s = max(due, self._last_due_s)  # in order: it is a stream
        self._queued_bytes += len(data)
        self._queue.put_nowait((self._last_due_s, data))

    async def _send(self) -> None:
        while True:
            due, data = await self._queue.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if not data:
                await self.direction.passable()
                with contextlib.suppress(OSError):
                    self.writer.write_eof()
                return
            left = memoryview(data)
            while len(left):
                await self.direction.passable()
                mbit = self.direction.conditions.mbit
                piece = left[:PACED_BYTES] if mbit else left
                left = left[len(piece) :]
                if mbit:
                    self.direction.free_s = max(time.monotonic(), self.direction.free_s) + len(piece) * 8e-6 / mbit
                    await asyncio.sleep(self.direction.free_s - time.monotonic())
                    await self.direction.passable()
                self.writer.write(bytes(piece))
                await self.writer.drain()
                self.direction.gone["bytes"] += len(piece)
                self._queued_bytes -= len(piece)
                self._room.set()


class Proxy:
    """Attributes: up, down: towards the target, and back. n_taken: connections so far."""

    def __init__(self, target: tuple[str, int], seed: int) -> None:
        self.target, self.rng = target, random.Random(seed)
        self.up, self.down = Direction(), Direction()
        self.is_open, self.n_taken = True, 0
        self._there: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_taken += 1
        seed = self.rng.getrandbits(32)
        self._there.add(writer)
        if not self.is_open:
            self._reset(writer)
            return
        try:
            there, onward = await asyncio.open_connection(*self.target)
        except OSError:
            self._reset(writer)
            return
        self._there.add(onward)
        for w in (writer, onward):
            w.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways = [asyncio.create_task(Way(self.up, reader, onward, random.Random(seed)).run()),
                asyncio.create_task(Way(self.down, there, writer, random.Random(seed + 1)).run())]  # fmt: skip
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for w in (writer, onward):
                self._there.discard(w)
                w.close()

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        self._there.discard(writer)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    def cut(self) -> None:
        for writer in list(self._there):
            self._reset(writer)

    def command(self, said: dict[str, Any]) -> dict[str, Any]:
        for name, direction in (("up", self.up), ("down", self.down)):
            if name in said:
                direction.conditions.change(said[name])
                direction.changed.set()
        self.is_open = said.get("open", self.is_open)
        if said.get("cut"):
            self.cut()
        return {"taken": self.n_taken, "there": len(self._there) // 2, "up": self.up.gone, "down": self.down.gone}


async def _main(args: argparse.Namespace) -> None:
    host, _, port = args.to.rpartition(":")
    proxy = Proxy((host, int(port)), args.seed)
    at, _, own = args.listen.rpartition(":")
    server = await asyncio.start_server(proxy.serve, at, int(own), limit=CHUNK_BYTES)
    print(server.sockets[0].getsockname()[1], flush=True)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        print(json.dumps(proxy.command(json.loads(line))), flush=True)
    # whoever started it has gone
    proxy.cut()


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m tests.faults.proxy", description="A bad network between two TCP peers.")
    p.add_argument("--to", required=True, metavar="HOST:PORT", help="where connections go on to")
    p.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0: any (default %(default)s)")
    p.add_argument("--seed", type=int, default=1, help="of jitter and of what becomes of messages")
    asyncio.run(_main(p.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
