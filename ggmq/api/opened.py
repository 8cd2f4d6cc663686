"""A bus with what a program has loaded on it, from when it is up until all of it has ended."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from config.terminal import safe_line
from ggmq.api.graphs import Array, Recipe, run
from ggmq.archs.base import Arch
from ggmq.bus import Bus, BusConfig, open_bus
from ggmq.cli.progress import progress_bars
from ggmq.cluster import Client
from ggmq.engine import Engine
from ggmq.model import DRAIN_S, Model, ModelConfig
from ggmq.service import Service
from ggmq.serving import serve_on
from ggmq.tokenizer import Vocabulary
from protocol import messages as m
from protocol.errors import GgmqError, Unavailable

N_QUEUE = 1 << 16
"""Answers that may be asked for at once; those of one program do not fight for room."""


def note(text: str) -> None:
    """Something that a user should know while it lasts."""
    logging.getLogger("ggmq").warning("%s", safe_line(text))


class Opened:
    """A bus, and what is loaded on it, until it is closed. Threads: any."""

    def __init__(self, config: BusConfig, arch: Arch | None = None, ngl: int | None = None) -> None:
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._stack = contextlib.ExitStack()
        self.closed = False
        layers, file = (arch.hp.n_layer, arch.gguf.path.absolute()) if arch is not None else (0, None)
        self.bus: Bus = self._stack.enter_context(open_bus(config, layers, file, ngl, note))
        self._own: dict[Service, Client] = {}
        self._computing: Client | None = None

    def devices(self) -> list[m.ListedDevice]:
        """All devices by their numbers. Errors: Unavailable."""
        with self._lock:
            self.check()
            return self.bus.client.devices()

    def compute(self, device: int, graph: Recipe, arrays: Mapping[str, Any]) -> Array | dict[str, Array]:
        """Errors: as `run`'s."""
        with self._lock:
            self.check()
            if self._computing is None:  # a session of its own: its buffers and graphs are no model's
                self._computing = self.bus.client.another()
            return run(self._computing, device, graph, arrays)

    def serve(self, config: ModelConfig, arch: Arch, engine: Callable[[Model, Vocabulary], Engine], bars: bool) -> Service:
        """Load a model. Errors: as `serve_on`'s."""
        with self._lock:
            self.check()
            own = self.bus.client.another()
        try:
            progress = progress_bars if bars else contextlib.nullcontext
            service = serve_on(self.bus, own, config, arch, arch.gguf.path.stem, n_queue=N_QUEUE, engine=engine,
                               progress=progress, note=note)  # fmt: skip
        except BaseException:
            _give_up(own)
            raise
        with self._lock:
            self._own[service] = own
        return service

    def end(self, service: Service) -> None:
        """End a model's answers and free its memory. Idempotent."""
        if self._pid != os.getpid():  # a fork's exit ends nothing here
            return
        with self._lock:
            own = self._own.pop(service, None)
        if own is not None:
            service.close()
            _give_up(own)

    def close(self) -> None:
        """End all models, then the workers that were started. Idempotent."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if self.closed:
                return
            self.closed = True
            services = list(self._own)
        try:
            for service in services:
                self.end(service)
            if self._computing is not None:
                _give_up(self._computing)
        finally:
            self._stack.close()

    def check(self) -> None:
        """Errors: Unavailable when it is closed."""
        if self.closed:
            raise Unavailable("the cluster is closed; open it again")


def _give_up(client: Client) -> None:
    with contextlib.suppress(GgmqError):  # whoever cannot be told now hears it from the broker
        client.drain(DRAIN_S)
    client.close()
