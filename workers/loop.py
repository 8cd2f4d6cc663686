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
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import msgspec
import zmq

from config.auth import happening, local_address, remove_socket_folder
from config.clock import LivedClock
from config.descriptors import raise_descriptor_limit
from config.keys import KeyPair
from config.roles import ANYBODY, Caller, Callers
from config.terminal import print_line
from protocol import PROTOCOL_VERSION, limits, tokens
from protocol import messages as m
from protocol.encoding import decode_graph
from protocol.errors import Cancelled, DeviceError, GgmqError, ProtocolError, Unavailable, VersionError
from protocol.frames import Frame, Message, decode, encode, refusal_of
from protocol.graph import Graph
from protocol.messages import Command
from workers.cache import Cache, ModelFolder
from workers.course import Course
from workers.devices.base import Device
from workers.executor import Executor
from workers.links import Links
from workers.ordering import OVERTAKEN, Ordering
from workers.sockets import Sockets
from workers.state import WorkerState
from workers.ticks import alongside
from workers.turns import Waiting
from workers.uplink import Uplink
from workers.work import Compute, Dial, HangUp, Later, LinkInstruction, Name, Send, ToPeer, Work

HOUSEKEEPING_S = 0.1
LARGE_GRAPH_BYTES = 1 << 16
"""A graph of so many bytes is read in some hundredths of a second."""
LAST_WORDS_MS = 1000
"""A worker whose device broke waits so long until the answer that says so has gone."""


