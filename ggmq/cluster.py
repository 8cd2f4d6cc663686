"""A client of the bus: requests and replies over one DEALER, and the devices behind it.

`LocalBus` runs a broker in a thread, and starts workers on this host; `connect` goes to a broker that runs elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zmq

from broker.loop import BrokerLoop
from config.auth import close_monitored, happening, monitor_of, new_socket, socket_folder
from config.clock import LivedClock
from config.installed import module_command, module_environment
from config.keys import KeyPair, require
from config.reaching import Happening, Reaching
from config.roles import Role
from config.terminal import print_line
from ggmq.version import __version__
from protocol import PROTOCOL_VERSION, limits, tokens
from protocol import messages as m
from protocol.errors import (
    DeadlineExceeded,
    ForeignCluster,
    GgmqError,
    ProtocolError,
    Unavailable,
    VersionError,
    WorkerLost,
)
from protocol.frames import Frame, Message, decode, encode
from protocol.messages import Command

SOFTWARE = f"ggmq {__version__}"
CONNECT_S = 10.0
START_S = 600.0
END_S = 3.0
MAX_KILLED = 8
"""So many local workers may be killed, by whomever, before all are ready for the first time."""
REOPEN_S = 0.1
"""Between two tries to reach a broker that has gone."""
NOTED_S = 2.5
"""After a silence of the broker of this long a user is told what is waited for."""


class Client:
    """One session with a broker.

    Attributes:
        session: number that the broker gave; it goes into every handle.
        lost: why the broker is of no more use; empty while it is there.
        changed: the broker has said that its list of devices is another one now; whoever asks for it sets this to False.
        n_round_trips: replies that were waited for.
        note: told what a user should know while a broker that says nothing is waited for.
    Threads: use from one.
    """

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, keys: KeyPair | None = None,
        note: Callable[[str], None] = lambda text: None, cluster: bytes = b"",
    ) -> None:  # fmt: skip
        """`cluster`: the id of the one whose broker is meant. Errors: ForeignCluster when another one answers."""
        self.endpoint, self.note = endpoint, note
        self._context, self._keys, self._cluster = context, keys, cluster
        self._token = tokens.token(secrets.token_bytes(tokens.NAME_BYTES), "client", cluster) if cluster else b""
        self._seq = self.n_round_trips = self._n_buffers = 0
        self.changed = False
        self._clock = LivedClock()
        self.on_wait: Callable[[], None] | None = None
        self._open()

    def _open(self) -> None:
        """Connect, and have a session. Errors: as the constructor's."""
        keys = self._keys if self.endpoint.startswith("tcp") else None
        self.session, self.lost, self._said = 0, "", False
        self._waiting: set[int] = set()
        self._replies: dict[int, Message] = {}
        self._socket = new_socket(self._context, zmq.DEALER, keys, server=False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._monitor: zmq.Socket[Any] | None = None
        if not self.endpoint.startswith("inproc"):
            self._monitor = monitor_of(self._socket)
            self._poller.register(self._monitor, zmq.POLLIN)
        self._heard_s = self._asked_s = self._clock.now_s()
        self._reaching = Reaching(self.endpoint, keys, "broker", self._heard_s, CONNECT_S)
        try:
            self._socket.connect(self.endpoint)
            hello = self._greet().header
            assert isinstance(hello, m.Hello)  # the decoder gives HELLO's reply this type
            if hello.role != "broker":
                raise ProtocolError(f"{self.endpoint}: a ggmq {hello.role} listens there, not a broker; "
                                    "a worker's address is for --rpc")  # fmt: skip
            if self._cluster and hello.token != tokens.answer(self._token, self._cluster):
                raise ForeignCluster("HELLO: the broker that answers belongs to another cluster, or to none")
        except BaseException:
            self.close()
            raise
        self.session = hello.session

    def reopen(self, within_s: float) -> None:
        """Have a new session with a broker that has gone, as soon as it is there again. Of the old one nothing is left.

        Errors: Unavailable when it does not come back within so long, ForeignCluster when another cluster's does.
        """
        why, due = self.lost, self._clock.now_s() + within_s
        while True:
            self.close()
            try:
                self._open()
                return
            except GgmqError as e:
                self.lost = why or str(e)
                if not isinstance(e, Unavailable):
                    raise
                if self._clock.now_s() >= due:
                    raise Unavailable(f"{self.endpoint}: {why or e}; it did not come back within {within_s:.0f} s") from None
            if self.on_wait is not None:
                self.on_wait()
            time.sleep(REOPEN_S)

    def close(self) -> None:
        """Idempotent."""
        if self._socket.closed:
            return
        if self._monitor is not None:
            close_monitored(self._socket, self._monitor)
        self._socket.close(linger=0)

    def another(self) -> Client:
        """A session of its own with the same broker, for another thread or another model. Errors: as for a new client."""
        return Client(self._context, self.endpoint, self._keys, self.note, self._cluster)

    def new_buffer(self) -> int:
        """A number for a buffer of this session that no other has."""
        self._n_buffers += 1
        return self._n_buffers

    def submit(self, header: m.Header, payload: Sequence[Frame] = (), device: int = 0) -> int:
        """Send a request; returns its seq for `wait`. Many may be in flight."""
        self._seq += 1
        frames = encode(Message(m.COMMAND_OF[type(header)], header, tuple(payload), False, device, 0, self._seq))
        if not self._waiting:  # while nothing was asked nothing was to be heard
            self._heard_s = self._clock.now_s()
        self._waiting.add(self._seq)
        if not self.lost:
            self._send(frames)
        return self._seq

    def _send(self, frames: list[Frame]) -> None:
        """Before there is a session ZeroMQ may have given the connection up already; it would wait for ever to send."""
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart(frames, 0 if self.session else zmq.DONTWAIT, copy=False)

    def wait(self, seq: int, timeout_s: float = limits.REQUEST_DEADLINE_S + 5) -> Message:
        """The reply to a request.

        Errors: the error that the reply carries; Unavailable when the broker has gone, DeadlineExceeded when none comes.
        """
        self.await_reply(seq, timeout_s)
        self._waiting.discard(seq)
        reply = self._replies.pop(seq)
        self.n_round_trips += 1
        if isinstance(reply.header, m.Error):
            raise reply.header.error()
        return reply

    def answered(self, seq: int) -> bool:
        """Whether the reply to a request has been taken while others were waited for."""
        return seq in self._replies

    def await_reply(self, seq: int, timeout_s: float = limits.REQUEST_DEADLINE_S + 5) -> None:
        """Until the reply to a request is there for `wait`. Errors: Unavailable, DeadlineExceeded."""
        due = self._clock.now_s() + timeout_s
        while seq not in self._replies:
            now = self._clock.now_s()
            if self.lost:
                raise Unavailable(f"{self.endpoint}: {self.lost}")
            if now >= due or (not self.session and self._hopeless(now)):
                raise self._no_reply(timeout_s - max(0.0, due - now))
            ready = dict(self._poller.poll(int(min(due - now, 0.5 if self.session else 0.1) * 1000) + 1))
            if self._socket in ready:
                try:
                    self._take(self._socket.recv_multipart(copy=False))
                except VersionError as e:
                    raise VersionError(f"{self.endpoint}: {e}") from None
            elif self._monitor is not None and self._monitor in ready:
                self._watch(happening(self._monitor.recv_multipart()))
            else:
                self._look_after()
            if self.on_wait is not None:
                self.on_wait()

    def _greet(self) -> Message:
        """HELLO. A broker that is asleep is waited for longer than one that is not there."""
        hello = m.Hello(PROTOCOL_VERSION, "client", self._token, software=SOFTWARE)
        seq = self.submit(hello)
        self._hello = encode(Message(Command.HELLO, hello, seq=seq))
        try:
            return self.wait(seq, CONNECT_S)
        except DeadlineExceeded:
            if not self._reaching.asleep(self._clock.now_s()):
                raise
        self.note(f"{self.endpoint} answers nothing; waiting for it, {limits.RETURN_S:.0f} s at most")
        return self.wait(seq, limits.RETURN_S - CONNECT_S)

    def _hopeless(self, now: float) -> bool:
        return bool(self._reaching.reason(now)) and not self._reaching.asleep(now)

    def _no_reply(self, waited_s: float) -> DeadlineExceeded:
        within = f"no reply within {waited_s:.0f} s" if waited_s >= 1 else ""
        cause = "" if self.session else self._reaching.cause() or "is a ggmq broker there?"
        return DeadlineExceeded(": ".join(part for part in (self.endpoint, within, cause) if part))

    def _watch(self, what: Happening) -> None:
        """What became of the connection."""
        self._reaching.happened(what, self._clock.now_s())
        if what is Happening.SHAKEN and self._reaching.n_shaken > 1 and not self.session:
            self._send(self._hello)  # the first went with the connection before
        if what is Happening.LOST and self.session:  # before, it may have been anything: ZeroMQ tries again
            self.lost = "the broker closed the connection; it was stopped or killed"

    def _look_after(self) -> None:
        """Nothing comes: ask whether the broker is there, and give up on one that has said nothing for a long time."""
        now = self._clock.now_s()
        if self.session and now - self._heard_s > limits.RETURN_S:
            self.lost = f"the broker has answered nothing for {limits.RETURN_S:.0f} s"
        elif self.session and now - max(self._heard_s, self._asked_s) > limits.PROBE_S:
            self._asked_s = now
            self._waiting.discard(self.submit(m.Ping(0)))
        if self.session and not self._said and now - self._heard_s > NOTED_S:
            self._said = True
            self.note(f"the broker answers nothing; waiting for it, {limits.RETURN_S:.0f} s at most")

    def cancel(self) -> None:
        """Cancel every request that is under way."""
        for seq in sorted(self._waiting - set(self._replies)):
            self._waiting.discard(self.submit(m.Cancel(self.session, seq)))

    def settle(self) -> None:
        """Wait until nothing is under way, whatever comes of it. Errors: Unavailable when the broker has gone."""
        for seq in sorted(self._waiting):
            with contextlib.suppress(GgmqError):
                self.wait(seq)
            self._waiting.discard(seq)
        if self.lost:
            raise Unavailable(f"{self.endpoint}: {self.lost}")

    def _take(self, raw: list[zmq.Frame]) -> None:
        frames: list[Frame] = [f.buffer for f in raw]
        message = decode(frames)
        self._heard_s, self._said = self._clock.now_s(), False
        if message.reply and message.seq in self._waiting:
            self._replies[message.seq] = message
        elif not message.reply and message.command == Command.DEVICE_INFO:
            self.changed = True

    def look(self) -> None:
        """Take in what has come, without waiting: whether the broker is there, and whether its devices have changed."""
        while not self.lost and (ready := dict(self._poller.poll(0))):
            if self._socket in ready:
                self._take(self._socket.recv_multipart(copy=False))
            elif self._monitor is not None:
                self._watch(happening(self._monitor.recv_multipart()))

    def request(
        self, header: m.Header, payload: Sequence[Frame] = (), device: int = 0,
        timeout_s: float = limits.REQUEST_DEADLINE_S + 5,
    ) -> Message:  # fmt: skip
        """Send and wait."""
        return self.wait(self.submit(header, payload, device), timeout_s)

    def devices(self) -> list[m.ListedDevice]:
        """Every device of the bus; its place in the list is its number."""
        out: list[m.ListedDevice] = []
        while True:
            header = self.request(m.DeviceQuery(len(out))).header
            assert isinstance(header, m.DeviceList)  # the decoder gives DEVICE_INFO's reply this type
            out += header.devices
            if len(out) >= header.n_devices or not header.devices:
                return out

    def stats(self, device: int) -> m.Stats:
        header = self.request(m.StatsQuery(), device=device).header
        assert isinstance(header, m.Stats)
        return header

    def found(self, seq: int) -> bool:
        """The answer to a request that is answered with Found. Errors: as `wait`'s."""
        header = self.wait(seq).header
        assert isinstance(header, m.Found)  # the decoder gives the replies to these commands this type
        return header.found

    def release(self) -> bool:
        """Have all devices free the weights that they keep of sessions that ended. Returns: whether there were any."""
        asked = [self.submit(m.Release(), device=i) for i, d in enumerate(self.devices()) if d.state == "ready"]
        found = [self.found(seq) for seq in asked]
        return any(found)

    def drain(self, timeout_s: float = limits.REQUEST_DEADLINE_S + 5) -> None:
        """Free everything of this session, everywhere."""
        self.request(m.Drain(self.session), timeout_s=timeout_s)


class LocalBus:
    """A broker in a thread of this process, with workers of this host and of others.

    Attributes:
        workers: the processes that were started here; they end with the bus, and when this process dies.
    names: of all workers, in the order in which they were added.
    """

    def __init__(self, keys: KeyPair | None = None, listen: str | None = None) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.folder = socket_folder()
        self.keys = keys
        self.broker = BrokerLoop(SOFTWARE, self.context, keys)
        self.broker.listen("inproc://broker")
        self.local_endpoint = self.broker.listen(f"ipc://{Path(self.folder.name) / 'broker'}")
        if listen is not None:
            self.broker.listen(listen)
        self.workers: list[subprocess.Popen[bytes]] = []
        self._local: dict[str, tuple[subprocess.Popen[bytes], str, int, Sequence[str]]] = {}
        self._n_spawned = 0
        self.remote: list[str] = []
        self.names: list[str] = []
        self._clients: list[Client] = []

    def add_remote(self, host_port: str) -> None:
        """A worker that listens; call before `start`."""
        endpoint = f"tcp://{host_port}"
        self.remote.append(endpoint)
        self.names.append(host_port)
        self.broker.connect_worker(endpoint)

    def spawn(self, device: str, threads: int, extra: Sequence[str] = ()) -> str:
        """Start a worker of this host; it dials in. Returns the name that its devices have on the bus."""
        name = f"local{self._n_spawned}"
        self._n_spawned += 1
        # the bus is a path of this host, but other workers that this one connects to may be anywhere
        # with a key of its own nobody is a broker for workers elsewhere
        cluster = self.keys is not None and self.keys.role is Role.CLUSTER
        security = ["--keys", self.keys.path] if self.keys is not None and cluster and self.keys.path else ["--insecure"]
        command = [*module_command("workers"), "--quiet", "-d", device, "-t", str(threads), *security,
                   "--broker", self.local_endpoint, "--parent-pid", str(os.getpid()), "--name", name, *extra]  # fmt: skip
        # a session of its own: Ctrl-C in the terminal reaches this process, which ends its workers itself
        self.workers.append(subprocess.Popen(command, env=module_environment(), start_new_session=True))
        self.broker.children[name] = self.workers[-1].poll
        self._local[name] = (self.workers[-1], device, threads, extra)
        self.names.append(name)
        return name

    def replace_ended(self) -> dict[str, str]:
        """Start a worker for each of this host that has ended. Returns: the names of the ended with those of the new, which
        have their places in `names`."""
        replaced = {}
        for name, (process, device, threads, extra) in list(self._local.items()):
            if process.poll() is not None:
                del self._local[name]
                self.workers.remove(process)
                replaced[name] = self.spawn(device, threads, extra)
                self.names[self.names.index(name)] = self.names.pop()
        return replaced

    def start(self, on_wait: Callable[[], None] | None = None) -> Client:
        """Run the broker and wait for every worker. Errors: WorkerLost names the one that did not come."""
        self.broker.serve_in_thread()
        client = Client(self.context, "inproc://broker")
        self._clients.append(client)
        due = time.monotonic() + START_S
        while True:
            ready = [d for d in client.devices() if d.state == "ready"]
            there = {d.worker for d in ready} | {d.address for d in ready}  # one that listens may have a name of its own
            missing = [name for name in self.names if name not in there]
            if not missing:
                return client
            ended = [p.returncode for p in self.workers if p.poll() is not None]
            if any(code >= 0 for code in ended) or self._n_spawned - len(self.workers) + len(ended) > MAX_KILLED:
                raise WorkerLost(f"a local worker ended with code {ended[0]} before it was ready")
            self.replace_ended()  # somebody has killed it
            for link, worker in list(self.broker.state.workers.items()):
                if worker.lost and link in self.remote:
                    raise Unavailable(f"{link.removeprefix('tcp://')}: {worker.lost}")
            if time.monotonic() > due:
                raise Unavailable(f"workers were not ready within {START_S:.0f} s: {', '.join(missing)}")
            if on_wait is not None:
                on_wait()
            time.sleep(0.02)

    def close(self) -> None:
        """End the workers that were started here, then the broker. Idempotent."""
        for p in self.workers:
            for s in (signal.SIGTERM, signal.SIGCONT):  # one that is suspended ends too
                with contextlib.suppress(ProcessLookupError):
                    p.send_signal(s)
        due = time.monotonic() + END_S
        for p in self.workers:
            try:
                p.wait(max(0.0, due - time.monotonic()))
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        self.workers.clear()
        for client in self._clients:
            client.close()
        self._clients.clear()
        self.broker.stop()
        self.context.destroy(linger=0)
        self.folder.cleanup()


@contextlib.contextmanager
def local_bus(keys: KeyPair | None = None, listen: str | None = None) -> Iterator[LocalBus]:
    """A bus that is closed whatever happens."""
    bus = LocalBus(keys, listen)
    try:
        yield bus
    finally:
        bus.close()


def connect(
    endpoint: str, keys: KeyPair | None = None, note: Callable[[str], None] = lambda text: None, cluster: bytes = b""
) -> Client:
    """A session with a broker elsewhere; `cluster`: the id of the cluster that it must belong to.

    Errors: ConfigError for a worker's key, DeadlineExceeded when nothing answers there, ForeignCluster when another
    cluster's broker does.
    """
    context: zmq.Context[Any] = zmq.Context.instance()
    require(keys, Role.CLIENT, "a session with a broker", "make one with `ggmq keys new NAME --role client`")
    try:
        return Client(context, endpoint, keys, note, cluster)
    except ForeignCluster as e:
        raise ForeignCluster(f"{endpoint}: expected this cluster's broker; {e}; `ggmq status` tells what is up") from None
    except zmq.ZMQError as e:
        raise ProtocolError(f"{endpoint}: expected an endpoint such as tcp://host:5555, {e}") from None


@contextlib.contextmanager
def own_broker(
    listen: str, remote: Sequence[str], keys: KeyPair | None, cluster: bytes = b""
) -> Iterator[BrokerLoop]:
    """A broker on `listen`, connected to workers at `remote`, for a process of its own to run."""
    context: zmq.Context[Any] = zmq.Context()
    try:
        loop = BrokerLoop(SOFTWARE, context, keys, cluster)
        loop.notes.tell = lambda text: print_line(f"ggmq broker: {text}", file=sys.stderr)
        loop.listen(listen)
        for host_port in remote:
            loop.connect_worker(f"tcp://{host_port}")
        yield loop
    finally:
        context.destroy(linger=0)
