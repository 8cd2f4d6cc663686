"""Real processes that a test starts, suspends and kills, and what the system says of them."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ggmq.cluster import Client, connect
from protocol.errors import GgmqError
from tests.support.fixtures import ROOT

GGMQ = [sys.executable, "-m", "ggmq"]
WORKER = [sys.executable, "-m", "workers"]


@contextlib.contextmanager
def started(command: list[str], **more: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has ended when the block ends, whatever state it was in."""
    p = subprocess.Popen(command, cwd=ROOT, **{"stdout": subprocess.DEVNULL, **more})  # type: ignore[call-overload]
    try:
        yield p
    finally:
        for s in (signal.SIGTERM, signal.SIGCONT):
            p.send_signal(s)
        try:
            p.wait(10)
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()
        for pipe in (p.stdin, p.stdout, p.stderr):
            if pipe is not None:
                pipe.close()


def until(true: Callable[[], object], within_s: float = 20.0) -> float:
    """Wait for something. Returns: how long it took, in seconds."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < within_s, f"not within {within_s:.0f} s"
        time.sleep(0.02)
    return time.monotonic() - start


def await_devices(endpoint: str, n: int, within_s: float = 30.0) -> None:
    """Until a broker has so many devices that are ready."""

    def there() -> bool:
        with contextlib.suppress(GgmqError):
            client: Client = connect(endpoint)
            try:
                return sum(d.state == "ready" for d in client.devices()) == n
            finally:
                client.close()
        return False

    until(there, within_s)


def await_port(port: int, within_s: float = 60.0) -> None:
    """Until somebody listens there; a busy host may take long to start a process."""

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    until(listens, within_s)


def rss_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def n_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def read_some(p: subprocess.Popen[bytes], n: int) -> bytes:
    """The first bytes that a process prints; the rest stays in the pipe."""
    assert p.stdout is not None
    got = b""
    while len(got) < n:
        more = os.read(p.stdout.fileno(), n - len(got))
        assert more, "it ended"
        got += more
    return got


def children_of(pid: int) -> list[int]:
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(p) for p in out.stdout.split()]