class WorkerLoop:
    """A device process.

    Attributes:
        instance: names this process to those who connect to it; devices behind one front have the same.
        uplink: the broker that we dialled, if we did; `linked`: sockets to other workers, by name.
        spin_s: how long it looks for the next compute before it sleeps.
        cluster: the id of the cluster that it was started for; it works for no other broker.
        peer_port: where other workers reach this one when it dialled its broker; 0: anywhere.
        parent_pid: with it, the process ends when its parent has gone (a launcher that was killed leaves nothing).
    """

    def __init__(
        self, device: Device[Any], cache: Cache | None, software: str, keys: KeyPair | None = None, parent_pid: int = 0,
        name: str = "", models: ModelFolder | None = None, instance: bytes = b"", insecure: bool = False,
        spin_s: float = 0.0, peer_port: int = 0, quiet: bool = False, cluster: bytes = b"", keep_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.device, self.parent_pid, self.name = device, parent_pid, name
        self.state = WorkerState(software, name, device.name if name else "")
        self.links = Links(self.state)
        self.executor = Executor(device, self.state, self.links, cache, models, keep_s)
        self.sockets = Sockets(keys, quiet)
        self.debug = bool(os.environ.get("GGMQ_DEBUG") or os.environ.get("GGML_RPC_DEBUG"))
        self.queue = Waiting()
        self.course = Course(self.queue, self.state, self.executor, self._receive, self._do_request)
        self.stopping = False
        self.route: dict[bytes, zmq.Socket[Any]] = {}
        self.callers: Callers[bytes] = Callers()
        self.ordering: Ordering[tuple[zmq.Socket[Any], bytes, Message, Caller]] = Ordering()
        self.ready: deque[tuple[zmq.Socket[Any], bytes, Message, Caller]] = deque()
        self.clock = LivedClock()
        self.kept_s = self.probed_s = 0.0
        self.instance, self.cluster = tokens.token(instance or secrets.token_bytes(16), "worker", cluster), cluster
        self.insecure, self.peer_port = insecure, peer_port
        self.spin_s, self.spin_until = spin_s, 0.0
        self.uplink: Uplink | None = None
        self.joined = ""
        self.linked: dict[Name, zmq.Socket[Any]] = {}
        self.peers_only: zmq.Socket[Any] | None = None
        self.peer_endpoint = ""
        self.executor.make_room = self._make_room
        self.state.decode = self._decode

    # -- ways to be reached --------------------------------------------------------------------------------------------

    def listen(self, endpoint: str) -> str:
        """Bind a ROUTER; returns the endpoint with its real port. Errors: ConfigError when it cannot be bound."""
        return self.sockets.bind(endpoint).endpoint

    def _listen_for_peers(self) -> str:
        """Where other workers reach this one; empty: where its broker does.

        Errors: Unavailable when it dialled a broker over a network without keys, and was not told that this is safe.
        """
        if self.uplink is not None and self.peers_only is None:
            address = local_address(self.uplink.endpoint)
            if address.startswith("ipc://"):
                endpoint = f"{address}-{self.instance.hex()[:8]}"
            elif self.sockets.keys is not None or self.insecure or address.startswith("tcp://127."):
                endpoint = f"{address}:{self.peer_port or '*'}"
            else:
                raise Unavailable("PEER_LISTEN: without a cluster key or --insecure nothing listens here")
            listener = self.sockets.bind(endpoint)
            self.peers_only, self.peer_endpoint = listener.socket, listener.endpoint
        return self.peer_endpoint

    def dial(self, endpoint: str) -> None:
        """Connect to a broker, control and bulk, and say HELLO; again whenever it has gone.

        Errors: ConfigError for an endpoint that is none, Unavailable when no socket can be opened.
        """
        self.uplink = Uplink(endpoint, self.sockets, self._hello, self.state.closed)
        self.uplink.dial(self.clock.now_s())

    def join(self, endpoint: str) -> None:
        """Connect to this worker's own front, which names the peer of each message."""
        s = self.sockets.dealer(endpoint)
        s.connect(endpoint)
        self.sockets.add(s)
        self.joined = endpoint
        s.send_multipart([b"", *encode(Message(Command.HELLO, self._hello("worker")))])

    def _hello(self, role: str) -> m.Hello:
        devices = []
        if not role.endswith("-bulk"):
            info, gone = self.executor.info(), {token for token, p in self.state.peers.items() if p.closed_s}
            held = sum(b.n_bytes for key, mine in self.executor.buffers.items() if key[0] in gone for b in mine.values())
            free = min(info.total_bytes, info.free_bytes + held)  # theirs is free as soon as another broker comes
            devices = [msgspec.structs.replace(info, worker=self.name, free_bytes=free)]
        return m.Hello(PROTOCOL_VERSION, role, self.instance, software=self.state.software, devices=devices)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`; then close every socket. Errors: DeviceError when the device computes nothing any more."""
        try:
            while not self.stopping:
                self._await()
                while self.queue and not self.stopping:
                    self.course.step(self._tick)
                    self._housekeeping()
                self._housekeeping()
        finally:
            for line in self.device.profile():
                print(line, file=sys.stderr)
            self.sockets.close(LAST_WORDS_MS if self.executor.broke is not None else 0)
            self.executor.close()
            if self.parent_pid and os.getppid() != self.parent_pid:
                remove_socket_folder(self.joined or (self.uplink.endpoint if self.uplink is not None else ""))

    def _await(self) -> None:
        """Until something is to be done, but not for long. After a compute the next one is likely near: it is looked for
        without sleeping, since to wake a sleeping core takes longer than all else that a token waits for."""
        while not self.queue and time.monotonic() < self.spin_until:
            self._receive(0)
        if not self.queue:
            self._receive(int(1000 * self.sockets.wait_s))

    def _do_request(self, rid: bytes, message: Message) -> None:
        """Errors: DeviceError when the device computes nothing any more."""
        self._carry_out(self._handle(rid, message))
        if self.executor.broke is not None:
            raise DeviceError(f"{self.device.name}: {self.executor.broke.message}")

    def stop(self) -> None:
        self.stopping = True

    def _housekeeping(self) -> None:
        """What time brings. Only between requests: sessions may be freed here."""
        now = self.clock.now_s()
        if now - self.kept_s < HOUSEKEEPING_S:
            return
        self.kept_s = now
        if self.parent_pid and os.getppid() != self.parent_pid:
            self.stop()
        self._probe(now)
        self._forget(self.state.gone(now))
        self.executor.leases.expire(self._tick)
        if self.uplink is not None:
            broker = self.state.peers.get(self.uplink.token)
            if broker is not None:
                self.uplink.quiet(now - broker.seen_s, now)
            self.uplink.look(now)
        self._carry_out(self.links.tick(now))
        self.course.keep()
        waiting = self.queue.peers()
        self.route = {rid: s for rid, s in self.route.items() if rid in self.state.routes or rid in waiting}
        self.callers.keep(self.route.keys())
        self.ordering.keep(self.route.keys())

    def _probe(self, now: float, at_once: bool = False) -> None:
        """Send something to brokers that say nothing: where a connection is closed, that is when it shows."""
        if now - self.probed_s < limits.PROBE_S and not at_once:
            return
        self.probed_s = now
        quiet_s = 0.0 if at_once else limits.PROBE_S
        for peer in [p for p in self.state.peers.values() if not p.hands and now - p.seen_s >= quiet_s]:
            self._send(Send(peer.rid, Message(Command.PING, m.Ping(0), (), False, 0, peer.epoch)))

    def _forget(self, tokens: Collection[bytes]) -> None:
        for key in self.state.forget(tokens):
            self._free(key)
        for token in tokens:
            self._carry_out(self.links.drop(token))
        if self.sockets.allowed is not None and tokens:
            self.sockets.allowed.forget(tokens)

    def _make_room(self) -> bool:
        """Free what belongs to brokers that are asleep. Returns: whether there was any."""
        before = len(self.state.sessions)
        self._forget(self.state.asleep(self.clock.now_s()))
        return len(self.state.sessions) < before

    def _free(self, key: tuple[bytes, int]) -> None:
        """Nobody can ask for a session any more: its broker has gone. Whoever used it may come through another one."""
        self.executor.free_session(key, keep_s=limits.ORPHANED_S)
        self.state.drop(key)

    def _decode(self, frame: Frame) -> Graph:
        if len(frame) < LARGE_GRAPH_BYTES:
            return decode_graph(frame)
        return alongside.do(partial(decode_graph, frame), self._tick)

    def _receive(self, timeout_ms: int) -> None:
        """Take in all that has arrived, controls before bulk; what is refused is answered here."""
        uplink, listeners = self.uplink, self.sockets.listeners
        for s, _ in self.sockets.poller.poll(timeout_ms):
            while not s.closed and s.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                raw = s.recv_multipart(copy=False)
                if uplink is not None and s is uplink.monitor:
                    uplink.monitored(happening([f.bytes for f in raw]), self.clock.now_s())
                    continue
                caller = listeners[s].heard(raw[-1]) if s in listeners else ANYBODY
                if caller is not None:
                    self._arrived(s, [f.buffer if len(f) > 4096 else f.bytes for f in raw], raw[-1], caller)
                if len(self.queue) >= limits.MAX_INFLIGHT_PER_CLIENT * max(1, len(self.state.sessions)):
                    break
        self.ready += self.ordering.due(self.clock.now_s())
        self._in_order()
        self.sockets.guard()

    def _arrived(self, s: zmq.Socket[Any], frames: list[Frame], frame: zmq.Frame, caller: Caller) -> None:
        self.state.wire_in_bytes += sum(len(f) for f in frames)
        if (name := next((n for n, linked in self.linked.items() if linked is s), None)) is not None:
            self._over_link(name, frames)
            return
        uplink = self.uplink if self.uplink is not None and s in self.uplink.channels else None
        rid = uplink.channels[s] if uplink is not None else bytes(frames.pop(0))
        if not frames:  # our front: this peer is no longer connected to it
            self.state.closed(self.state.routes.get(rid, b""), self.clock.now_s())
            return
        if self.callers.is_another(rid, caller):
            self.state.closed(self.state.routes.pop(rid, b""), self.clock.now_s())
            self.callers.forget(rid)
        self.route[rid] = s
        try:
            message = decode(frames)
        except ProtocolError as e:
            if s in self.sockets.listeners:
                self.sockets.listeners[s].refused(frame, e)
            elif uplink is not None and isinstance(e, VersionError):
                uplink.refused(str(e), self.clock.now_s())
                return
            self._refuse_frames(rid, frames, e)
            return
        if self.debug:
            print_line(f"ggmq worker: {message.command.name} seq {message.seq} {message.header}"[:400], file=sys.stderr)
        if message.reply and isinstance(message.header, m.Error) and uplink is not None:
            # a broker that was started again, or that lost sight of us, does not know us
            uplink.hang_up(message.header.message, self.clock.now_s())
            return
        turn = [(s, rid, message, caller)]
        if isinstance(message.header, m.Hello):  # the answer to ours has its epoch only there
            self.ordering.hello(rid, message.header.epoch, message.seq)
        elif not message.reply and not self.joined:  # a front sees all that a peer says, and each device its own part
            if self.ordering.was_skipped(rid, message.epoch, message.seq):
                self._carry_out([self.state.refuse(rid, message, Unavailable(OVERTAKEN.format(message.command.name)))])
                return
            turn = self.ordering.take(rid, message.epoch, message.seq, turn[0], self.clock.now_s())
        self.ready += turn
        self._in_order()

    def _in_order(self) -> None:
        while self.ready:
            self._taken(*self.ready.popleft())

    def _taken(self, s: zmq.Socket[Any], rid: bytes, message: Message, caller: Caller) -> None:
        """A message has its turn to be admitted."""
        if not self.state.admit(rid, message, self.clock.now_s()):
            return
        if isinstance(message.header, m.Hello) and s in self.sockets.listeners:
            try:
                self.callers.greet(rid, caller, message.header.role)
            except ProtocolError as e:
                self._carry_out([self.state.refuse(rid, message, e)])
                return
        if self.executor.traces:
            key = self.state.routes.get(rid, b""), getattr(message.header, "session", 0)
            self.executor.traces.arrived(key, message, time.monotonic_ns())
        if message.command == Command.PING:
            self._carry_out(self.state.handle(rid, message))
        elif isinstance(message.header, m.Cancel):
            self._cancel(rid, message, message.header)
        elif isinstance(message.header, m.HandOver):
            answer, ready = self.state.handed(rid, message, self.clock.now_s())
            for waited in ready:
                self.queue.insert(*waited)
            self._carry_out([answer])
        else:
            self.queue.append(rid, message)

    def _over_link(self, name: Name, frames: list[Frame]) -> None:
        try:
            message = decode(frames)
        except ProtocolError as e:
            self._carry_out(self.links.lost(name, f"it broke the protocol: {e}"))
            return
        self._carry_out(self.links.received(name, message, self.clock.now_s()))

    def _refuse_frames(self, rid: bytes, frames: list[Frame], error: ProtocolError) -> None:
        """Answer what could not be decoded, if it says which message it was."""
        refusal = refusal_of(frames, error)
        self.state.n_refused += 1
        if refusal is not None:
            self._send(Send(rid, refusal))

    def _cancel(self, rid: bytes, message: Message, h: m.Cancel) -> None:
        for r, q in self.queue.remove(rid, h.seq):
            self._carry_out([self.state.refuse(r, q, Cancelled(f"{q.command.name} was cancelled"))])
        self._carry_out(self.state.unpark(rid, h.session, h.seq))
        self._carry_out(self.state.handle(rid, message))
        self.course.cancel((rid, h.session, h.seq))

    def _handle(self, rid: bytes, message: Message) -> Sequence[LinkInstruction]:
        h, now = message.header, self.clock.now_s()
        if not self.state.current(rid, message):
            return []
        try:
            if isinstance(h, m.PeerDial):
                return self._dial_peer(rid, message, h, now)
            if isinstance(h, m.PeerListen):
                broker = self.state.broker_of(rid, "PEER_LISTEN")
                if self.sockets.allowed is not None:
                    self.sockets.allowed.name(broker, h.keys)
                return [Send(rid, message.answer(m.PeerAddress(self._listen_for_peers(), self.instance)))]
            if isinstance(h, m.FetchTensor):
                return self.links.fetches.begin(rid, message, now)
            if message.reply and message.command == Command.READ_WEIGHT:
                return self.links.fetches.take(rid, message)
            if not isinstance(h, m.Hello):
                return self.state.handle(rid, message)
            if self.route.get(rid) is self.peers_only and self.peers_only is not None and h.role != "peer":
                raise ProtocolError(f"HELLO: only other workers connect here, got the role {h.role!r}")
            if message.reply:
                return self._welcomed(rid, h, now)
            if h.role == "broker" and h.token not in self.state.peers:
                # what nobody can ask for any more is free for a new broker
                self._probe(now, at_once=True)
                self._forget({token for token, p in self.state.peers.items() if p.closed_s})
            for key in self.state.hello(rid, h, now):
                self._free(key)
        except GgmqError as e:
            return [self.state.refuse(rid, message, e)]
        return [Send(rid, message.answer(self._hello("worker")))]

    def _welcomed(self, rid: bytes, h: m.Hello, now: float) -> Sequence[LinkInstruction]:
        """A broker's answer on a channel that we dialled carries the epoch; either channel's may come first."""
        uplink = self.uplink
        if uplink is None or rid not in (uplink.control, uplink.bulk):
            return []
        if self.cluster and not tokens.belongs(h.token, "broker", self.cluster):
            uplink.hang_up("the broker that answers there is not that of this worker's cluster", now)
            return []
        if self.sockets.allowed is not None and rid == uplink.control:
            self.sockets.allowed.forget({h.token})  # it names anew whose links it wants
        before = uplink.answered(h.token)
        if before:  # it was another one: nobody can ask any more for what that held
            self._forget({before})
        for key in self.state.hello(rid, m.Hello(h.version, "broker", h.token, h.epoch, h.session), now):
            self._free(key)
        return []

    def _dial_peer(self, rid: bytes, message: Message, h: m.PeerDial, now: float) -> Sequence[LinkInstruction]:
        local = self.uplink is not None and self.uplink.endpoint.startswith("ipc://")
        if h.endpoint.startswith("ipc://") and not local:
            raise ProtocolError("PEER_DIAL: a worker connects to a path of its host only for a broker of its host")
        return self.links.dial(rid, message, secrets.token_bytes(16), now)

    def _carry_out(self, instructions: Sequence[LinkInstruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Work):
                h, before = instruction.request.header, self.course.running
                self.course.running = (instruction.rid, getattr(h, "session", 0), instruction.request.seq)
                try:
                    answers = self.executor.execute(instruction, self._tick)
                finally:
                    self.course.running = before
                if isinstance(instruction, Compute):
                    self.spin_until = time.monotonic() + self.spin_s
                self._carry_out(answers)
                if self.executor.traces:
                    self.executor.traces.sent(instruction.key, instruction.request.seq, time.monotonic_ns())
            elif isinstance(instruction, Send):
                self._send(instruction)
            elif isinstance(instruction, Later):
                self.queue.append(instruction.rid, instruction.message)
            else:
                self._link(instruction)

    def _link(self, instruction: Dial | ToPeer | HangUp) -> None:
        name = instruction.name
        s = self.linked.get(name)
        if isinstance(instruction, Dial):
            try:
                s = self.linked[name] = self.sockets.dealer(instruction.endpoint, instruction.key)
                self.sockets.add(s)
                s.connect(instruction.endpoint)
            except (Unavailable, zmq.ZMQError) as e:
                self._carry_out(self.links.lost(name, str(e)))
        elif s is None:
            return
        elif isinstance(instruction, HangUp):
            del self.linked[name]
            self.sockets.remove(s)
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
        everything else waits its turn. Errors: Cancelled when the process is to end."""
        self._receive(0)
        self._carry_out(self.links.tick(self.clock.now_s()))
        if self.stopping and self.course.running is not None:
            raise Cancelled("the worker is being stopped")

    def _send(self, instruction: Send) -> None:
        s = self.route.get(instruction.rid)
        if s is None or s.closed:
            return
        frames = encode(instruction.message)
        n = sum(len(f) for f in frames)
        self.state.wire_out_bytes += n
        self.state.handed_out_bytes += n if instruction.message.command == Command.READ_WEIGHT else 0
        if self.uplink is None or s not in self.uplink.channels:
            frames.insert(0, instruction.rid)
        try:
            s.send_multipart(frames, flags=zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as e:
            # the peer has gone, or reads nothing: its replies are lost with it, the others are served
            if e.errno == zmq.EHOSTUNREACH:
                self.state.closed(self.state.routes.get(instruction.rid, b""), self.clock.now_s())


def serve(loop: WorkerLoop, on_stop: Callable[[], None] | None = None) -> None:
    """Run until SIGTERM, SIGINT or the parent's end."""
    import signal

    raise_descriptor_limit()
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda *_: loop.stop())
    try:
        loop.run()
    finally:
        if on_stop is not None:
            on_stop()
