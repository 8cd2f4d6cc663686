"""A server as people start it: a process of its own, asked over sockets."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.processes import GGMQ, started


@dataclass
class Running:
    """A server that answers. Attributes: url, without a slash at its end; process."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, **body: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def exchange(self, *sent: bytes, within_s: float = 10.0) -> bytes:
        """What comes back for some bytes until the server closes, or says no more for so long."""
        with socket.create_connection(("127.0.0.1", self.port), within_s) as s:
            got = b""
            with contextlib.suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
                for piece in sent:
                    s.sendall(piece)
                while more := s.recv(1 << 16):
                    got += more
            return got


@contextlib.contextmanager
def serving(*options: str, model: Path | None = None, log: str = "off", **more: object) -> Iterator[Running]:
    """`ggmq serve` on a free port, with one worker of one thread; it has ended when the block ends."""
    command = [*GGMQ, "serve", "--port", "0", "--workers", "1", "-t", "1", "--log-level", log, *options]
    if model is not None:
        command += ["-m", str(model)]
    with started(command, stdout=subprocess.PIPE, **more) as process:
        assert process.stdout is not None  # a pipe was asked for
        line = process.stdout.readline().decode()
        assert " at http://" in line, line
        yield Running(line.rpartition(" at ")[2].strip(), process)
        process.send_signal(signal.SIGINT)
