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
from tests.support.fixtures import ROOT, free_port

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
ANNOUNCES_8_GIB = b"\x06" + struct.pack(">Q", 8 << 30) + bytes(1000)


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


def rss_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.parametrize("says", [b"", GREETING + ANNOUNCES_8_GIB], ids=["silent", "announces 8 GiB"])
def test_a_crowd_of_strangers_changes_nothing(guarded: tuple[subprocess.Popen[str], int, KeyPair], says: bytes) -> None:
    worker, port, keys = guarded
    with local_bus(keys) as bus:
        bus.add_remote(f"127.0.0.1:{port}")
        client = bus.start()
        client.stats(0)
        before = rss_bytes(worker.pid)
        crowd = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(300)]
        try:
            for s in crowd:
                s.sendall(says)
            for _ in range(200):
                assert client.stats(0).device == "reference"
            assert rss_bytes(worker.pid) - before < 10 << 20
        finally:
            for s in crowd:
                s.close()


def test_no_file_descriptor_left(guarded: tuple[subprocess.Popen[str], int, KeyPair]) -> None:
    worker, port, keys = guarded
    crowd: list[socket.socket] = []
    with local_bus(keys) as bus:
        bus.add_remote(f"127.0.0.1:{port}")
        client = bus.start()
        client.stats(0)
        n_open = len(list(Path(f"/proc/{worker.pid}/fd").iterdir()))
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (n_open + 8, n_open + 8))
        try:
            for _ in range(200):
                try:
                    crowd.append(socket.create_connection(("127.0.0.1", port), 0.2))
                except OSError:
                    break  # the queue of connections that nobody can accept is full
            for _ in range(200):
                assert client.stats(0).device == "reference"
        finally:
            for s in crowd:
                s.close()
    with local_bus(keys) as bus:
        bus.add_remote(f"127.0.0.1:{port}")
        assert bus.start().stats(0).device == "reference", "a new client is served once the crowd has gone"
