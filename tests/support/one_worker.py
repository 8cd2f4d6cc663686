"""A worker in this process, without sockets: what it answers follows from what it is asked alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from protocol import PROTOCOL_VERSION
from protocol import messages as m
from protocol.frames import Message
from workers.cache import Cache
from workers.devices import open_device
from workers.executor import Executor
from workers.links import Links
from workers.state import WorkerState
from workers.ticks import nothing
from workers.work import Send, Work


class OneWorker:
    """A worker without sockets: the reference device, its state machine, and a cache if it has a folder."""

    def __init__(self, folder: Path | None = None, quota_bytes: int = 1 << 30, memory_bytes: int = 0) -> None:
        self.cache = Cache(folder, quota_bytes) if folder is not None else None
        self.state = WorkerState("t")
        self.executor = Executor(open_device("reference", 1, memory_bytes), self.state, Links(self.state), self.cache)
        self.seq = 0
        self.greet()

    def greet(self, epoch: int = 1, token: bytes = b"broker", goes_on: bool = True) -> None:
        self.epoch, self.rid = epoch, token + bytes([epoch])
        self.state.hello(self.rid, m.Hello(PROTOCOL_VERSION, "broker", token, epoch, int(goes_on)), 0.0)

    def ask(self, header: m.Header, *payload: bytes) -> Message:
        """The answer. Errors: those that it carries."""
        self.seq += 1
        request = Message(m.COMMAND_OF[type(header)], header, payload, False, 0, self.epoch, self.seq)
        answers: list[Any] = []
        for i in self.state.handle(self.rid, request):
            answers += self.executor.execute(i, nothing) if isinstance(i, Work) else [i]
        (answer,) = answers
        assert isinstance(answer, Send)
        if isinstance(answer.message.header, m.Error):
            raise answer.message.header.error()
        return answer.message

    def flush(self) -> None:
        if self.cache is not None:
            self.cache._writing.wait(self.cache.later(lambda: None), nothing)

    def close(self) -> None:
        """The process ends."""
        self.executor.close()
        if self.cache is not None:
            for entry in list(self.cache.growing):
                os.close(entry._fd)  # as the system does
