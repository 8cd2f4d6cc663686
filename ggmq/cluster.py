"""A client of the bus: requests and replies over one DEALER, and the devices behind it.

`LocalBus` runs a broker in a thread, and starts workers on this host; `connect` goes to a broker that runs elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zmq

from broker.loop import BrokerLoop
from config.auth import new_socket, socket_folder
from config.keys import KeyPair
from ggmq import __version__
from protocol import PROTOCOL_VERSION, limits
from protocol import messages as m
from protocol.errors import DeadlineExceeded, ProtocolError, Unavailable, WorkerLost, from_wire
from protocol.frames import Frame, Message, decode, encode

SOFTWARE = f"ggmq {__version__}"
CONNECT_S = 10.0
START_S = 600.0


class Client:
    """One session with a broker.

    Attributes:
        session: number that the broker gave; it goes into every handle.
        n_round_trips: replies that were waited for.
    Threads: use from one.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, keys: KeyPair | None = None) -> None:
        self.endpoint = endpoint
        self._socket = new_socket(context, zmq.DEALER, keys if endpoint.startswith("tcp") else None, server=False)
        self._socket.connect(endpoint)
        self._seq = 0
        self._replies: dict[int, Message] = {}
        self.n_round_trips = 0
        self.on_wait: Callable[[], None] | None = None
        try:
            hello = self.request(m.Hello(PROTOCOL_VERSION, "client", software=SOFTWARE), timeout_s=CONNECT_S).header
        except BaseException:
            self.close()
            raise
        assert isinstance(hello, m.Hello)  # the decoder gives HELLO's reply this type
        self.session = hello.session

    def close(self) -> None:
        self._socket.close(linger=0)

    def submit(self, header: m.Header, payload: Sequence[Frame] = (), device: int = 0) -> int:
        """Send a request; returns its seq for `wait`. Many may be in flight."""
        self._seq += 1
        frames = encode(Message(m.COMMAND_OF[type(header)], header, tuple(payload), False, device, 0, self._seq))
        self._socket.send_multipart(frames, copy=False)
        return self._seq

    def wait(self, seq: int, timeout_s: float = limits.REQUEST_DEADLINE_S + 5) -> Message:
        """The reply to a request.

        Errors: the error that the reply carries; DeadlineExceeded when none comes.
        """
        due = time.monotonic() + timeout_s
        while seq not in self._replies:
            left = due - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(f"{self.endpoint}: no reply within {timeout_s:.0f} s; is a ggmq broker there, "
                                       "with the same keys?")  # fmt: skip
            if self._socket.poll(int(min(left, 0.5) * 1000) + 1):
                self._take(self._socket.recv_multipart(copy=False))
            if self.on_wait is not None:
                self.on_wait()
        reply = self._replies.pop(seq)
        self.n_round_trips += 1
        if isinstance(reply.header, m.Error):
            raise from_wire(reply.header.code, reply.header.message)
        return reply

    def _take(self, raw: list[zmq.Frame]) -> None:
        frames: list[Frame] = [f.buffer for f in raw]
        message = decode(frames)
        if message.reply:
            self._replies[message.seq] = message

    def request(
        self, header: m.Header, payload: Sequence[Frame] = (), device: int = 0,
        timeout_s: float = limits.REQUEST_DEADLINE_S + 5,
    ) -> Message:  # fmt: skip
        """Send and wait."""
        return self.wait(self.submit(header, payload, device), timeout_s)

    def devices(self) -> list[m.DeviceInfo]:
        """Every device of the bus, in the broker's numbering."""
        header = self.request(m.DeviceQuery()).header
        assert isinstance(header, m.DeviceList)
        return header.devices

    def stats(self, device: int) -> m.Stats:
        header = self.request(m.StatsQuery(), device=device).header
        assert isinstance(header, m.Stats)
        return header

    def drain(self) -> None:
        """Free everything of this session, everywhere."""
        self.request(m.Drain(self.session))


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
        name = f"local{len(self.workers)}"
        # the bus is a path of this host, but other workers that this one connects to may be anywhere
        security = ["--keys", self.keys.path] if self.keys is not None and self.keys.path else ["--insecure"]
        command = [sys.executable, "-m", "workers", "--quiet", "-d", device, "-t", str(threads), *security,
                   "--broker", self.local_endpoint, "--parent-pid", str(os.getpid()), "--name", name, *extra]  # fmt: skip
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        # a session of its own: Ctrl-C in the terminal reaches this process, which ends its workers itself
        self.workers.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True))
        self.names.append(name)
        return name

    def start(self, on_wait: Callable[[], None] | None = None) -> Client:
        """Run the broker and wait for every worker. Errors: WorkerLost names the one that did not come."""
        self.broker.serve_in_thread()
        client = Client(self.context, "inproc://broker")
        self._clients.append(client)
        due = time.monotonic() + START_S
        while True:
            there = {d.worker for d in client.devices()}
            missing = [name for name in self.names if name not in there]
            if not missing:
                return client
            for p in self.workers:
                if p.poll() is not None:
                    raise WorkerLost(f"a local worker ended with code {p.returncode} before it was ready")
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
            with contextlib.suppress(ProcessLookupError):
                p.send_signal(signal.SIGTERM)
        for p in self.workers:
            try:
                p.wait(3)
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


def connect(endpoint: str, keys: KeyPair | None = None) -> Client:
    """A session with a broker elsewhere. Errors: DeadlineExceeded when nothing answers there."""
    context: zmq.Context[Any] = zmq.Context.instance()
    try:
        return Client(context, endpoint, keys)
    except zmq.ZMQError as e:
        raise ProtocolError(f"{endpoint}: expected an endpoint such as tcp://host:5555, {e}") from None


@contextlib.contextmanager
def own_broker(listen: str, remote: Sequence[str], keys: KeyPair | None) -> Iterator[BrokerLoop]:
    """A broker on `listen`, connected to workers at `remote`, for a process of its own to run."""
    context: zmq.Context[Any] = zmq.Context()
    try:
        loop = BrokerLoop(SOFTWARE, context, keys)
        loop.listen(listen)
        for host_port in remote:
            loop.connect_worker(f"tcp://{host_port}")
        yield loop
    finally:
        context.destroy(linger=0)
