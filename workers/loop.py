"""Moves bytes between a worker's sockets and its state machine. One thread: what answers PINGs is what computes.

Every message is `[peer][prefix][header][payload]*`: a listening worker's ROUTER gives the peer; behind a front the
front does; a worker that dialled a broker has one peer with an empty name.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from config.auth import bound_endpoint, new_socket, require_curve
from config.keys import KeyPair
from protocol import PROTOCOL_VERSION, limits
from protocol import messages as m
from protocol.errors import Cancelled, ConfigError, GgmqError, ProtocolError
from protocol.frames import Frame, Message, decode, encode, prefix_of
from protocol.messages import Command
from workers.cache import Cache, ModelFolder
from workers.devices.base import Device
from workers.executor import Executor
from workers.state import Instruction, Send, Work, WorkerState

BROKER = b""
REDIAL_S = 1.0


class WorkerLoop:
    """A device process.

    Attributes:
        parent_pid: with it, the process ends when its parent has gone (a launcher that was killed leaves nothing).
    """

    def __init__(
        self, device: Device, cache: Cache | None, software: str, keys: KeyPair | None = None, parent_pid: int = 0,
        name: str = "", models: ModelFolder | None = None,
    ) -> None:  # fmt: skip
        self.device, self.keys, self.parent_pid, self.name = device, keys, parent_pid, name
        self.state = WorkerState(software)
        self.executor = Executor(device, self.state, cache, models)
        self.context: zmq.Context[Any] = zmq.Context()
        self.auth: Any = None
        self.debug = bool(os.environ.get("GGMQ_DEBUG") or os.environ.get("GGML_RPC_DEBUG"))
        self.queue: deque[tuple[bytes, Message]] = deque()
        self.running: tuple[bytes, int, int] | None = None
        self.stopping = False
        self.sockets: list[zmq.Socket[Any]] = []
        self.route: dict[bytes, zmq.Socket[Any]] = {}
        self.token = secrets.token_bytes(16)
        self.dialled: set[int] = set()
        self.relayed = False

    # -- ways to be reached --------------------------------------------------------------------------------------------

    def listen(self, endpoint: str) -> str:
        """Bind a ROUTER; returns the endpoint with its real port. Errors: ConfigError when it cannot be bound."""
        if self.keys is not None:
            self.auth = require_curve(self.context, self.keys)
        s = new_socket(self.context, zmq.ROUTER, self.keys, server=True)
        try:
            s.bind(endpoint)
        except zmq.ZMQError as e:
            raise ConfigError(f"{endpoint}: cannot listen: {e.strerror or e}; is another worker on this port? "
                              "Choose another with -p") from None  # fmt: skip
        self.sockets.append(s)
        return bound_endpoint(s)

    def dial(self, endpoint: str) -> None:
        """Connect to a broker, control and bulk, and say HELLO."""
        for role in ("worker", "worker-bulk"):
            s = new_socket(self.context, zmq.DEALER, self.keys, server=False)
            s.connect(endpoint)
            self.sockets.append(s)
            self.dialled.add(id(s))
            s.send_multipart(encode(Message(Command.HELLO, self._hello(role))))

    def join(self, endpoint: str) -> None:
        """Connect to this worker's own front, which names the peer of each message."""
        s = new_socket(self.context, zmq.DEALER, None, server=False)
        s.connect(endpoint)
        self.sockets.append(s)
        self.relayed = True
        s.send_multipart([b"", *encode(Message(Command.HELLO, self._hello("worker")))])

    def _hello(self, role: str) -> m.Hello:
        devices = [msgspec.structs.replace(self.device.info(), worker=self.name)] if not role.endswith("-bulk") else []
        return m.Hello(PROTOCOL_VERSION, role, self.token, software=self.state.software, devices=devices)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`; then close every socket."""
        try:
            while not self.stopping:
                self._receive(1000 if not self.queue else 0)
                while self.queue and not self.stopping:
                    rid, message = self.queue.popleft()
                    self._carry_out(self._handle(rid, message))
                    self._receive(0)
                self._housekeeping()
        finally:
            for line in self.device.profile():
                print(line, file=sys.stderr)
            if self.auth is not None:
                self.auth.stop()
            for s in self.sockets:
                s.close()
            self.context.destroy(linger=0)

    def stop(self) -> None:
        self.stopping = True

    def _housekeeping(self) -> None:
        if self.parent_pid and os.getppid() != self.parent_pid:
            self.stop()
        for key in self.state.silent(time.monotonic()):
            self._free(key)

    def _free(self, key: tuple[bytes, int]) -> None:
        self.executor.free_session(key)
        self.state.drop(key)

    def _receive(self, timeout_ms: int) -> None:
        """Take in all that has arrived, controls before bulk; what is refused is answered here."""
        ready = zmq.select(self.sockets, [], [], timeout_ms / 1000)[0] if len(self.sockets) > 1 else None
        for s in self.sockets if ready is None else ready:
            wait = timeout_ms if ready is None else 0
            while s.poll(wait):
                wait = 0
                frames: list[Frame] = [f.buffer if len(f) > 4096 else f.bytes for f in s.recv_multipart(copy=False)]
                self._arrived(s, frames)
                if len(self.queue) >= limits.MAX_INFLIGHT_PER_CLIENT:
                    return

    def _arrived(self, s: zmq.Socket[Any], frames: list[Frame]) -> None:
        rid = BROKER + bytes([self.sockets.index(s)]) if id(s) in self.dialled else bytes(frames.pop(0))
        self.route[rid] = s
        try:
            message = decode(frames)
        except ProtocolError as e:
            self._refuse_frames(rid, frames, e)
            return
        if self.debug:
            print(f"ggmq worker: {message.command.name} seq {message.seq} {message.header}"[:400], file=sys.stderr)
        if message.reply and message.command == Command.ERROR and id(s) in self.dialled:
            # a broker that was started again does not know us: introduce ourselves
            s.send_multipart(encode(Message(Command.HELLO, self._hello("worker"))))
            return
        if not self.state.admit(rid, message, time.monotonic()):
            return
        if message.command == Command.PING:
            self._carry_out(self.state.handle(rid, message))
        elif isinstance(message.header, m.Cancel):
            self._cancel(rid, message, message.header)
        else:
            self.queue.append((rid, message))

    def _refuse_frames(self, rid: bytes, frames: list[Frame], error: ProtocolError) -> None:
        """Answer what could not be decoded, if it says which message it was."""
        device = epoch = seq = 0
        try:
            _, reply, device, epoch, seq = prefix_of(frames[0])
            if reply:
                self.state.n_refused += 1
                return
        except (ProtocolError, IndexError):
            pass
        self._carry_out([self.state.refuse(rid, Message(Command.ERROR, m.Ok(), (), False, device, epoch, seq), error)])

    def _cancel(self, rid: bytes, message: Message, h: m.Cancel) -> None:
        kept = deque((r, q) for r, q in self.queue if (r, q.seq) != (rid, h.seq))
        for r, q in self.queue:
            if (r, q.seq) == (rid, h.seq):
                self._carry_out([self.state.refuse(r, q, Cancelled(f"{q.command.name} was cancelled"))])
        self.queue = kept
        self._carry_out(self.state.handle(rid, message))
        if self.running == (rid, h.session, h.seq):
            raise Cancelled("GRAPH_COMPUTE was cancelled")

    def _handle(self, rid: bytes, message: Message) -> list[Instruction]:
        h = message.header
        if not isinstance(h, m.Hello):
            return self.state.handle(rid, message)
        try:
            if message.reply:
                # the broker's answer on a channel that we dialled carries the epoch; either channel's may come first
                h = m.Hello(h.version, "broker", b"broker", h.epoch)
            for key in self.state.hello(rid, h, time.monotonic()):
                self._free(key)
        except GgmqError as e:
            return [self.state.refuse(rid, message, e)]
        return [] if message.reply else [Send(rid, message.answer(self._hello("worker")))]

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Work):
                if instruction.verb == "compute":
                    h = instruction.request.header
                    self.running = (instruction.rid, getattr(h, "session", 0), instruction.request.seq)
                try:
                    answers = self.executor.execute(instruction, self._tick)
                finally:
                    self.running = None
                self._carry_out(answers)
            else:
                self._send(instruction)

    def _tick(self) -> None:
        """Between two nodes of a running plan: PINGs are answered, everything else waits its turn."""
        self._receive(0)

    def _send(self, instruction: Send) -> None:
        s = self.route.get(instruction.rid)
        if s is None:
            return
        frames = encode(instruction.message)
        if id(s) not in self.dialled:
            frames.insert(0, instruction.rid)
        try:
            s.send_multipart(frames, flags=zmq.DONTWAIT, copy=False)
        except zmq.ZMQError:
            # the peer has gone, or reads nothing: its replies are lost with it, the others are served
            self.route.pop(instruction.rid, None)


def serve(loop: WorkerLoop, on_stop: Callable[[], None] | None = None) -> None:
    """Run until SIGTERM, SIGINT or the parent's end."""
    import signal

    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda *_: loop.stop())
    try:
        loop.run()
    finally:
        if on_stop is not None:
            on_stop()
