"""Moves bytes between a broker's sockets and its state machine. One thread; `serve` may run in one of its own."""

from __future__ import annotations

import secrets
import sys
import threading
import time
from typing import Any

import zmq

from broker.events import (
    ClientLost,
    CloseLink,
    Event,
    FromClient,
    FromWorker,
    Instruction,
    Link,
    LinkLost,
    LinkOpened,
    Tick,
    ToClient,
)
from broker.state import BrokerState
from config.auth import bound_endpoint, new_socket, require_curve
from config.keys import KeyPair
from protocol import limits
from protocol import messages as m
from protocol.errors import ConfigError, ProtocolError
from protocol.frames import Frame, Message, decode, encode, prefix_of
from protocol.messages import Command

TICK_S = 0.1


class BrokerLoop:
    """Attributes:
    endpoints: what it listens on, with real ports.
    Threads: `run` in one thread; `stop` and `connect_worker` before it starts or from any thread (they only queue).
    """

    def __init__(self, software: str, context: zmq.Context[Any], keys: KeyPair | None = None) -> None:
        self.context, self.keys = context, keys
        self.state = BrokerState(software, int(time.time()) & 0x3FFFFFFF, secrets.token_bytes(16),
                                 secrets.randbits(48) << 8, secret=secrets.token_bytes(32))  # fmt: skip
        self.endpoints: list[str] = []
        self._routers: list[zmq.Socket[Any]] = []
        self._dealers: dict[Link, tuple[zmq.Socket[Any], zmq.Socket[Any]]] = {}
        self._monitors: dict[zmq.Socket[Any], Link] = {}
        self._owner: dict[zmq.Socket[Any], tuple[Link, bool]] = {}
        self._dialled: dict[tuple[int, bytes], tuple[Link, bool]] = {}
        self._rids: dict[tuple[Link, bool], tuple[int, bytes]] = {}
        self._tokens: dict[bytes, Link] = {}
        self._early: dict[bytes, tuple[tuple[int, bytes], Message]] = {}
        self._auth: Any = None
        self._stopping = False
        self._poller = zmq.Poller()
        self._thread: threading.Thread | None = None

    def listen(self, endpoint: str) -> str:
        """Bind a ROUTER for clients and for workers that dial in. CURVE on TCP when there are keys."""
        tcp = endpoint.startswith("tcp://")
        s = new_socket(self.context, zmq.ROUTER, self.keys if tcp else None, server=True)
        if tcp and self.keys is not None and self._auth is None:
            self._auth = require_curve(self.context, self.keys)
        try:
            s.bind(endpoint)
        except zmq.ZMQError as e:
            raise ConfigError(f"{endpoint}: cannot listen: {e.strerror or e}; is another broker there?") from None
        self._routers.append(s)
        self._poller.register(s, zmq.POLLIN)
        bound = endpoint if endpoint.startswith("inproc") else bound_endpoint(s)
        self.endpoints.append(bound)
        return bound

    def connect_worker(self, endpoint: str) -> None:
        """Connect to a worker that listens, with a control and a bulk channel. Call before `run`."""
        sockets = []
        for bulk in (False, True):
            s = new_socket(self.context, zmq.DEALER, self.keys, server=False)
            if not bulk:
                monitor = s.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
                self._monitors[monitor] = endpoint
                self._poller.register(monitor, zmq.POLLIN)
            s.connect(endpoint)
            self._owner[s] = (endpoint, bulk)
            self._poller.register(s, zmq.POLLIN)
            sockets.append(s)
        self._dealers[endpoint] = (sockets[0], sockets[1])
        self._do(self.state.handle(LinkOpened(endpoint, time.monotonic())))

    def serve_in_thread(self) -> None:
        self._thread = threading.Thread(target=self.run, name="ggmq-broker", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End `run` and, when it has a thread, wait for it."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join(5)

    def run(self) -> None:
        next_tick = 0.0
        try:
            while not self._stopping:
                for s, _ in self._poller.poll(int(TICK_S * 1000)):
                    self._drain_socket(s)
                now = time.monotonic()
                if now >= next_tick:
                    next_tick = now + TICK_S
                    self._handle(Tick(now))
        finally:
            for monitor in self._monitors:
                monitor.close()
            for s in [*self._routers, *self._owner]:
                s.close()
            if self._auth is not None:
                self._auth.stop()

    def _handle(self, event: Event) -> None:
        self._do(self.state.handle(event))

    def _drain_socket(self, s: zmq.Socket[Any]) -> None:
        """Take in what has arrived, but not for ever: the other sockets get their turn."""
        for _ in range(64):
            try:
                frames: list[Frame] = [f.buffer if len(f) > 4096 else f.bytes
                                       for f in s.recv_multipart(zmq.DONTWAIT, copy=False)]  # fmt: skip
            except zmq.ZMQError:
                return
            now = time.monotonic()
            if s in self._monitors:
                self._monitored(self._monitors[s], now)
            elif s in self._owner:
                link, bulk = self._owner[s]
                self._worker_frames(link, bulk, frames, now)
            else:
                self._router_frames(self._routers.index(s), frames, now)

    def _monitored(self, link: Link, now: float) -> None:
        worker = self.state.workers.get(link)
        if worker is not None and worker.ready:
            self._handle(LinkLost(link, "the connection was closed; the worker was stopped or killed", now))

    def _worker_frames(self, link: Link, bulk: bool, frames: list[Frame], now: float) -> None:
        try:
            message = decode(frames)
        except ProtocolError as e:
            self._handle(LinkLost(link, f"it broke the protocol: {e}", now))
            return
        self._handle(FromWorker(link, message, now, bulk))

    def _router_frames(self, index: int, frames: list[Frame], now: float) -> None:
        rid = bytes(frames[0])
        where = (index, rid)
        known = self._dialled.get(where)
        if known is not None:
            self._worker_frames(*known, frames[1:], now)
            return
        peer = bytes([index]) + rid
        try:
            message = decode(frames[1:])
        except ProtocolError as e:
            self._reject(peer, frames[1:], e)
            return
        h = message.header
        if isinstance(h, m.Hello) and h.role.startswith("worker") and not message.reply:
            bulk = h.role.endswith("-bulk")
            self._dialled_in(where, h, message, bulk, now)
            return
        self._handle(FromClient(peer, message, now))

    def _dialled_in(self, where: tuple[int, bytes], h: m.Hello, message: Message, bulk: bool, now: float) -> None:
        """A worker's HELLO on one of its channels; the two connections may arrive in either order."""
        link = self._tokens.get(h.token) if bulk else f"dial/{where[0]}.{where[1].hex()}"
        if link is None:
            if len(self._early) < limits.MAX_SESSIONS:
                self._early[h.token] = (where, message)
            return
        self._tokens[h.token] = link
        self._dialled[where] = (link, bulk)
        self._rids[(link, bulk)] = where
        self._handle(FromWorker(link, message, now, bulk))
        early = self._early.pop(h.token, None)
        if early is not None and not bulk and isinstance(early[1].header, m.Hello):
            self._dialled_in(early[0], early[1].header, early[1], True, now)

    def _reject(self, peer: bytes, frames: list[Frame], error: ProtocolError) -> None:
        device = epoch = seq = 0
        try:
            _, reply, device, epoch, seq = prefix_of(frames[0])
            if reply:
                return
        except (ProtocolError, IndexError):
            pass
        self.state.n_refused += 1
        answer = Message(Command.ERROR, m.Error(error.code, str(error)[:4000]), (), True, device, epoch, seq)
        self._do([ToClient(peer, answer)])

    def _do(self, instructions: list[Instruction]) -> None:
        for i in instructions:
            if isinstance(i, CloseLink):
                self._close(i.link)
                continue
            if isinstance(i, ToClient):
                where: tuple[int, bytes] | None = (i.rid[0], i.rid[1:])
                gone: Event = ClientLost(i.rid, time.monotonic())
            else:
                where = self._rids.get((i.link, i.bulk))
                gone = LinkLost(i.link, "the connection was closed; the worker was stopped or killed", time.monotonic())
            frames = encode(i.message)
            try:
                if where is not None:
                    self._routers[where[0]].send_multipart([where[1], *frames], zmq.DONTWAIT, copy=False)
                elif not isinstance(i, ToClient) and i.link in self._dealers:
                    self._dealers[i.link][i.bulk].send_multipart(frames, zmq.DONTWAIT, copy=False)
            except zmq.ZMQError as e:
                if e.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    self._handle(gone)
                else:
                    print(f"ggmq broker: cannot send: {e}", file=sys.stderr)

    def _close(self, link: Link) -> None:
        for s in self._dealers.pop(link, ()):
            for monitor in [k for k, v in self._monitors.items() if v == link]:
                self._poller.unregister(monitor)
                self._monitors.pop(monitor)
                monitor.close()
            self._poller.unregister(s)
            self._owner.pop(s, None)
            s.close()
        for bulk in (False, True):
            where = self._rids.pop((link, bulk), None)
            if where is not None:
                self._dialled.pop(where, None)
        self._tokens = {t: known for t, known in self._tokens.items() if known != link}
