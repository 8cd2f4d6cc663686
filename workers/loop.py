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
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from config.auth import bound_endpoint, local_address, new_socket, require_curve
from config.keys import KeyPair
from protocol import PROTOCOL_VERSION, limits
from protocol import messages as m
from protocol.errors import Cancelled, ConfigError, GgmqError, ProtocolError, Unavailable
from protocol.frames import Frame, Message, decode, encode, prefix_of
from protocol.messages import Command
from workers.cache import Cache, ModelFolder
from workers.devices.base import Device
from workers.executor import Executor
from workers.links import Dial, HangUp, LinkInstruction, Links, Name, ToPeer
from workers.state import Send, Work, WorkerState

BROKER = b""
REDIAL_S = 1.0


class WorkerLoop:
    """A device process.

    Attributes:
        instance: names this process to those who connect to it; devices behind one front have the same.
        dialled: sockets that we connected to a broker; `linked`: those to other workers, by name.
        spin_s: how long it looks for the next compute before it sleeps.
        peer_port: where other workers reach this one when it dialled its broker; 0: anywhere.
        parent_pid: with it, the process ends when its parent has gone (a launcher that was killed leaves nothing).
    """

    def __init__(
        self, device: Device, cache: Cache | None, software: str, keys: KeyPair | None = None, parent_pid: int = 0,
        name: str = "", models: ModelFolder | None = None, instance: bytes = b"", insecure: bool = False,
        spin_s: float = 0.0, peer_port: int = 0,
    ) -> None:  # fmt: skip
        self.device, self.keys, self.parent_pid, self.name = device, keys, parent_pid, name
        self.state = WorkerState(software)
        self.links = Links(self.state)
        self.executor = Executor(device, self.state, self.links, cache, models)
        self.context: zmq.Context[Any] = zmq.Context()
        self.auth: Any = None
        self.debug = bool(os.environ.get("GGMQ_DEBUG") or os.environ.get("GGML_RPC_DEBUG"))
        self.queue: deque[tuple[bytes, Message]] = deque()
        self.running: tuple[bytes, int, int] | None = None
        self.stopping = False
        self.sockets: list[zmq.Socket[Any]] = []
        self.poller = zmq.Poller()
        self.route: dict[bytes, zmq.Socket[Any]] = {}
        self.instance = instance or secrets.token_bytes(16)
        self.insecure, self.peer_port = insecure, peer_port
        self.spin_s, self.spin_until = spin_s, 0.0
        self.dialled: dict[zmq.Socket[Any], str] = {}
        self.linked: dict[Name, zmq.Socket[Any]] = {}
        self.peers_only: zmq.Socket[Any] | None = None
        self.peer_endpoint = ""

    # -- ways to be reached --------------------------------------------------------------------------------------------

    def listen(self, endpoint: str) -> str:
        """Bind a ROUTER; returns the endpoint with its real port. Errors: ConfigError when it cannot be bound."""
        s = self._bind(endpoint)
        self._add(s)
        return bound_endpoint(s)

    def _add(self, s: zmq.Socket[Any]) -> None:
        self.sockets.append(s)
        self.poller.register(s, zmq.POLLIN)

    def _keys_for(self, endpoint: str) -> KeyPair | None:
        """A path of this host is guarded by its folder's mode."""
        return self.keys if endpoint.startswith("tcp://") else None

    def _bind(self, endpoint: str) -> zmq.Socket[Any]:
        keys = self._keys_for(endpoint)
        if keys is not None and self.auth is None:
            self.auth = require_curve(self.context, keys)
        s = new_socket(self.context, zmq.ROUTER, keys, server=True)
        try:
            s.bind(endpoint)
        except zmq.ZMQError as e:
            s.close()
            raise ConfigError(f"{endpoint}: cannot listen: {e.strerror or e}; is another worker on this port? "
                              "Choose another with -p") from None  # fmt: skip
        return s

    def _listen_for_peers(self) -> str:
        """Where other workers reach this one; empty: where its broker does.

        Errors: Unavailable when it dialled a broker over a network without keys, and was not told that this is safe.
        """
        if self.dialled and self.peers_only is None:
            broker = next(iter(self.dialled.values()))
            address = local_address(broker)
            if address.startswith("ipc://"):
                endpoint = f"{address}-{self.instance.hex()[:8]}"
            elif self.keys is not None or self.insecure or address.startswith("tcp://127."):
                endpoint = f"{address}:{self.peer_port or '*'}"
            else:
                raise Unavailable("PEER_LISTEN: without a cluster key or --insecure nothing listens here")
            self.peers_only = self._bind(endpoint)
            self._add(self.peers_only)
            self.peer_endpoint = bound_endpoint(self.peers_only)
        return self.peer_endpoint

    def dial(self, endpoint: str) -> None:
        """Connect to a broker, control and bulk, and say HELLO."""
        for role in ("worker", "worker-bulk"):
            s = new_socket(self.context, zmq.DEALER, self._keys_for(endpoint), server=False)
            s.connect(endpoint)
            self._add(s)
            self.dialled[s] = endpoint
            s.send_multipart(encode(Message(Command.HELLO, self._hello(role))))

    def join(self, endpoint: str) -> None:
        """Connect to this worker's own front, which names the peer of each message."""
        s = new_socket(self.context, zmq.DEALER, None, server=False)
        s.connect(endpoint)
        self._add(s)
        s.send_multipart([b"", *encode(Message(Command.HELLO, self._hello("worker")))])

    def _hello(self, role: str) -> m.Hello:
        devices = [msgspec.structs.replace(self.device.info(), worker=self.name)] if not role.endswith("-bulk") else []
        return m.Hello(PROTOCOL_VERSION, role, self.instance, software=self.state.software, devices=devices)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`; then close every socket."""
        try:
            while not self.stopping:
                self._await()
                while self.queue and not self.stopping:
                    rid, message = self.queue.popleft()
                    self._carry_out(self._handle(rid, message))
                    self._tick()
                self._housekeeping()
        finally:
            for line in self.device.profile():
                print(line, file=sys.stderr)
            if self.auth is not None:
                self.auth.stop()
            for s in self.sockets:
                s.close()
            self.context.destroy(linger=0)

    def _await(self) -> None:
        """Until something is to be done, a second at most. After a compute the next one is likely near: it is looked for
        without sleeping, since to wake a sleeping core takes longer than all else that a token waits for."""
        while not self.queue and time.monotonic() < self.spin_until:
            self._receive(0)
        if not self.queue:
            self._receive(1000)

    def stop(self) -> None:
        self.stopping = True

    def _housekeeping(self) -> None:
        if self.parent_pid and os.getppid() != self.parent_pid:
            self.stop()
        now = time.monotonic()
        known = set(self.state.peers)
        for key in self.state.silent(now):
            self._free(key)
        for token in known - set(self.state.peers):
            self._carry_out(self.links.drop(token))
        self._carry_out(self.links.tick(now))

    def _free(self, key: tuple[bytes, int]) -> None:
        self.executor.free_session(key)
        self.state.drop(key)

    def _receive(self, timeout_ms: int) -> None:
        """Take in all that has arrived, controls before bulk; what is refused is answered here."""
        for s, _ in self.poller.poll(timeout_ms):
            while not s.closed and s.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                frames: list[Frame] = [f.buffer if len(f) > 4096 else f.bytes for f in s.recv_multipart(copy=False)]
                self._arrived(s, frames)
                if len(self.queue) >= limits.MAX_INFLIGHT_PER_CLIENT:
                    return

    def _arrived(self, s: zmq.Socket[Any], frames: list[Frame]) -> None:
        self.state.wire_in_bytes += sum(len(f) for f in frames)
        name = next((n for n, linked in self.linked.items() if linked is s), None)
        if name is not None:
            self._over_link(name, frames)
            return
        rid = BROKER + bytes([self.sockets.index(s)]) if s in self.dialled else bytes(frames.pop(0))
        self.route[rid] = s
        try:
            message = decode(frames)
        except ProtocolError as e:
            self._refuse_frames(rid, frames, e)
            return
        if self.debug:
            print(f"ggmq worker: {message.command.name} seq {message.seq} {message.header}"[:400], file=sys.stderr)
        if message.reply and message.command == Command.ERROR and s in self.dialled:
            # a broker that was started again does not know us: introduce ourselves
            s.send_multipart(encode(Message(Command.HELLO, self._hello("worker"))))
            return
        if not self.state.admit(rid, message, time.monotonic()):
            return
        if message.command == Command.PING:
            self._carry_out(self.state.handle(rid, message))
        elif isinstance(message.header, m.Cancel):
            self._cancel(rid, message, message.header)
        elif isinstance(message.header, m.HandOver):
            answer, ready = self.state.handed(rid, message, time.monotonic())
            for waited in ready:
                self._insert(*waited)
            self._carry_out([answer])
        else:
            self.queue.append((rid, message))

    def _insert(self, rid: bytes, message: Message) -> None:
        """What waited for activations runs before all that its peer sent after it."""
        at = (i for i, (r, q) in enumerate(self.queue) if r == rid and q.seq > message.seq)
        self.queue.insert(next(at, len(self.queue)), (rid, message))

    def _over_link(self, name: Name, frames: list[Frame]) -> None:
        try:
            message = decode(frames)
        except ProtocolError as e:
            self._carry_out(self.links.lost(name, f"it broke the protocol: {e}"))
            return
        self._carry_out(self.links.received(name, message, time.monotonic()))

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
        self._carry_out(self.state.unpark(rid, h.session, h.seq))
        self._carry_out(self.state.handle(rid, message))
        if self.running == (rid, h.session, h.seq):
            raise Cancelled("GRAPH_COMPUTE was cancelled")

    def _handle(self, rid: bytes, message: Message) -> Sequence[LinkInstruction]:
        h, now = message.header, time.monotonic()
        try:
            if isinstance(h, m.PeerDial):
                return self._dial_peer(rid, message, h, now)
            if isinstance(h, m.PeerListen):
                self.state.broker_of(rid, "PEER_LISTEN")
                return [Send(rid, message.answer(m.PeerAddress(self._listen_for_peers(), self.instance)))]
            if not isinstance(h, m.Hello):
                return self.state.handle(rid, message)
            if self.route.get(rid) is self.peers_only and self.peers_only is not None and h.role != "peer":
                raise ProtocolError(f"HELLO: only other workers connect here, got the role {h.role!r}")
            if message.reply:
                # the broker's answer on a channel that we dialled carries the epoch; either channel's may come first
                h = m.Hello(h.version, "broker", b"broker", h.epoch)
            for key in self.state.hello(rid, h, now):
                self._free(key)
        except GgmqError as e:
            return [self.state.refuse(rid, message, e)]
        return [] if message.reply else [Send(rid, message.answer(self._hello("worker")))]

    def _dial_peer(self, rid: bytes, message: Message, h: m.PeerDial, now: float) -> Sequence[LinkInstruction]:
        if h.endpoint.startswith("ipc://") and not any(e.startswith("ipc://") for e in self.dialled.values()):
            raise ProtocolError("PEER_DIAL: a worker connects to a path of its host only for a broker of its host")
        return self.links.dial(rid, message, secrets.token_bytes(16), now)

    def _carry_out(self, instructions: Sequence[LinkInstruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Work):
                if instruction.verb == "compute":
                    h = instruction.request.header
                    self.running = (instruction.rid, getattr(h, "session", 0), instruction.request.seq)
                try:
                    answers = self.executor.execute(instruction, self._tick)
                finally:
                    self.running = None
                if instruction.verb == "compute":
                    self.spin_until = time.monotonic() + self.spin_s
                self._carry_out(answers)
            elif isinstance(instruction, Send):
                self._send(instruction)
            else:
                self._link(instruction)

    def _link(self, instruction: Dial | ToPeer | HangUp) -> None:
        name = instruction.name
        s = self.linked.get(name)
        if isinstance(instruction, Dial):
            keys = self._keys_for(instruction.endpoint)
            s = self.linked[name] = new_socket(self.context, zmq.DEALER, keys, server=False)
            self._add(s)
            try:
                s.connect(instruction.endpoint)
            except zmq.ZMQError as e:
                self._carry_out(self.links.lost(name, f"{e.strerror or e}"))
        elif s is None:
            return
        elif isinstance(instruction, HangUp):
            del self.linked[name]
            self.sockets.remove(s)
            self.poller.unregister(s)
            s.close()
        else:
            frames = encode(instruction.message)
            n = sum(len(f) for f in frames)
            self.state.wire_out_bytes += n
            self.state.handed_out_bytes += n
            try:
                s.send_multipart(frames, zmq.DONTWAIT, copy=False)
            except zmq.ZMQError as e:
                self._carry_out(self.links.lost(name, f"{e.strerror or e}"))

    def _tick(self) -> None:
        """Between two requests, and between two nodes of a running plan: PINGs and handed activations are answered,
        everything else waits its turn."""
        self._receive(0)
        self._carry_out(self.links.tick(time.monotonic()))

    def _send(self, instruction: Send) -> None:
        s = self.route.get(instruction.rid)
        if s is None:
            return
        frames = encode(instruction.message)
        self.state.wire_out_bytes += sum(len(f) for f in frames)
        if s not in self.dialled:
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
