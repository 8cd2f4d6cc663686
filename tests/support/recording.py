"""Which kernels the CUDA device asks for: its plans are bound over a driver that has neither memory nor kernels.

`kernels()` are those of every architecture's graphs, of every product and of single nodes.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

from bench.resident import Here
from ggmq.archs import open_arch
from ggmq.archs.memory import PAGE
from ggmq.gguf import GGUF
from ggmq.loader import Loader
from ggmq.placement import Assignment
from ggmq.runner import ALL, ARGMAX, HIDDEN, Rows, Runner
from protocol.dtypes import TYPES, GGMLType, tensor_bytes
from protocol.graph import Graph, Shape, f32_bits
from tests.support import random_models, row_graphs
from tests.support.strategies import leaf, node_graphs
from workers.devices.base import Plan
from workers.devices.cuda.device import CUDADevice
from workers.devices.cuda.driver import Facts, Grid
from workers.devices.cuda.weights import CUDABuffer
from workers.kernels.cuda.launches import LAUNCHES, Launch
from workers.kernels.cuda.planes import KINDS
from workers.kernels.cuda.sources import Kernel
from workers.ticks import Tick, nothing

TOTAL_BYTES = 1 << 40
N_CTX = 256
TALL = (4000,)
"""Rows of which two blocks share a processor when they are multiplied."""


class RecordingDriver:
    """Attributes:
    kernels: those that were asked for, and the record that each was launched with.
    """

    def __init__(self) -> None:
        self.facts = Facts("no device", "sm_90", 100)
        self.n_compiles, self.broken = 0, False
        self.kernels: dict[Kernel, type[Launch]] = {}
        self._at = 1 << 20

    def memory(self) -> tuple[int, int]:
        return TOTAL_BYTES, TOTAL_BYTES

    def alloc(self, n_bytes: int) -> int:
        at = self._at
        self._at += -(-n_bytes // 256) * 256
        return at

    def free(self, address: int) -> None: ...
    def trim(self) -> None: ...
    def upload(self, address: int, data: memoryview) -> None: ...
    def download(self, data: memoryview, address: int) -> None: ...
    def copy(self, to: int, source: int, n_bytes: int) -> None: ...
    def fill(self, address: int, value: int, n_bytes: int) -> None: ...
    def synchronize(self) -> None: ...

    def staging(self, n_bytes: int) -> memoryview:
        return memoryview(bytearray(n_bytes))

    def function(self, kernel: Kernel, tick: Tick = nothing) -> Kernel:
        return kernel

    def launch(self, function: object, grid: Grid, argument: Launch) -> None:
        assert isinstance(function, Kernel)
        self.kernels[function] = type(argument)

    def capture(self, do: Callable[[], None]) -> RecordingDriver:
        raise NotImplementedError

    def record(self) -> Callable[[], bool]:
        return lambda: True


class _Bound(Plan):
    """A plan that was bound, and gives nothing."""

    def run(self, inputs: object, tick: object) -> list[memoryview]:
        return []


class RecordingDevice(CUDADevice):
    """Notes what its plans would launch."""

    def __init__(self) -> None:
        self.recording = RecordingDriver()
        super().__init__("CUDA0", self.recording)

    def compile(self, graph: Graph, buffers: dict[int, CUDABuffer], tick: object = nothing) -> Plan:  # type: ignore[override]
        bound = super().compile(graph, buffers).bind(nothing)
        for step in bound.launches:
            self.recording.launch(step.function, step.grid, step.argument)
        return _Bound()

    def weight(self, type_id: GGMLType, ne: Shape) -> CUDABuffer:
        """A buffer that has one weight, packed if such are."""
        n = tensor_bytes(type_id, ne)
        buffer = self.alloc(n)
        self.finish(buffer, 0, n, int(type_id), ne)
        self.read(buffer, 0, n)
        return buffer


def _models(device: RecordingDevice, folder: Path) -> None:
    """Graphs of every architecture: prompts and single tokens, of one sequence and of several, all that can be wanted."""
    for i, arch in enumerate(random_models.ARCHS * 3):
        path = random_models.write(folder / f"{i}.gguf", random_models.base(arch, random.Random(i)))
        opened = open_arch(GGUF(path))
        here = Here(device)
        room = opened.room(N_CTX, 4)
        stage = Loader(here, opened, room).place(Assignment(0, range(opened.hp.n_layer), True, True, 0, 0))  # type: ignore[arg-type]
        runner = Runner(here, opened, [stage], room, N_CTX)  # type: ignore[arg-type]
        for part in stage.parts.values():
            here.buffers[part.buffer] = buffer = device.alloc(max(1, part.n_bytes))
            for p in part.placed:
                device.finish(buffer, p.offset, p.info.n_bytes, int(p.info.type), p.info.ne)
            if part.memory is not None and part.memory.n_bytes:
                here.buffers[part.memory.buffer] = device.alloc(part.memory.n_bytes)
        for n_seqs, n_tokens, want in ((1, 1, ARGMAX), (3, 1, ARGMAX), (1, 40, ALL), (2, 20, 5), (1, 9, HIDDEN)):
            pages = {w: list(range(1, 1 + N_CTX // PAGE)) for w in room.windows}
            runner.submit([Rows([1] * n_tokens, 3, pages, [n_tokens - 1], want, (2, 3))] * n_seqs)


def _products(device: RecordingDevice) -> None:
    """Weights of every type times one column, some and many; with experts; their rows."""
    for t in (t for t in TYPES if TYPES[t].quantized or t in (GGMLType.F32, GGMLType.F16, GGMLType.BF16)):
        k = 256
        for ne, n_rows in (((k, 64, 1, 1), 64), ((k, 32, 4, 1), 32), *(((k, n, 1, 1), n) for n in TALL if t in KINDS)):
            buffer, experts = device.weight(GGMLType(t), ne), ne[2] > 1
            for n in (1, 2, 4, 7, 8, 9, 16, 17, 33, 64, 100, 512) if n_rows not in TALL else (1, 32):
                weight = leaf(t, ne, buffer=1)
                if experts:
                    ids, x = leaf(GGMLType.I32, (2, n, 1, 1)), leaf(0, (k, 1, n, 1))
                    out = replace(leaf(0, (n_rows, 2, n, 1)), op="MUL_MAT_ID", src=(0, 2, 1))
                    graph = Graph((weight, ids, x, out), (1, 2), (3,))
                else:
                    out = replace(leaf(0, (n_rows, n, 1, 1)), op="MUL_MAT", src=(0, 1))
                    graph = Graph((weight, leaf(0, (k, n, 1, 1)), out), (1,), (2,))
                device.compile(graph, {1: buffer})
            if not experts:
                rows = replace(leaf(0, (k, 5, 1, 1)), op="GET_ROWS", src=(0, 1))
                device.compile(Graph((weight, leaf(GGMLType.I32, (5, 1, 1, 1)), rows), (1,), (2,)), {1: buffer})


def _attention(device: RecordingDevice) -> None:
    """A token and a prompt over a long context, also with latents and with rows of odd lengths; cells that lie together."""
    for d, d_v, n_head_kv in ((64, 64, 2), (128, 128, 2), (256, 256, 1), (192, 128, 4), (576, 512, 1), (12, 20, 2)):
        for n_tokens in (1, 200):
            kv = [leaf(GGMLType.F16, (n, 64 * PAGE, n_head_kv, 1)) for n in (d, d_v)]
            numbers = [leaf(GGMLType.I32, ne) for ne in ((64, 1, 1, 1), (n_tokens, 1, 1, 1))]
            out = replace(leaf(0, (d_v, 8, n_tokens, 1)), op="PAGED_ATTN", src=(0, 1, 2, 3, 4),
                          params=(f32_bits(0.1), *(0,) * 15))  # fmt: skip
            device.compile(Graph((leaf(0, (d, n_tokens, 8, 1)), *kv, *numbers, out), (0, 1, 2, 3, 4), (5,)), {})
            together = replace(out, op="FLASH_ATTN_EXT", src=(0, 1, 2))
            device.compile(Graph((leaf(0, (d, n_tokens, 8, 1)), *kv, together), (0, 1, 2), (3,)), {})


def _nodes(device: RecordingDevice) -> None:
    @settings(max_examples=600, derandomize=True, database=None, phases=[Phase.generate], deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(node_graphs())
    def ask(case: tuple[str, Graph, list[bytes]]) -> None:
        device.compile(case[1], {})

    ask()
    for name in row_graphs.CASES:
        device.compile(row_graphs.drawn(name)[0], {})


@lru_cache
def kernels() -> dict[Kernel, type[Launch]]:
    """Every kernel that is asked for."""
    device = RecordingDevice()
    with tempfile.TemporaryDirectory() as folder:
        _models(device, Path(folder))
    _products(device)
    _attention(device)
    _nodes(device)
    asked = device.recording.kernels
    files = {k.file for k in asked if k.macros}
    for record in LAUNCHES:  # those of nodes that none of these graphs has
        if record.__module__.startswith("workers.") and record.file not in files:
            asked.setdefault(Kernel(record.file, record.function), record)
    return dict(sorted(asked.items()))


def sources() -> Iterator[Kernel]:
    """One kernel of each source that is compiled: those of a file with the same macros are compiled together."""
    seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    for kernel in kernels():
        if (kernel.file, kernel.macros) not in seen:
            seen.add((kernel.file, kernel.macros))
            yield kernel
