"""A real worker process, and a raw socket that speaks to it as a broker or another worker does, and may lie."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import zmq

from protocol import PROTOCOL_VERSION
from protocol import messages as m
from protocol.encoding import encode_graph, graph_digest
from protocol.frames import Message, decode, encode
from protocol.graph import Graph
from protocol.messages import Command
from tests.support.fixtures import ROOT, free_port
from tests.support.strategies import leaf

SESSION = 7
LARGE_BYTES = 1 << 20


@contextlib.contextmanager
def listening_worker(*options: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A worker with the reference device, its port and its process; it ends with the block."""
    port = free_port()
    p = subprocess.Popen([sys.executable, "-m", "workers", "-p", str(port), "-t", "1", "-d", "reference", "--insecure",
                          *options], cwd=ROOT, stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        yield port, p
    finally:
        p.terminate()
        p.wait(10)


class Attacker:
    """A raw DEALER.

    Attributes:
        instance: what the worker calls itself.
        patience_s: how long an answer is waited for.
    """

    def __init__(
        self, port: int, token: bytes, epoch: int = 5, role: str = "broker", patience_s: float = 20.0,
        session: int = 0,
    ) -> None:  # fmt: skip
        """session: not 0 where it knows of sessions from an epoch before."""
        self.patience_s = patience_s
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self._role, self._token = role, token
        self.begin(epoch, session)

    def begin(self, epoch: int, session: int = 0) -> None:
        """Say HELLO under an epoch."""
        self.epoch, self.seq = epoch, 0
        self._hello = Message(Command.HELLO, m.Hello(PROTOCOL_VERSION, self._role, self._token, epoch, session), epoch=epoch)
        self.instance = self.greet()

    def greet(self) -> bytes:
        """Say HELLO, the same each time. Returns: what the worker calls itself."""
        self.socket.send_multipart(encode(self._hello))
        answer = self.reply().header
        assert isinstance(answer, m.Hello)
        return answer.token

    def close(self) -> None:
        self.socket.close()
        self.context.destroy(linger=0)

    def reply(self, timeout_s: float | None = None) -> Message:
        waits_s = self.patience_s if timeout_s is None else timeout_s
        assert self.socket.poll(int(waits_s * 1000)), "the worker gave no answer"
        raw = self.socket.recv_multipart(copy=False)
        # a copy of a large frame would hold the other threads of the process up
        return decode([f.buffer if len(f) > LARGE_BYTES else f.bytes for f in raw])

    def send(self, header: m.Header, *payload: bytes, **more: Any) -> int:
        self.seq += 1
        fields = {"epoch": self.epoch, "seq": self.seq, **more}
        self.socket.send_multipart(encode(Message(m.COMMAND_OF[type(header)], header, payload, **fields)))
        return self.seq

    def ask(self, header: m.Header, *payload: bytes) -> Message:
        """Send, and take replies until this one's: fuzzing leaves strays."""
        return self.wait(self.send(header, *payload))

    def wait(self, seq: int) -> Message:
        while True:
            reply = self.reply()
            if reply.seq == seq and reply.reply:
                return reply

    def code(self, header: m.Header, *payload: bytes) -> str:
        reply = self.ask(header, *payload)
        return reply.header.code if isinstance(reply.header, m.Error) else "ok"


X = np.arange(64, dtype=np.float32).reshape(2, 32)


class GoodRequest:
    """A small graph over a buffer, whose answer is known."""

    expected = (X * X).tobytes()

    def __init__(self, a: Attacker) -> None:
        self.a, self.buffer = a, 1000
        square = replace(leaf(0, (32, 2, 1, 1)), op="SQR", src=(0,))
        self.frame = encode_graph(Graph((leaf(0, (32, 2, 1, 1), self.buffer), square), (), (1,)))
        self.digest = graph_digest(self.frame)

    def set_up(self) -> None:
        self.a.ask(m.AllocBuffer(SESSION, self.buffer, 256))
        self.a.ask(m.SetTensor(SESSION, self.buffer, 0, 256), X.tobytes())
        self.a.ask(m.GraphPut(SESSION, self.digest), self.frame)

    def answer(self) -> bytes:
        self.set_up()
        reply = self.a.ask(m.StageCompute(SESSION, self.digest, 0))
        assert isinstance(reply.header, m.ComputeDone), reply.header
        return bytes(reply.payload[0])
