"""The bad network of the fault runner: what passes, when, and what becomes of messages."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from tests.faults.network import BadNetwork
from tests.faults.zmtp import Splitter
from tests.support.supervised import until


@contextlib.contextmanager
def echo() -> Iterator[int]:
    """A port that answers what it is sent."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(s: socket.socket) -> None:
            with s, contextlib.suppress(OSError):
                while data := s.recv(1 << 16):
                    s.sendall(data)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def network() -> Iterator[BadNetwork]:
    with echo() as port:
        n = BadNetwork(f"127.0.0.1:{port}")
        try:
            yield n
        finally:
            n.end()


def received(s: socket.socket, n: int, within_s: float = 5.0) -> bytes:
    s.settimeout(within_s)
    got = b""
    while len(got) < n and (more := s.recv(n - len(got))):
        got += more
    return got


def test_delays_and_a_thin_link(network: BadNetwork) -> None:
    with socket.create_connection(("127.0.0.1", network.port)) as s:
        network.both(delay_s=0.1)
        start = time.monotonic()
        s.sendall(b"x")
        assert received(s, 1) == b"x" and time.monotonic() - start >= 0.2
        network.say(up={"delay_s": 0.0}, down={"delay_s": 0.0, "mbit": 1.0})
        data = random.randbytes(50_000)
        start = time.monotonic()
        s.sendall(data)
        assert received(s, len(data)) == data and time.monotonic() - start >= 0.39
        assert network.n_bytes() == 2 * len(data) + 2


def test_what_a_hole_holds_back_comes_when_it_closes(network: BadNetwork) -> None:
    with socket.create_connection(("127.0.0.1", network.port)) as s:
        network.say(down={"hole": True})
        s.sendall(b"first")
        with pytest.raises(TimeoutError):
            received(s, 1, 0.3)
        s.sendall(b" second")
        network.say(down={"hole": False})
        assert received(s, 12) == b"first second"


def test_connections_are_closed_and_refused(network: BadNetwork) -> None:
    with socket.create_connection(("127.0.0.1", network.port)) as s:
        s.sendall(b"x")
        assert received(s, 1) == b"x"
        network.say(cut=True, open=False)
        with pytest.raises(ConnectionResetError):
            received(s, 1)
    with socket.create_connection(("127.0.0.1", network.port)) as s, contextlib.suppress(ConnectionResetError):
        assert received(s, 1) == b""
    network.say(open=True)
    with socket.create_connection(("127.0.0.1", network.port)) as s:
        s.sendall(b"y")
        assert received(s, 1) == b"y"


MESSAGES = [[b"a"], [b"", b"b" * 300], [b"c"] * 5, [bytes(70_000), b""]]


@pytest.mark.parametrize("kind", ["drop", "duplicate", "replay", "reorder"])
def test_whole_messages_are_lost_doubled_repeated_and_overtaken(kind: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server, client = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    network = BadNetwork(f"127.0.0.1:{server.bind_to_random_port('tcp://127.0.0.1')}")
    try:
        for s in (server, client):
            s.linger, s.rcvtimeo = 0, 5000
        client.connect(f"tcp://127.0.0.1:{network.port}")
        client.send(b"undisturbed")
        assert server.recv() == b"undisturbed"
        network.say(up={kind: 1.0})
        for message in MESSAGES:
            client.send_multipart(message)
        if kind == "drop":
            assert until(lambda: network.say()["up"].get("dropped") == len(MESSAGES), 5)
        else:
            got = [server.recv_multipart() for _ in range(len(MESSAGES) * (1 if kind == "reorder" else 2))]
            assert all(got.count(message) >= 1 for message in MESSAGES)
            earlier = [[b"undisturbed"], *MESSAGES] if kind == "replay" else MESSAGES
            assert all(message in earlier for message in got) and got != MESSAGES
        network.say(up={kind: 0.0})
        client.send(b"the last")
        assert server.recv() == b"the last"
    finally:
        network.end()
        context.destroy(linger=0)


def test_a_stream_is_split_the_same_however_it_is_cut() -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    command = b"\x04\x05READY"
    small, long = b"\x01\x02ab\x00\x01c", b"\x03" + (300).to_bytes(8, "big") + bytes(300) + b"\x02" + bytes(8)
    stream = greeting + command + small + long + small
    rng = random.Random(1)
    for _ in range(200):
        splitter, units, at = Splitter(), list[tuple[bytes, bool]](), 0
        while at < len(stream):
            n = rng.randint(1, 90)
            units += splitter.feed(stream[at : at + n])
            at += n
        assert b"".join(u for u, _ in units) == stream and not splitter.opaque
        assert [u for u, whole in units if whole] == [small, long, small]
    for other in (b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32), b"GET / HTTP/1.1\r\n\r\n"):
        splitter = Splitter()
        assert b"".join(u for u, _ in splitter.feed(other + stream)) == other + stream and splitter.opaque
