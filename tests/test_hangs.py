"""Who hangs is suspected at once, in mid-compute too, and who only takes long never: real processes and a slow link."""

from __future__ import annotations

import contextlib
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ggmq.cluster import Client, connect, local_bus
from protocol import messages as m
from protocol.dtypes import GGMLType, contiguous_nb
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import WorkerLost
from protocol.graph import Graph, Tensor
from tests.support import spinning
from tests.support.fixtures import free_port
from tests.support.processes import GGMQ, WORKER, await_devices, started, until
from tests.support.strategies import leaf

F32 = GGMLType.F32
SUSPECTED_S = 1.5
LATE_S = 2.0
"""What a machine that has other work to do may add to it before a test sees it."""
SIZE = 3072
"""Of a square product that NumPy takes some seconds over."""


@contextlib.contextmanager
def bus(*worker: str) -> Iterator[tuple[Client, subprocess.Popen[bytes]]]:
    """A broker of its own with one worker."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with started([*GGMQ, "broker", "--listen", endpoint, "--insecure"]), \
            started([*worker, "--broker", endpoint, "-t", "1", "--insecure"], stderr=subprocess.DEVNULL) as w:  # fmt: skip
        await_devices(endpoint, 1)
        client = connect(endpoint)
        try:
            yield client, w
        finally:
            client.close()


class Product:
    """A square product of what lies in a buffer, put on a client's device; its result is the sum of each row's ones."""

    def __init__(self, client: Client, n: int = SIZE, n_times: int = 1) -> None:
        ne = (n, n, 1, 1)
        self.client, self.n = client, n
        self.buffer = client.new_buffer()
        client.request(m.AllocBuffer(client.session, self.buffer, 4 * n * n))
        ones = np.ones(1 << 18, np.float32).tobytes()
        for at in range(0, 4 * n * n, len(ones)):
            data = ones[: 4 * n * n - at]
            client.request(m.SetTensor(client.session, self.buffer, at, len(data)), [data])
        a = leaf(F32, ne, self.buffer)
        nodes = [Tensor(F32, "MUL_MAT", ne, contiguous_nb(F32, ne), src=(0, 0)) for _ in range(n_times)]
        total = Tensor(F32, "SUM_ROWS", (1, n, 1, 1), contiguous_nb(F32, (1, n, 1, 1)), src=(n_times,))
        graph = Graph((a, *nodes, total), (), (n_times + 1,))
        frame = encode_graph(graph)
        self.digest = graph_digest(frame)
        client.request(m.GraphPut(client.session, self.digest), [frame])

    def submit(self) -> int:
        return self.client.submit(m.GraphCompute(self.client.session, self.digest, 0))

    def check(self, seq: int) -> None:
        (out,) = self.client.wait(seq).payload
        assert np.array_equal(np.frombuffer(out, np.float32), np.full(self.n, float(self.n) ** 2, np.float32))


def state(client: Client) -> str:
    return client.devices()[0].state


def suspected(client: Client, since: float) -> None:
    until(lambda: state(client) == "silent", SUSPECTED_S + LATE_S)
    assert time.monotonic() - since < SUSPECTED_S + LATE_S


@pytest.mark.parametrize("pause_s", [0.5, 5.0])
def test_a_worker_that_stands_still_while_idle(pause_s: float) -> None:
    with bus(*WORKER, "-d", "reference") as (client, worker):
        worker.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        if pause_s > SUSPECTED_S:
            suspected(client, begun)
            with pytest.raises(WorkerLost):
                client.stats(0)
        time.sleep(max(0.0, begun + pause_s - time.monotonic()))
        worker.send_signal(signal.SIGCONT)
        until(lambda: state(client) == "ready")
        assert client.stats(0).n_refused == 0


def test_a_worker_that_stands_still_in_mid_compute_is_suspected_and_comes_back() -> None:
    with bus(*WORKER, "-d", "reference") as (client, worker):
        product = Product(client, n_times=4)
        seq = product.submit()
        time.sleep(0.5)
        assert not client.answered(seq)
        worker.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(WorkerLost, match="no answer to PING"):
            client.wait(seq)
        assert time.monotonic() - begun < SUSPECTED_S + LATE_S and state(client) == "silent"
        worker.send_signal(signal.SIGCONT)
        until(lambda: state(client) == "ready", 60)
        before = client.stats(0).n_computes
        product.check(product.submit())
        assert client.stats(0).n_computes == before + 1


def test_a_loop_that_never_answers_is_suspected_and_its_late_reply_is_nobodys() -> None:
    with bus(sys.executable, "-m", spinning.__name__, "-d", spinning.NAME) as (client, _):
        product = Product(client, 64)
        first = product.submit()
        begun = time.monotonic()
        with pytest.raises(WorkerLost, match="no answer to PING"):
            client.wait(first)
        assert time.monotonic() - begun < spinning.SPIN_S, "before it has done with its graph"
        assert state(client) == "silent"
        until(lambda: state(client) == "ready", spinning.SPIN_S + 20)
        assert client.stats(0).n_computes == 1 and not client.answered(first), "its reply came, of an epoch that was over"


@contextlib.contextmanager
def always_ready(client: Client) -> Iterator[None]:
    """Another client looks at a worker's state while the block does something else."""
    other, over, seen = client.another(), threading.Event(), set[str]()

    def look() -> None:
        while not over.wait(0.05):
            seen.add(state(other))
        other.close()

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join(20)
    assert seen == {"ready"}


