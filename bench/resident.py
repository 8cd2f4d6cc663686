"""A random-weight model on a device of this process, without a bus: who submits a batch has it computed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bench.models import Shape, weights, write_outline
from ggmq.archs import open_arch
from ggmq.archs.memory import PAGE, SCRAP_PAGE
from ggmq.gguf import GGUF
from ggmq.loader import Loader
from ggmq.placement import Assignment
from ggmq.runner import ALL, ARGMAX, Rows, Runner
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.encoding import decode_graph
from protocol.frames import Frame, Message
from protocol.messages import Command
from workers.devices.base import Buffer, Device, Plan
from workers.ticks import Tick, nothing

PATTERN_ROWS = 64
"""Rows of weights that are made; a matrix has them again and again."""


class Repeated:
    """Weights (`workers.devices.base.Source`): the same rows again and again."""

    def __init__(self, rows: npt.NDArray[Any], n_bytes: int) -> None:
        self.good = True
        self._rows, self._n_bytes = rows.reshape(-1).view(np.uint8), n_bytes

    def pieces(self, size: int, tick: Tick) -> Iterator[memoryview]:
        n = len(self._rows)
        data = np.tile(self._rows, -(-size // n) + 1).data.cast("B")
        for at in range(0, self._n_bytes, size):
            yield data[at % n : at % n + min(size, self._n_bytes - at)]
            tick()


class Computed(NamedTuple):
    """What was computed last: it can be run again."""

    plan: Plan
    inputs: Sequence[Frame]


class Here:
    """Stands for a client of a bus (`ggmq.cluster.Client`): one device, whose work is done at once."""

    session = 1

    def __init__(self, device: Device[Any]) -> None:
        self.device = device
        self.buffers: dict[int, Buffer] = {}
        self.plans: dict[bytes, Plan] = {}
        self.last: Computed | None = None
        self._replies: dict[int, Message] = {}
        self._n_buffers = 0

    def new_buffer(self) -> int:
        self._n_buffers += 1
        return self._n_buffers

    def submit(self, header: m.Header, frames: Sequence[Frame] = (), device: int = 0) -> int:
        seq = len(self._replies)
        reply, payload = m.ComputeDone(), tuple[bytes, ...]()
        if isinstance(header, m.GraphPut):
            self.plans[header.digest] = self.device.compile(decode_graph(frames[0]), self.buffers)
        elif isinstance(header, m.GraphCompute):
            self.last = Computed(self.plans[header.digest], frames)
            payload = tuple(bytes(o) for o in self.last.plan.run(frames, nothing))
        self._replies[seq] = Message(Command.GRAPH_COMPUTE, reply, payload, True)
        return seq

    def wait(self, seq: int) -> Message:
        return self._replies[seq]


class Resident:
    """A model whose layers are all on one device.

    Attributes:
        n_parameters: of its matrices; multiplied: of those that a token is multiplied by.
        multiplied_bytes: of the same; kv_bytes: of keys and values, for each token that is seen.
        load_s: how long it took to bring the weights there, in seconds.
    """

    def __init__(self, device: Device[Any], shape: Shape, mix: str, folder: Path, n_ctx: int, n_seq: int) -> None:
        path = folder / "outline.gguf"
        path.unlink(missing_ok=True)
        write_outline(path, mix, shape)
        self.device, self.arch = device, open_arch(GGUF(path))
        n_layer = self.arch.hp.n_layer
        self.here = Here(device)
        room = self.arch.room(n_ctx, n_seq)
        self.pages_each = -(-n_ctx // PAGE)
        stage = Loader(self.here, self.arch, room).place(Assignment(0, range(n_layer), True, True, 0, 0))  # type: ignore[arg-type]
        self.runner = Runner(self.here, self.arch, [stage], room, n_ctx)  # type: ignore[arg-type]
        matrices = [p.info for part in stage.parts.values() for p in part.placed if p.info.type != GGMLType.F32]
        self.n_parameters = sum(math.prod(t.ne) for t in matrices)
        used = [t for t in matrices if not t.name.startswith("token_embd")]
        self.multiplied = sum(math.prod(t.ne) for t in used)
        self.multiplied_bytes = sum(t.n_bytes for t in used)
        self.weight_bytes = sum(t.n_bytes for t in matrices)
        self.kv_bytes = n_layer * shape.n_embd // shape.n_head * shape.n_head_kv * 2 * 2
        rng = np.random.default_rng(7)
        patterns: dict[tuple[GGMLType, int, bool], npt.NDArray[Any]] = {}
        start = time.perf_counter()
        for part in stage.parts.values():
            buffer = self.here.buffers[part.buffer] = device.alloc(max(1, part.n_bytes))
            if part.memory is not None:
                self.here.buffers[part.memory.buffer] = device.alloc(part.memory.n_bytes)
            for p in part.placed:
                t, ne = p.info, tuple(reversed(p.info.ne))
                is_norm = t.type == GGMLType.F32
                key = (t.type, t.ne[0], is_norm)
                if key not in patterns:
                    patterns[key] = weights(rng, t.type, (t.ne[0],) if is_norm else (PATTERN_ROWS, ne[-1]))
                device.fill(buffer, p.offset, t.n_bytes, int(t.type), t.ne, Repeated(patterns[key], t.n_bytes))
        device.read(buffer, 0, 1)  # what is on its way has come
        self.load_s = time.perf_counter() - start

    def free(self) -> None:
        """Give all memory back."""
        self.here.plans.clear()
        self.here.last = None
        for buffer in self.here.buffers.values():
            self.device.free(buffer)
        self.here.buffers.clear()
        self.device.trim()

    def rows(self, stream: int, tokens: Sequence[int], first: int, want: int = ARGMAX, all_of: bool = False) -> Rows:
        """Tokens of one of the sequences, each of which has pages of its own."""
        pages = [SCRAP_PAGE + 1 + stream * self.pages_each + i for i in range(self.pages_each)]
        outputs = range(len(tokens)) if all_of else [len(tokens) - 1]
        return Rows(tokens, first, {0: pages}, list(outputs), want)

    def run(self, parts: Sequence[Rows]) -> list[npt.NDArray[Any]]:
        return self.runner.wait(self.runner.submit(parts))

    def decoding(self, n_streams: int, depth: int) -> Computed:
        """One token of each of so many sequences, behind `depth` others. It has been computed once."""
        self.run([self.rows(i, [i], depth) for i in range(n_streams)])
        assert self.here.last is not None  # just computed
        return self.here.last

    def reading(self, n_tokens: int) -> Computed:
        """A prompt of so many tokens, of which the last gives a token."""
        self.run([self.rows(0, [7 * i % self.arch.hp.n_vocab for i in range(n_tokens)], 0)])
        assert self.here.last is not None  # just computed
        return self.here.last

    def logits(self, n_tokens: int) -> npt.NDArray[np.float64]:
        """Of a prompt, then of one token more of it and of another sequence's only one."""
        vocab = self.arch.hp.n_vocab
        tokens = [(7 * i + 3) % vocab for i in range(n_tokens)]
        (first,) = self.run([self.rows(0, tokens, 0, ALL, True)])
        more = self.run([self.rows(0, [5], n_tokens, ALL), self.rows(1, [9], 0, ALL)])
        return np.concatenate([first, *more]).astype(np.float64)
