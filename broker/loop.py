"""Moves bytes between a broker's sockets and its state machine. One thread; `serve` may run in one of its own."""

from __future__ import annotations

import math
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
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
    LinkCarried,
    LinkLost,
    LinkOpened,
    LinkStuck,
    Redial,
    Tick,
    ToClient,
    ToWorker,
    Unreached,
    WorkerEnded,
)
from broker.notes import Notes
from broker.pacing import PAUSE_S, Pacing
from broker.state import BrokerState
from broker.tracing import Traces
from config.allowed import Allowed, list_beside
from config.auth import close_monitored, happening, monitor_of, new_socket
from config.carrying import carried
from config.clock import LivedClock
from config.cores import n_cores
from config.keys import KeyPair, require
from config.listening import Listener, Watch
from config.reaching import Happening, Reaching
from config.roles import Caller, Callers, Role
from config.stuck import Stuck, Way
from config.terminal import print_line
from config.zap import Authenticator
from protocol import limits
from protocol import messages as m
from protocol.errors import GgmqError, Overloaded, ProtocolError, VersionError
from protocol.frames import Frame, Message, decode, encode, refusal_of
from protocol.messages import Command
from protocol.tracing import encode_noted

Where = tuple[int, bytes]
"""A listener, and a routing id there."""
TICK_S = 0.1
"""So often time passes in the state machine, and connections are looked at."""
HOPE_S = limits.RECONNECT_S - 5 * TICK_S
"""A worker that is not reached is dialled afresh after RECONNECT_S; why it was not is known before."""
GONE = "the connection was closed; the worker was stopped or killed"


