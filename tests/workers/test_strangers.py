"""Peers without the key: silent ones, ones that announce 8 GiB, and more of them than there are file descriptors."""

from __future__ import annotations

import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.auth import new_keys
from config.keys import KeyPair, write_keys
from ggmq.cluster import local_bus
from protocol import messages as m
from tests.faults.crowd import ANNOUNCES_8_GIB, GREETING
from tests.soak.strangers import crowd
from tests.support.attacker import SESSION, GoodRequest, listening_worker
from tests.support.attacker import Attacker as RawPeer
from tests.support.fixtures import ROOT, free_port
from tests.support.processes import WORKER, n_descriptors, rss_bytes, started, until


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, KeyPair]]:
    """A worker that listens with CURVE, its port and its key."""
    keys = new_keys()
    write_keys(tmp_path / "keys", keys)
    port = free_port()
    command = [sys.executable, "-m", "workers", "-p", str(port), "-d", "reference", "--keys", str(tmp_path / "keys")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as p:
        assert p.stdout is not None
        for line in p.stdout:
            if str(port) in line:
                break
        try:
            yield p, port, keys
        finally:
            p.terminate()


@pytest.mark.parametrize("says", [b"", GREETING + ANNOUNCES_8_GIB], ids=["silent", "announces 8 GiB"])
def test_a_crowd_of_strangers_changes_nothing(guarded: tuple[subprocess.Popen[str], int, KeyPair], says: bytes) -> None:
    worker, port, keys = guarded
    with local_bus(keys) as bus:
        bus.add_remote(f"127.0.0.1:{port}")
        client = bus.start()
        client.stats(0)
        before = rss_bytes(worker.pid)
        peers = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(300)]
        try:
            for s in peers:
                s.sendall(says)
            for _ in range(200):
                assert client.stats(0).device == "reference"
            assert rss_bytes(worker.pid) - before < 10 << 20
        finally:
            for s in peers:
                s.close()


def test_no_file_descriptor_left(guarded: tuple[subprocess.Popen[str], int, KeyPair]) -> None:
    worker, port, keys = guarded
    peers: list[socket.socket] = []
    with local_bus(keys) as bus:
        bus.add_remote(f"127.0.0.1:{port}")
        client = bus.start()
        client.stats(0)
        n_open = len(list(Path(f"/proc/{worker.pid}/fd").iterdir()))
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (n_open + 8, n_open + 8))
        try:
            for _ in range(200):
                try:
                    peers.append(socket.create_connection(("127.0.0.1", port), 0.2))
                except OSError:
                    break  # the queue of connections that nobody can accept is full
            for _ in range(200):
                assert client.stats(0).device == "reference"
        finally:
            for s in peers:
                s.close()
    with local_bus(keys) as bus:
        bus.add_remote(f"127.0.0.1:{port}")
        assert bus.start().stats(0).device == "reference", "a new client is served once the crowd has gone"


@pytest.mark.parametrize("says", [b"", b"\xff"], ids=["silent", "not silent"])
def test_more_strangers_than_descriptors_and_clients_are_served(tmp_path: Path, says: bytes) -> None:
    """Each client has its workers linked, for which they open sockets of their own. Where the system keeps those that are
    silent to itself they take no descriptors."""
    keys = new_keys()
    write_keys(tmp_path / "keys", keys)
    ports = [free_port(), free_port()]
    command = [*WORKER, "-d", "reference", "--keys", str(tmp_path / "keys"), "-p"]
    with started([*command, str(ports[0])]) as first, started([*command, str(ports[1])]):
        with local_bus(keys) as bus:
            bus.add_remote(f"127.0.0.1:{ports[0]}")
            bus.start()
        resource.prlimit(first.pid, resource.RLIMIT_NOFILE, (256, 256))
        with crowd(ports[0], 600, says):
            if says:
                until(lambda: n_descriptors(first.pid) > 150)
            for _ in range(10):
                with local_bus(keys) as bus:
                    for port in ports:
                        bus.add_remote(f"127.0.0.1:{port}")
                    client = bus.start()
                    linked = client.request(m.Link(client.session, [0, 1])).header
                    assert isinstance(linked, m.Found)
                    for _ in range(5):
                        assert client.stats(0).device == "reference"
                assert first.poll() is None, "strangers ended the worker"
            assert says or not hasattr(socket, "TCP_DEFER_ACCEPT") or n_descriptors(first.pid) < 150
        until(lambda: n_descriptors(first.pid) < 100)


NULL_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


def endless_message(port: int, frame: bytes, n_bytes: int) -> int:
    """Send frames of one message that never ends (ZMTP 3.0), until they add up or we are cut off. Returns: bytes sent."""
    header = b"\x03" + struct.pack(">Q", len(frame)) if len(frame) > 255 else bytes([1, len(frame)])
    block = (header + frame) * max(1, (1 << 20) // (len(frame) + len(header)))
    sent = 0
    with socket.create_connection(("127.0.0.1", port), 10) as s:
        s.settimeout(3)  # of one that is cut off while its window is shut the system tells the sender nothing
        s.sendall(NULL_GREETING + READY)
        answer = b""
        while b"ROUTER" not in answer:
            answer += s.recv(1000)
        try:
            while sent < n_bytes:
                s.sendall(block)
                sent += len(block)
        except OSError:
            pass
    return sent


@pytest.mark.parametrize("frame", [bytes(1 << 20), bytes(64), b""], ids=["1 MiB frames", "64 byte frames", "empty frames"])
def test_a_message_that_never_ends_is_cut_off(frame: bytes) -> None:
    with listening_worker() as (port, worker):
        served = RawPeer(port, b"served" * 2)
        try:
            good = GoodRequest(served)
            assert good.answer() == good.expected
            before = rss_bytes(worker.pid)
            most = 3 << 30 if frame else 1 << 28
            assert 8 << 20 < endless_message(port, frame, most) < most, "nobody cut it off"
            assert served.ask(m.StageCompute(SESSION, good.digest, 0)).payload[0] == good.expected
            until(lambda: rss_bytes(worker.pid) - before < 64 << 20)
            assert worker.poll() is None
        finally:
            served.close()
