"""Moves bytes between a worker's sockets and its state machine. One thread: what answers PINGs is what computes.

Every message is `[peer][prefix][header][payload]*`: a listening worker's ROUTER gives the peer; behind a front the
front does; a worker that dialled a broker has one peer with an empty name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from config.auth import (
    Listener,
    close_monitored,
    happening,
    local_address,
    monitor_of,
    new_socket,
    raise_descriptor_limit,
    remove_socket_folder,
    require_curve,
)
from config.clock import LivedClock
from config.keys import KeyPair
from config.reaching import Happening, Reaching
from config.terminal import print_line
from protocol import PROTOCOL_VERSION, limits, tokens
from protocol import messages as m
from protocol.errors import Cancelled, ConfigError, GgmqError, ProtocolError, Unavailable, VersionError
from protocol.frames import Frame, Message, decode, encode, prefix_of
from protocol.messages import Command
from workers.cache import Cache, ModelFolder
from workers.devices.base import Device
from workers.executor import Executor
from workers.links import Dial, HangUp, LinkInstruction, Links, Name, ToPeer
from workers.state import WorkerState
from workers.turns import Turns
from workers.work import Compute, Key, Send, Work

HOUSEKEEPING_S = 0.1
GUARD_S = 0.05
REFUSED_REDIAL_S = 5.0
"""So often a worker tries whose broker has another key, another version, or is none: somebody must change that first."""


@dataclass(slots=True)
class _Dialled:
    """A broker that we connect to.

    Attributes:
        control, bulk: routing ids that we give to its two channels.
        monitor: tells what becomes of the connection.
        reaching: finds out why there is no answer, until there is one.
        token: names the broker that answered.
        redial_s: when to connect anew; 0: no need.
        said: what was last printed of it.
    """

    endpoint: str
    control: bytes = b""
    bulk: bytes = b""
    monitor: zmq.Socket[Any] | None = None
    reaching: Reaching | None = None
    token: bytes = b""
    redial_s: float = 0.0
    said: str = ""


class WorkerLoop:
    """A device process.

    Attributes:
        instance: names this process to those who connect to it; devices behind one front have the same.
        broker: the one that we dialled, if we did; `linked`: sockets to other workers, by name.
        spin_s: how long it looks for the next compute before it sleeps.
        cluster: the id of the cluster that it was started for; it works for no other broker.
        peer_port: where other workers reach this one when it dialled its broker; 0: anywhere.
        quiet: strangers that are refused are not named: standard error is that of a program that people look at.
        parent_pid: with it, the process ends when its parent has gone (a launcher that was killed leaves nothing).
    """

    def __init__(
        self, device: Device, cache: Cache | None, software: str, keys: KeyPair | None = None, parent_pid: int = 0,
        name: str = "", models: ModelFolder | None = None, instance: bytes = b"", insecure: bool = False,
        spin_s: float = 0.0, peer_port: int = 0, quiet: bool = False, cluster: bytes = b"",
        keep_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.device, self.keys, self.parent_pid, self.name = device, keys, parent_pid, name
        self.state = WorkerState(software)
        self.links = Links(self.state)
        self.executor = Executor(device, self.state, self.links, cache, models, keep_s)
        self.context: zmq.Context[Any] = zmq.Context()
        self.auth: Any = None
        self.debug = bool(os.environ.get("GGMQ_DEBUG") or os.environ.get("GGML_RPC_DEBUG"))
        self.queue: deque[tuple[bytes, Message]] = deque()
        self.turns = Turns()
        self.running: tuple[bytes, int, int] | None = None
        self.stopping = False
        self.sockets: list[zmq.Socket[Any]] = []
        self.poller = zmq.Poller()
        self.route: dict[bytes, zmq.Socket[Any]] = {}
        self.clock = LivedClock()
        self.kept_s = self.probed_s = self.guarded_s = 0.0
        self.instance, self.cluster = tokens.token(instance or secrets.token_bytes(16), "worker", cluster), cluster
        self.insecure, self.peer_port, self.quiet = insecure, peer_port, quiet
        self.spin_s, self.spin_until = spin_s, 0.0
        self.broker: _Dialled | None = None
        self.channels: dict[zmq.Socket[Any], bytes] = {}
        self.n_channels = 0
        self.joined = ""
        self.linked: dict[Name, zmq.Socket[Any]] = {}
        self.listeners: dict[zmq.Socket[Any], Listener] = {}
        self.peers_only: zmq.Socket[Any] | None = None
        self.peer_endpoint = ""
        self.executor.make_room = self._make_room

    # -- ways to be reached --------------------------------------------------------------------------------------------

    def listen(self, endpoint: str) -> str:
        """Bind a ROUTER; returns the endpoint with its real port. Errors: ConfigError when it cannot be bound."""
        return self._bind(endpoint).endpoint

    def _add(self, s: zmq.Socket[Any]) -> None:
        self.sockets.append(s)
        self.poller.register(s, zmq.POLLIN)

    def _remove(self, s: zmq.Socket[Any]) -> None:
        self._forget_socket(s)
        s.close()

    def _forget_socket(self, s: zmq.Socket[Any]) -> None:
        self.sockets.remove(s)
        self.poller.unregister(s)

    def _keys_for(self, endpoint: str) -> KeyPair | None:
        """A path of this host is guarded by its folder's mode."""
        return self.keys if endpoint.startswith("tcp://") else None

    def _bind(self, endpoint: str) -> Listener:
        keys = self._keys_for(endpoint)
        if keys is not None and self.auth is None:
            self.auth = require_curve(self.context, keys)
        advice = "is another worker on this port? Choose another with -p"
        listener = Listener(self.context, endpoint, keys, advice, who="" if self.quiet else "worker")
        self.listeners[listener.socket] = listener
        self._add(listener.socket)
        return listener

    def _listen_for_peers(self) -> str:
        """Where other workers reach this one; empty: where its broker does.

        Errors: Unavailable when it dialled a broker over a network without keys, and was not told that this is safe.
        """
        if self.broker is not None and self.peers_only is None:
            address = local_address(self.broker.endpoint)
            if address.startswith("ipc://"):
                endpoint = f"{address}-{self.instance.hex()[:8]}"
            elif self.keys is not None or self.insecure or address.startswith("tcp://127."):
                endpoint = f"{address}:{self.peer_port or '*'}"
            else:
                raise Unavailable("PEER_LISTEN: without a cluster key or --insecure nothing listens here")
            listener = self._bind(endpoint)
            self.peers_only, self.peer_endpoint = listener.socket, listener.endpoint
        return self.peer_endpoint

    def dial(self, endpoint: str) -> None:
        """Connect to a broker, control and bulk, and say HELLO; again whenever it has gone.

        Errors: ConfigError for an endpoint that is none, Unavailable when no socket can be opened.
        """
        self.broker = self.broker or _Dialled(endpoint)
        self.broker.control = self._channel(endpoint, "worker")
        self.broker.bulk = self._channel(endpoint, "worker-bulk")
        self.broker.reaching = Reaching(endpoint, self._keys_for(endpoint), "broker", self.clock.now_s(), limits.RECONNECT_S)
        self.broker.redial_s = 0.0

    def _channel(self, endpoint: str, role: str) -> bytes:
        s = new_socket(self.context, zmq.DEALER, self._keys_for(endpoint), server=False)
        if role == "worker" and self.broker is not None:
            self.broker.monitor = monitor_of(s)
            self._add(self.broker.monitor)
        self._add(s)
        try:
            s.connect(endpoint)
        except zmq.ZMQError as e:
            raise ConfigError(f"--broker {endpoint}: expected an endpoint such as tcp://HOST:5555; {e}") from None
        self.n_channels += 1
        rid = self.channels[s] = b"dial" + self.n_channels.to_bytes(8)
        with contextlib.suppress(zmq.Again):  # ZeroMQ has given the connection up already: that is found out beside
            s.send_multipart(encode(Message(Command.HELLO, self._hello(role))), zmq.DONTWAIT)
        return rid

    def _hang_up(self, reason: str, now_s: float, wait_s: float = limits.REDIAL_S) -> None:
        """The broker that we dialled has gone, or does not know us: connect anew, so that nothing old is on its way."""
        broker = self.broker
        if broker is None or broker.redial_s:
            return
        if reason != broker.said:
            print_line(f"worker: broker {broker.endpoint}: {reason}; dialling again", file=sys.stderr)
        broker.said, broker.redial_s = reason, now_s + wait_s
        self.state.closed(broker.token, now_s)
        control = next((s for s, rid in self.channels.items() if rid == broker.control), None)
        if broker.monitor is not None and control is not None:
            self._forget_socket(broker.monitor)
            self._forget_socket(control)
            close_monitored(control, broker.monitor)
            del self.channels[control]
        for s in self.channels:
            self._remove(s)
        self.channels.clear()
        broker.monitor = broker.reaching = None

    def _look_at_broker(self, now_s: float) -> None:
        """Say why the broker is not reached, and dial it afresh: ZeroMQ does not after some refusals, nor looks names up."""
        reaching = self.broker.reaching if self.broker is not None else None
        reason = reaching.reason(now_s) if reaching is not None else ""
        if reaching is not None and reason and not reaching.asleep(now_s):
            self._hang_up(reason, now_s, REFUSED_REDIAL_S if reaching.shut else limits.REDIAL_S)
        elif self.broker is not None and reason and reason != self.broker.said:
            self.broker.said = reason
            print_line(f"worker: broker {self.broker.endpoint}: {reason}; waiting for it", file=sys.stderr)

    def _monitored(self, what: Happening, now_s: float) -> None:
        broker = self.broker
        if broker is None:
            return
        if what is Happening.LOST and (broker.reaching is None or broker.reaching.shaken):  # HELLO went with it
            self._hang_up("it closed the connection, or was stopped or killed", now_s)
        elif broker.reaching is not None:
            broker.reaching.happened(what, now_s)

    def _redial(self, now_s: float) -> None:
        broker = self.broker
        if broker is None or not broker.redial_s or now_s < broker.redial_s:
            return
        try:
            self.dial(broker.endpoint)
        except GgmqError as e:
            broker.redial_s = 0.0
            self._hang_up(str(e), now_s)

    def join(self, endpoint: str) -> None:
        """Connect to this worker's own front, which names the peer of each message."""
        s = new_socket(self.context, zmq.DEALER, None, server=False)
        s.connect(endpoint)
        self._add(s)
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
        """Serve until `stop`; then close every socket."""
        try:
            while not self.stopping:
                self._await()
                while self.queue and not self.stopping:
                    self._work()
                    self._tick()
                    self._housekeeping()
                self._housekeeping()
        finally:
            for line in self.device.profile():
                print(line, file=sys.stderr)
            if self.auth is not None:
                self.auth.stop()
            for s in self.sockets:
                s.close()
            self.context.destroy(linger=0)
            self.executor.close()
            if self.parent_pid and os.getppid() != self.parent_pid:
                remove_socket_folder(self.joined or (self.broker.endpoint if self.broker is not None else ""))

    def _await(self) -> None:
        """Until something is to be done, but not for long. After a compute the next one is likely near: it is looked for
        without sleeping, since to wake a sleeping core takes longer than all else that a token waits for."""
        while not self.queue and time.monotonic() < self.spin_until:
            self._receive(0)
        if not self.queue:
            self._receive(int(1000 * GUARD_S))

    def _work(self) -> None:
        """Carry out what comes next: in the order in which it came, but computes of several sessions, and the graphs for
        them, take turns. Within a session nothing overtakes anything."""
        waiting: dict[Key, int] = {}
        for i, (rid, message) in enumerate(self.queue if self._turn(self.queue[0]) else ()):
            session = getattr(message.header, "session", None)
            if session is None:
                break  # what concerns a peer as a whole keeps its place
            waiting.setdefault((self.state.routes.get(rid, b""), session), i)
        waiting = {key: i for key, i in waiting.items() if self._turn(self.queue[i])}
        if not waiting:
            rid, message = self.queue.popleft()
            self._carry_out(self._handle(rid, message))
            return
        chosen = self.turns.choose(waiting, time.monotonic())
        if chosen is None:
            self._receive(1)
            return
        rid, message = self.queue[waiting[chosen]]
        del self.queue[waiting[chosen]]
        start = time.monotonic()
        self._carry_out(self._handle(rid, message))
        end = time.monotonic()
        self.turns.ran(chosen, end - start, end)

    @staticmethod
    def _turn(waiting: tuple[bytes, Message]) -> bool:
        return isinstance(waiting[1].header, (m.StageCompute, m.GraphPut))

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
        self._look_at_broker(now)
        self._redial(now)
        self._carry_out(self.links.tick(now))
        self.turns.keep(self.state.sessions)
        waiting = {rid for rid, _ in self.queue}
        self.route = {rid: s for rid, s in self.route.items() if rid in self.state.routes or rid in waiting}

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

    def _make_room(self) -> bool:
        """Free what belongs to brokers that are asleep. Returns: whether there was any."""
        before = len(self.state.sessions)
        self._forget(self.state.asleep(self.clock.now_s()))
        return len(self.state.sessions) < before

    def _free(self, key: tuple[bytes, int]) -> None:
        self.executor.free_session(key)
        self.state.drop(key)

    def _receive(self, timeout_ms: int) -> None:
        """Take in all that has arrived, controls before bulk; what is refused is answered here."""
        for s, _ in self.poller.poll(timeout_ms):
            while not s.closed and s.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                raw = s.recv_multipart(copy=False)
                if self.broker is not None and s is self.broker.monitor:
                    self._monitored(happening([f.bytes for f in raw]), self.clock.now_s())
                    continue
                if s in self.listeners:
                    self.listeners[s].heard(raw[-1])
                self._arrived(s, [f.buffer if len(f) > 4096 else f.bytes for f in raw], raw[-1])
                if len(self.queue) >= limits.MAX_INFLIGHT_PER_CLIENT:
                    break
        now = time.monotonic()
        if now - self.guarded_s >= GUARD_S:
            self.guarded_s = now
            for listener in self.listeners.values():
                listener.guard()

    def _arrived(self, s: zmq.Socket[Any], frames: list[Frame], frame: zmq.Frame) -> None:
        self.state.wire_in_bytes += sum(len(f) for f in frames)
        name = next((n for n, linked in self.linked.items() if linked is s), None)
        if name is not None:
            self._over_link(name, frames)
            return
        rid = self.channels[s] if s in self.channels else bytes(frames.pop(0))
        if not frames:  # our front: this peer is no longer connected to it
            self.state.closed(self.state.routes.get(rid, b""), self.clock.now_s())
            return
        self.route[rid] = s
        try:
            message = decode(frames)
        except ProtocolError as e:
            if s in self.listeners:
                self.listeners[s].refused(frame, e)
            elif s in self.channels and isinstance(e, VersionError):
                self._hang_up(str(e), self.clock.now_s(), REFUSED_REDIAL_S)
                return
            self._refuse_frames(rid, frames, e)
            return
        if self.debug:
            print_line(f"ggmq worker: {message.command.name} seq {message.seq} {message.header}"[:400], file=sys.stderr)
        if message.reply and isinstance(message.header, m.Error) and s in self.channels:
            # a broker that was started again, or that lost sight of us, does not know us
            self._hang_up(message.header.message, self.clock.now_s())
            return
        if not self.state.admit(rid, message, self.clock.now_s()):
            return
        if message.command == Command.PING:
            self._carry_out(self.state.handle(rid, message))
        elif isinstance(message.header, m.Cancel):
            self._cancel(rid, message, message.header)
        elif isinstance(message.header, m.HandOver):
            answer, ready = self.state.handed(rid, message, self.clock.now_s())
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
        self._carry_out(self.links.received(name, message, self.clock.now_s()))

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
            raise Cancelled("STAGE_COMPUTE was cancelled")

    def _handle(self, rid: bytes, message: Message) -> Sequence[LinkInstruction]:
        h, now = message.header, self.clock.now_s()
        if not self.state.current(rid, message):
            return []
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
        broker = self.broker
        if broker is None or rid not in (broker.control, broker.bulk):
            return []
        if self.cluster and not tokens.belongs(h.token, "broker", self.cluster):
            self._hang_up("the broker that answers there is not that of this worker's cluster", now)
            return []
        if broker.token != h.token:  # another one: nobody can ask any more for what the one before held
            self._forget({broker.token})
        broker.token, broker.said, broker.reaching = h.token, "", None
        for key in self.state.hello(rid, m.Hello(h.version, "broker", h.token, h.epoch, h.session), now):
            self._free(key)
        return []

    def _dial_peer(self, rid: bytes, message: Message, h: m.PeerDial, now: float) -> Sequence[LinkInstruction]:
        if h.endpoint.startswith("ipc://") and not (self.broker is not None and self.broker.endpoint.startswith("ipc://")):
            raise ProtocolError("PEER_DIAL: a worker connects to a path of its host only for a broker of its host")
        return self.links.dial(rid, message, secrets.token_bytes(16), now)

    def _carry_out(self, instructions: Sequence[LinkInstruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Work):
                h = instruction.request.header
                self.running = (instruction.rid, getattr(h, "session", 0), instruction.request.seq)
                try:
                    answers = self.executor.execute(instruction, self._tick)
                finally:
                    self.running = None
                if isinstance(instruction, Compute):
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
            try:
                s = new_socket(self.context, zmq.DEALER, self._keys_for(instruction.endpoint), server=False)
                self.linked[name] = s
                self._add(s)
                s.connect(instruction.endpoint)
            except (Unavailable, zmq.ZMQError) as e:
                self._carry_out(self.links.lost(name, str(e)))
        elif s is None:
            return
        elif isinstance(instruction, HangUp):
            del self.linked[name]
            self._remove(s)
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
        if self.stopping and self.running is not None:
            raise Cancelled("the worker is being stopped")

    def _send(self, instruction: Send) -> None:
        s = self.route.get(instruction.rid)
        if s is None or s.closed:
            return
        frames = encode(instruction.message)
        self.state.wire_out_bytes += sum(len(f) for f in frames)
        if s not in self.channels:
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