class BrokerLoop:
    """Attributes:
    endpoints: what it listens on, with real ports.
    notes: who comes and goes, and why, and why a worker that listens is not reached.
    children: worker processes that were started here, by the name their devices have: how each one ended, None until then.
    Threads: `run` in one thread; `listen` and `connect_worker` before it starts, `stop` from any.
    """

    def __init__(
        self, software: str, context: zmq.Context[Any], keys: KeyPair | None = None, cluster: bytes = b""
    ) -> None:
        self.context, self.keys = context, keys
        self.state = BrokerState(software, int(time.time()) & 0x3FFFFFFF, secrets.token_bytes(16),
                                 secrets.randbits(48) << 8, secret=secrets.token_bytes(32), cluster=cluster)  # fmt: skip
        self.endpoints: list[str] = []
        self.notes = Notes()
        self.children: dict[str, Callable[[], int | None]] = {}
        self.clock = LivedClock(longest_step_s=3 * TICK_S)
        self._listeners: list[Listener] = []
        self._watch = Watch(TICK_S)
        self._dealers: dict[Link, tuple[zmq.Socket[Any], zmq.Socket[Any]]] = {}
        self._monitors: dict[zmq.Socket[Any], Link] = {}
        self._reaching: dict[Link, Reaching] = {}
        self._owner: dict[zmq.Socket[Any], tuple[Link, bool]] = {}
        self._dialled: dict[Where, tuple[Link, bool]] = {}
        self._rids: dict[tuple[Link, bool], Where] = {}
        self._fds: dict[tuple[Link, bool], int] = {}
        self._tokens: dict[bytes, Link] = {}
        self._stuck: dict[Link, Stuck] = {}
        self._early: dict[tuple[bytes, str, int], tuple[Where, Message, int, float]] = {}
        self._dials: dict[Link, int] = {}
        self._allowed: Allowed | None = None
        self._callers: Callers[Where] = Callers()
        self._owners: dict[bytes, Caller] = {}
        self._trouble = ""
        self._traces = Traces()
        self._pacing = Pacing(n_cores())
        self._auth: Authenticator | None = None
        self._stopping = False
        self._poller = zmq.Poller()
        self._thread: threading.Thread | None = None

    def listen(self, endpoint: str) -> str:
        """Bind a ROUTER for clients and for workers that dial in. CURVE on TCP when there are keys.

        Errors: ConfigError when it cannot be bound, the keys are not a cluster's, or a wrong key is not refused there.
        """
        tcp = endpoint.startswith("tcp://")
        if tcp and self.keys is not None and self._auth is None:
            require(self.keys, Role.CLUSTER, "a broker", "run it where the cluster's key is")
            listed = list_beside(Path(self.keys.path)) if self.keys.path else None
            self._allowed = Allowed(self.keys, listed)
            self._auth = Authenticator(self.context, self._allowed)
        listener = Listener(self.context, endpoint, self._allowed if tcp else None, "is another broker there?",
                            limits.MAX_MESSAGE_BYTES, "ggmq broker")  # fmt: skip
        self._listeners.append(listener)
        self._poller.register(listener.socket, zmq.POLLIN)
        self.endpoints.append(listener.endpoint)
        return listener.endpoint

    def connect_worker(self, endpoint: str) -> None:
        """Connect to a worker that listens, with a control and a bulk channel. Call before `run`.

        Errors: ConfigError when the keys are not the cluster's: a worker that listens takes no other from a broker.
        """
        require(self.keys, Role.CLUSTER, "a worker that listens", "use a broker that runs: --broker ENDPOINT")
        sockets = []
        for bulk in (False, True):
            s = new_socket(self.context, zmq.DEALER, self.keys, server=False)
            if not bulk:
                monitor = monitor_of(s)
                self._monitors[monitor] = endpoint
                self._poller.register(monitor, zmq.POLLIN)
            s.connect(endpoint)
            self._owner[s] = (endpoint, bulk)
            self._poller.register(s, zmq.POLLIN)
            sockets.append(s)
        self._dealers[endpoint] = (sockets[0], sockets[1])
        now = self.clock.now_s()
        self._reaching[endpoint] = Reaching(endpoint, self.keys, "worker", now, HOPE_S)
        self._handle(LinkOpened(endpoint, now))

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
                wait_s = min(self._watch.wait_s, self._pacing.wait_s(self.clock.now_s()))
                refused = False
                for s, _ in self._poller.poll(math.ceil(wait_s * 1000)):
                    refused |= self._drain_socket(s)
                self._release()
                if refused:
                    time.sleep(PAUSE_S)
                now = self.clock.now_s()
                if now >= next_tick:
                    next_tick = now + TICK_S
                    self._tick(now)
                self._watch.look(self._listeners)
        finally:
            for link in list(self._dealers):
                self._close(link)
            for listener in self._listeners:
                listener.close()
            if self._auth is not None:
                self._auth.stop()

    def _tick(self, now: float) -> None:
        for name, ended in list(self.children.items()):
            if ended() is not None:
                del self.children[name]
                self._handle(WorkerEnded(name, GONE, now))
        self._look_at_unreached(now)
        self._look_at_late(now)
        self._look_at_silent(now)
        self._look_at_keys(now)
        self._pacing.tick(now)
        self._handle(Tick(now))
        self.notes.tick(now)
        self._early = {t: e for t, e in self._early.items() if now - e[3] < limits.RECONNECT_S}
        self._owners = {t: c for t, c in self._owners.items() if t in self._tokens or self.state.devices.known(t)}
        early = {where for where, _, _, _ in self._early.values()}
        self._callers.keep({(peer[0], peer[1:]) for peer in self.state.clients} | self._dialled.keys() | early)

    def _look_at_keys(self, now: float) -> None:
        """Whose key was removed, or has another role now, loses its session."""
        if self._allowed is None:
            return
        self._allowed.refresh()
        if self._allowed.trouble != self._trouble:
            self._trouble = self._allowed.trouble
            if self._trouble:
                print_line(f"ggmq broker: {self._trouble}; until then only the cluster's key is let in", file=sys.stderr)
        for where, caller in self._callers.all().items():
            if caller.key and self._allowed.caller(caller.key) != caller:
                self._gone(where, f"its key, {caller.name or 'the one it came with'}, is not let in any more", now)

    def _gone(self, where: Where, reason: str, now: float) -> None:
        """Nobody speaks for a routing id any more."""
        self._callers.forget(where)
        self._pacing.forget(where)
        known = self._dialled.get(where)
        self._handle(ClientLost(_peer(where), now) if known is None else LinkLost(known[0], reason, now))

    def _is_unreached(self, link: Link) -> bool:
        """Whether a worker that listens has not answered HELLO yet."""
        worker = self.state.workers.get(link)
        return link in self._reaching and worker is not None and not worker.ready and not worker.silent

    def _look_at_unreached(self, now: float) -> None:
        for link, reaching in self._reaching.items():
            reason = reaching.reason(now) if self._is_unreached(link) else ""
            if reason:
                if reason != self.state.workers[link].lost:
                    self.notes.say(f"{link.removeprefix('tcp://')}: {reason}; dialling on")
                self._handle(Unreached(link, reason, now))

    def _look_at_late(self, now: float) -> None:
        """What is on its way to and from workers that have not answered yet."""
        for link, worker in list(self.state.workers.items()):
            if worker.awaited:
                control, bulk = (carried(self._fds.get((link, b), -1)) for b in (False, True))
                if control is not None:
                    n_bytes = control.n_bytes + (bulk.n_bytes if bulk is not None else 0)
                    self._handle(LinkCarried(link, n_bytes, control.network_s, now))

    def _look_at_silent(self, now: float) -> None:
        """A worker that listens and is silent may only have a connection over which nothing comes any more."""
        workers = self.state.workers
        silent = {link for link in self._dealers if workers[link].silent and workers[link].hello is None}
        self._stuck = {link: self._stuck.get(link) or Stuck(link, self.keys, now) for link in silent}
        for link, stuck in self._stuck.items():
            match stuck.look(now):
                case Way.OPEN:
                    self._handle(LinkStuck(link, now))
                case Way.REFUSED:
                    self._handle(LinkLost(link, GONE, now))

    def _handle(self, event: Event) -> None:
        if self._traces or (isinstance(event, FromClient) and isinstance(event.message.header, m.TraceQuery)):
            self._handle_traced(event)
        else:
            self._do(self.state.handle(event))
        for text in self.state.notes:
            self.notes.say(text)
        self.state.notes.clear()

    def _handle_traced(self, event: Event) -> None:
        begun_ns = time.monotonic_ns()
        out = self.state.handle(event)
        for i, instruction in enumerate(out):
            if isinstance(event, FromClient) and isinstance(instruction, ToClient):
                out[i] = self._with_noted(event, instruction)
        self._do(out)
        self._traces.passed(event, out, begun_ns, time.monotonic_ns())

    def _with_noted(self, event: FromClient, answer: ToClient) -> ToClient:
        """The answer to a client, with what it asks for if it asks for what was noted here."""
        h = event.message.header
        if not isinstance(h, m.TraceQuery) or not isinstance(answer.message.header, m.Traced):
            return answer
        try:
            noted = self._traces.ask(event.rid, h.n_computes)
        except GgmqError as e:
            return ToClient(event.rid, event.message.refusal(e))
        return ToClient(event.rid, event.message.answer(m.Traced(time.monotonic_ns()), [encode_noted(noted)]))

    def _drain_socket(self, s: zmq.Socket[Any]) -> bool:
        """Take in what has arrived, but not for ever: the other sockets get their turn.

        Returns: whether a client has sent more than is read at once.
        """
        refused: set[Where] = set()
        for _ in range(64):
            try:
                raw = s.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.ZMQError:
                return False
            frames: list[Frame] = [f.buffer if len(f) > 4096 else f.bytes for f in raw]
            now = self.clock.now_s()
            if s in self._monitors:
                self._monitored(self._monitors[s], happening([f.bytes for f in raw]), now)
                if s.closed:
                    return False
                continue
            if s in self._owner:
                link, bulk = self._owner[s]
                self._fds.setdefault((link, bulk), int(raw[-1].get(zmq.SRCFD)))
                self._worker_frames(link, bulk, frames, now)
                if s.closed:
                    return False
            else:
                index = next(i for i, listener in enumerate(self._listeners) if listener.socket is s)
                where = (index, bytes(frames[0]))
                if self._pacing.is_cut(where, now):
                    continue
                known = where in self._dialled
                most = limits.MAX_MESSAGE_BYTES if known else limits.MAX_REQUEST_BYTES
                caller = self._listeners[index].heard(raw[-1], most)
                if caller is not None:
                    self._router_frames(index, frames, raw[-1], caller, now)
                if known or not self._pacing.full(where):
                    refused.clear()  # answers of workers, or what others ask, may be waiting behind
                elif where in refused:
                    return True
                else:
                    refused.add(where)
        return False

    def _monitored(self, link: Link, what: Happening, now: float) -> None:
        self._reaching[link].happened(what, now)
        if not self._is_unreached(link):
            if what in (Happening.LOST, Happening.DENIED):
                self._handle(LinkLost(link, GONE, now))
        elif what is Happening.SHAKEN and self._reaching[link].n_shaken > 1:
            self._handle(LinkOpened(link, now))  # our HELLO went with the connection before

    def _worker_frames(self, link: Link, bulk: bool, frames: list[Frame], now: float, key: bytes = b"") -> None:
        try:
            message = decode(frames)
        except ProtocolError as e:
            if isinstance(e, VersionError) and link in self._reaching:  # the next time will be no better
                self._reaching[link].known = str(e)
                return
            self._handle(LinkLost(link, f"it broke the protocol: {e}", now))
            return
        h = message.header
        if isinstance(h, m.Hello) and not message.reply and self._tokens.get(h.token) != link:
            self._handle(LinkLost(link, "it broke the protocol: HELLO of another worker", now))
            return
        if isinstance(h, m.Hello) and message.reply and h.role != "worker" and link in self._reaching:
            self._reaching[link].known = (f"a ggmq {h.role} listens there, not a worker; "
                                          "a broker's address is for --broker")  # fmt: skip
            return
        self._handle(FromWorker(link, message, now, bulk, key))

    def _router_frames(self, index: int, frames: list[Frame], frame: zmq.Frame, caller: Caller, now: float) -> None:
        rid = bytes(frames[0])
        where = (index, rid)
        if self._callers.is_another(where, caller):
            self._gone(where, GONE, now)
        known = self._dialled.get(where)
        if known is not None:
            self._worker_frames(*known, frames[1:], now, _own_key(caller))
            return
        peer = _peer(where)
        try:
            message = decode(frames[1:])
        except ProtocolError as e:
            self._listeners[index].refused(frame, e)
            self._reject(peer, frames[1:], e)
            return
        h = message.header
        try:
            if isinstance(h, m.Hello):
                self._callers.greet(where, caller, h.role)
            if isinstance(h, m.Hello) and h.role.startswith("worker") and not message.reply:
                fd = int(frame.get(zmq.SRCFD)) if self._listeners[index].endpoint.startswith("tcp://") else -1
                self._dialled_in(where, h, message, caller, fd, now)
                return
            if peer not in self.state.clients and not isinstance(h, m.Hello) and not message.reply:
                self._lose_patience(where, frame, f"it asked for {message.command.name} and more before HELLO", now)
            if isinstance(h, m.Retire) and caller.role is not Role.CLUSTER:
                raise ProtocolError("RETIRE: who may use a worker is for the holder of the cluster's key to say")
        except ProtocolError as e:
            self._do([self.state.traffic.refuse(peer, message, e)])
            return
        if self._pacing.full(where):
            many = f"{limits.MAX_INFLIGHT_PER_CLIENT} requests of this client wait for their turn"
            refusal = Overloaded(f"{message.command.name}: {many}; wait for replies")
            self._do([self.state.traffic.refuse(peer, message, refusal)])
            self._lose_patience(where, frame, f"{many}, and it sends on", now)
        elif self._pacing.goes_on(where, message, sum(len(f) for f in frames), now):
            self._handle(FromClient(peer, message, now))

    def _lose_patience(self, where: Where, frame: zmq.Frame, reason: str, now: float) -> None:
        """A request, of which this is a frame, is refused for what its sender should know: with too many he is cut off."""
        if self._pacing.cut(where, _peer(where) in self.state.clients, now):
            self._listeners[where[0]].cut(frame)
            self.notes.say(f"a client was cut off: {reason}")
            self._gone(where, reason, now)

    def _release(self) -> None:
        """Handle what hasty clients asked for, as far as it is its time."""
        def n_inflight(where: Where) -> int:
            client = self.state.clients.get(_peer(where))
            return client.n_inflight if client is not None else 0

        now = self.clock.now_s()
        for where, message in self._pacing.released(n_inflight, now):
            self._handle(FromClient(_peer(where), message, now))

    def _dialled_in(self, where: Where, h: m.Hello, message: Message, caller: Caller, fd: int, now: float) -> None:
        """A worker's HELLO on one of its channels; the two connections may arrive in either order.

        Errors: ProtocolError when another key has said HELLO with its token: others know that too.
        """
        bulk = h.role.endswith("-bulk")
        owner = self._owners.get(h.token)
        taken = owner is None and caller.role is not Role.CLUSTER and self.state.devices.known(h.token)
        if taken or (owner is not None and owner.key != caller.key):
            raise ProtocolError("HELLO: this token is that of a worker with another key")
        link = self._tokens.get(h.token) if bulk else f"dial/{where[0]}.{where[1].hex()}"
        if link is None or (bulk and self._dials.get(link) != h.session):  # it comes before its control channel
            if len(self._early) < limits.MAX_SESSIONS:
                self._early[(h.token, caller.key, h.session)] = (where, message, fd, now)
            return
        self._fds[link, bulk] = fd
        self._tokens[h.token], self._owners[h.token], self._dials[link] = link, caller, h.session
        self._dialled[where] = (link, bulk)
        self._rids[(link, bulk)] = where
        self._handle(FromWorker(link, message, now, bulk, _own_key(caller)))
        early = self._early.pop((h.token, caller.key, h.session), None)
        if early is not None and not bulk and isinstance(early[1].header, m.Hello):
            self._dialled_in(early[0], early[1].header, early[1], caller, early[2], now)

    def _reject(self, peer: bytes, frames: list[Frame], error: ProtocolError) -> None:
        refusal = refusal_of(frames, error)
        if refusal is not None:
            self.state.traffic.n_refused += 1
            self._do([ToClient(peer, refusal)])

    def _do(self, instructions: list[Instruction]) -> None:
        for i in instructions:
            if isinstance(i, CloseLink):
                self._close(i.link)
            elif isinstance(i, Redial):
                self._close(i.link)
                try:
                    self.connect_worker(i.link)
                except GgmqError as e:  # no descriptor left: the state machine asks again
                    print_line(f"ggmq broker: {i.link}: {e}", file=sys.stderr)
            else:
                self._send(i)

    def _send(self, i: ToClient | ToWorker) -> None:
        if isinstance(i, ToClient):
            where: Where | None = (i.rid[0], i.rid[1:])
            gone: Event = ClientLost(i.rid, self.clock.now_s())
        else:
            where = self._rids.get((i.link, i.bulk))
            gone = LinkLost(i.link, GONE, self.clock.now_s())
        frames = encode(i.message)
        try:
            if where is not None:
                self._listeners[where[0]].socket.send_multipart([where[1], *frames], zmq.DONTWAIT, copy=False)
            elif not isinstance(i, ToClient) and i.link in self._dealers:
                self._dealers[i.link][i.bulk].send_multipart(frames, zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as e:
            if e.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                # a first HELLO: ZeroMQ has given the connection up already, and that is found out beside
                if isinstance(i, ToClient) and where is not None:
                    self._pacing.forget(where)
                if isinstance(i, ToClient) or i.message.command != Command.HELLO or not self._is_unreached(i.link):
                    self._handle(gone)
            else:
                print_line(f"ggmq broker: cannot send: {e}", file=sys.stderr)

    def _close(self, link: Link) -> None:
        self._reaching.pop(link, None)
        self._dials.pop(link, None)
        for monitor in [k for k, v in self._monitors.items() if v == link]:
            self._poller.unregister(monitor)
            self._monitors.pop(monitor)
            close_monitored(self._dealers[link][0], monitor)
        for s in self._dealers.pop(link, ()):
            self._poller.unregister(s)
            self._owner.pop(s, None)
            s.close()
        for bulk in (False, True):
            self._fds.pop((link, bulk), None)
            where = self._rids.pop((link, bulk), None)
            if where is not None:
                self._dialled.pop(where, None)
        self._tokens = {t: known for t, known in self._tokens.items() if known != link}


def _own_key(caller: Caller) -> bytes:
    """The public key of a worker that has one of its own."""
    return caller.key.encode() if caller.role is Role.WORKER else b""


def _peer(where: Where) -> bytes:
    """How the state machine calls who speaks there."""
    return bytes([where[0]]) + where[1]