@pytest.mark.parametrize("device, n, n_times", [("reference", SIZE, 4), ("CPU", SIZE, 12)])
def test_who_computes_for_long_is_never_suspected(kernels: None, device: str, n: int, n_times: int) -> None:
    with bus(*WORKER, "-d", device) as (client, _):
        product = Product(client, n, n_times)
        with always_ready(client):
            product.check(product.submit())


class SlowLink:
    """A TCP proxy with a rate and a delay for each direction, which all its connections share.

    Attributes:
        port: where it listens.
    """

    def __init__(self, to_port: int, bytes_per_s: float, delay_s: float) -> None:
        self._to, self._rate, self._delay_s = to_port, bytes_per_s, delay_s
        self._free_s = [0.0, 0.0]
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets, self._threads = [self._listener], list[threading.Thread]()
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)

    def _start(self, do: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=do, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._sockets += here, there
                for way, (a, b) in enumerate(((here, there), (there, here))):
                    under_way: queue.Queue[tuple[float, bytes]] = queue.Queue(64)
                    self._start(self._take, way, a, under_way)
                    self._start(self._give, b, under_way)

    def _take(self, way: int, s: socket.socket, under_way: queue.Queue[tuple[float, bytes]]) -> None:
        data = b"?"
        while data:
            data = b""
            with contextlib.suppress(OSError):
                data = s.recv(1 << 13)
            with self._lock:  # whoever comes later waits for what came before, as in a router's queue
                self._free_s[way] = max(self._free_s[way], time.monotonic()) + len(data) / self._rate
                due = self._free_s[way]
            time.sleep(max(0.0, due - time.monotonic()))
            under_way.put((due + self._delay_s, data))

    def _give(self, s: socket.socket, under_way: queue.Queue[tuple[float, bytes]]) -> None:
        while True:
            due, data = under_way.get()
            if not data:
                break
            time.sleep(max(0.0, due - time.monotonic()))
            with contextlib.suppress(OSError):
                s.sendall(data)
        with contextlib.suppress(OSError):
            s.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for s in self._sockets:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        for t in self._threads:
            t.join(10)
        for s in self._sockets:
            s.close()


@pytest.mark.parametrize("mbit_per_s, delay_s, n_bytes", [(10.0, 0.0, 3 << 20), (2.0, 0.0, 1 << 20), (100.0, 0.2, 1 << 20)])
def test_an_upload_over_a_slow_link_is_no_silence(mbit_per_s: float, delay_s: float, n_bytes: int) -> None:
    port = free_port()
    with started([*WORKER, "-p", str(port), "-d", "reference", "-t", "1", "--insecure"], stderr=subprocess.DEVNULL):
        until(lambda: _listens(port))
        link = SlowLink(port, mbit_per_s * 125_000, delay_s)
        try:
            with local_bus() as b:
                b.add_remote(f"127.0.0.1:{link.port}")
                client = b.start()
                with always_ready(client):
                    _upload(client, n_bytes)
        finally:
            link.close()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _upload(client: Client, n_bytes: int) -> None:
    """All of a weight at once, in chunks, as under credits."""
    buffer, chunk = client.new_buffer(), 1 << 20
    client.request(m.AllocBuffer(client.session, buffer, n_bytes))
    sent = [client.submit(m.SetTensor(client.session, buffer, at, chunk), [bytes(chunk)]) for at in range(0, n_bytes, chunk)]
    for seq in sent:
        client.wait(seq, 60)
