"""The CPU device: a team of threads that runs Numba kernels over repacked weights.

Ops without a kernel of their own run the reference kernel on the caller's thread.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from protocol.dtypes import TYPES, GGMLType, row_bytes
from protocol.errors import OutOfMemory
from protocol.graph import Graph, Tensor
from workers.devices.base import PIECE_BYTES, Buffer, HostDevice, Plan, Source, cpu_model, steps
from workers.devices.cpu_plan import CPUPlan
from workers.kernels import layout, native
from workers.tensors import Bytes, load
from workers.ticks import Tick, completing, nothing

MAX_GROUP_BYTES = 16 << 20
"""Longer rows are not packed: a group of them is packed at once, by way of scratch memory."""
WIDENED_BLOCKS = 1 << 12
"""Blocks of weights that are widened at once."""


class Copy:
    """Bytes that are in memory already, as a source: each piece is a copy, so that it may be overwritten where it lay."""

    good = False

    def __init__(self, memory: Bytes) -> None:
        self.memory = memory

    def pieces(self, size: int, tick: Tick) -> Iterator[memoryview]:
        for at, n in steps(len(self.memory), size):
            yield self.memory[at : at + n].copy().data
        self.good = True


class CPUDevice(HostDevice):
    """Attributes:
    team: the threads.
    profiling: whether plans count the time of each step (GGMQ_PROFILE=1).
    profiled: seconds and steps by op.
    """

    name = "CPU"
    kind = "cpu"

    def __init__(self, n_threads: int, memory_bytes: int = 0, cpus: Sequence[int] = ()) -> None:
        super().__init__(memory_bytes)
        self._n_threads = n_threads
        self.profiling = os.environ.get("GGMQ_PROFILE", "0") not in ("", "0")
        self.profiled: dict[str, list[float]] = {}
        self._kernels, self._cpus = native.Kernels(cpu_model()), cpus
        self._team: native.Team | None = None

    def begin(self) -> None:
        self._kernels.begin()

    def prepare(self, tick: Tick = nothing) -> None:
        """Kernels are compiled on the first work for this CPU, and kept."""
        if self._team is None:
            self._team = native.Team(self._kernels.get(tick), self._n_threads, self._cpus)

    @property
    def team(self) -> native.Team:
        self.prepare()
        assert self._team is not None  # prepared
        return self._team

    def n_threads(self) -> int:
        return self._n_threads

    @property
    def kernel_compiles(self) -> int:  # type: ignore[override]
        """1 when the compiler was loaded into this process, where nothing is to be compiled."""
        return int("numba" in sys.modules)

    def count(self, op: str, seconds: float, n: int) -> None:
        """Add `n` steps of an op to the profile."""
        known = self.profiled.setdefault(op, [0.0, 0])
        known[0] += seconds
        known[1] += n

    def profile(self) -> list[str]:
        total = sum(s for s, _ in self.profiled.values())
        rows = sorted(self.profiled.items(), key=lambda row: -row[1][0])
        lines = [f"{op:32} {s * 1e3:10.2f} ms {100 * s / total:5.1f} % {n:9.0f} steps" for op, (s, n) in rows]
        return [f"profile of {self.name}, {self._n_threads} threads, {total * 1e3:.2f} ms", *lines] if rows else []

    # -- weights in a layout of our own --------------------------------------------------------------------------------

    def _shape(self, type_id: int, ne: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Kind, bytes of a row, groups that are packed, and blocks of a row."""
        rows = ne[1] * ne[2] * ne[3]
        info = TYPES[type_id]
        return layout.KIND_OF[GGMLType(type_id)], row_bytes(type_id, ne[0]), rows // layout.GROUP, ne[0] // info.block

    @staticmethod
    def _packable(type_id: int, ne: tuple[int, int, int, int]) -> bool:
        if type_id not in layout.KIND_OF or ne[1] < layout.GROUP or (ne[2] * ne[3] != 1 and ne[1] % layout.GROUP):
            return False
        if layout.GROUP * row_bytes(type_id, ne[0]) > MAX_GROUP_BYTES:
            return False
        return not (ne[0] % 32 and TYPES[type_id].quantized)

    def finish(
        self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], tick: Tick = nothing
    ) -> None:
        if self._packable(type_id, ne):  # else the bytes lie where they should
            self.fill(buffer, offset, n_bytes, type_id, ne, Copy(buffer.memory[offset : offset + n_bytes]), tick)

    def fill(
        self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], source: Source,
        tick: Tick = nothing,
    ) -> bool:  # fmt: skip
        """Rows are packed as they come, a piece at a time; no second copy of a weight is made."""
        buffer.check(offset, n_bytes, "write")
        self._raw(buffer, offset, n_bytes, tick)
        self._forget(buffer, offset, n_bytes, tick)
        if not self._packable(type_id, ne):
            return super().fill(buffer, offset, n_bytes, type_id, ne, source, tick)
        with self._or_zeros(buffer, offset, n_bytes, source, tick):
            self._pack(type_id, ne, source, buffer.memory[offset : offset + n_bytes], tick)
            if source.good:
                buffer.packed[offset] = (GGMLType(type_id), ne, n_bytes)
                buffer.n_layouts += 1
        return source.good

    def _pack(self, type_id: int, ne: tuple[int, int, int, int], source: Source, target: Bytes, tick: Tick) -> None:
        """Rows as packed groups; those that are left over stay as they are."""
        kind, row, _, n_blocks = self._shape(type_id, ne)
        group = layout.GROUP * row
        at = 0
        for piece in source.pieces(max(1, PIECE_BYTES // group) * group, tick):
            rows = np.frombuffer(piece, np.uint8)
            n = len(rows) // group
            self.team.call(layout.PACK_ROWS, kind, rows.ctypes.data, row, n, n_blocks, target.ctypes.data + at)
            target[at + n * group : at + len(rows)] = rows[n * group :]
            at += len(rows)
            tick()

    @staticmethod
    def _at(buffer: Buffer, offset: int) -> int:
        return int(buffer.memory.ctypes.data + offset)

    def _forget(self, buffer: Buffer, offset: int, n_bytes: int, tick: Tick) -> None:
        """Drop the widened copies of what these bytes belong to; plans that use them are bound again."""
        for at in [at for at, copy in buffer.widened.items() if at < offset + n_bytes and offset < at + copy.n_bytes]:
            super().free(buffer.widened.pop(at), tick)
            buffer.n_layouts += 1

    def _unpacked(self, buffer: Buffer, at: int, first: int, last: int) -> Bytes:
        """Rows of a packed tensor in GGUF's layout. Shapes: uint8 [(last - first) * row_bytes]."""
        type_id, ne, _ = buffer.packed[at]
        kind, row, n_groups, n_blocks = self._shape(type_id, ne)
        out = np.empty((last - first) * row, np.uint8)
        self.team.call(layout.UNPACK_ROWS, kind, self._at(buffer, at), row, first, last, layout.GROUP * n_groups, n_blocks,
                       out.ctypes.data)  # fmt: skip
        return out

    def _groups(self, buffer: Buffer, at: int, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
        """Rows of a packed tensor that hold its bytes low..high, a piece of whole groups at a time.

        Returns: the first row and the one behind the last, and where their bytes begin and end in the tensor.
        """
        type_id, ne, size = buffer.packed[at]
        _, row, _, _ = self._shape(type_id, ne)
        group = layout.GROUP * row
        piece = max(1, PIECE_BYTES // group) * group
        for start in range(low // group * group, high, piece):
            end = min(start + piece, size)
            yield start // row, end // row, start, end

    def widened(self, buffer: Buffer | None, t: Tensor, tick: Tick) -> tuple[int, int] | None:
        """Address and packed rows of a float16 copy of weights whose type has no products of its own.

        Errors: OutOfMemory where there is no room for one.
        """
        if buffer is None or t.op != "NONE" or not TYPES[t.type].quantized:
            return None
        if t.offset not in buffer.widened:
            buffer.widened[t.offset] = self._widen(buffer, t, tick)
        packs = self._packable(GGMLType.F16, t.ne)
        return self._at(buffer.widened[t.offset], 0), t.ne[1] // layout.GROUP * layout.GROUP if packs else 0

    def _widen(self, buffer: Buffer, t: Tensor, tick: Tick) -> Buffer:
        n_bytes, free = 2 * t.n_elements, self.free_bytes()
        if n_bytes > free:
            raise OutOfMemory(f"{self.name}: {TYPES[t.type].type.name} weights are multiplied as float16, which needs "
                              f"{n_bytes} bytes more, {free} are free", n_bytes, free)  # fmt: skip
        block, block_bytes = TYPES[t.type].block, TYPES[t.type].bytes
        n_blocks = t.n_elements // block
        blocks = buffer.memory[t.offset : t.offset + n_blocks * block_bytes].reshape(1, 1, 1, n_blocks, block_bytes)
        copy = self._buffer(n_bytes)
        try:
            halves = copy.memory.view(np.float16)
            for at, n in steps(n_blocks, WIDENED_BLOCKS):
                values = load(blocks[:, :, :, at : at + n], t.type, np.float32)
                halves[at * block : (at + n) * block] = values.ravel()
                tick()
            if self._packable(GGMLType.F16, t.ne):
                self._pack(GGMLType.F16, t.ne, Copy(copy.memory), copy.memory, tick)
        except BaseException:
            super().free(copy)
            raise
        return copy

    def _raw(self, buffer: Buffer, offset: int, n_bytes: int, tick: Tick) -> None:
        """Bring every packed tensor that these bytes touch back to GGUF's layout."""
        touched = [(at, p) for at, p in buffer.packed.items() if at < offset + n_bytes and offset < at + p[2]]
        with completing(tick) as steady:
            for at, (_, _, size) in touched:
                for first, last, start, end in self._groups(buffer, at, 0, size):
                    buffer.memory[at + start : at + end] = self._unpacked(buffer, at, first, last)
                    steady()
                del buffer.packed[at]
                buffer.n_layouts += 1

    def unpack(self, buffer: Buffer, t: Tensor, tick: Tick) -> None:
        """Bring what tensor t shares bytes with back to GGUF's layout."""
        self._raw(buffer, t.offset, t.extent_bytes(), tick)

    def write(self, buffer: Buffer, offset: int, data: bytes | memoryview, tick: Tick = nothing) -> None:
        buffer.check(offset, len(data), "write")
        self._raw(buffer, offset, len(data), tick)
        self._forget(buffer, offset, len(data), tick)
        super().write(buffer, offset, data, tick)

    def read(self, buffer: Buffer, offset: int, n_bytes: int, tick: Tick = nothing) -> memoryview:
        out = super().read(buffer, offset, n_bytes, tick)
        for at, (_, _, size) in buffer.packed.items():
            low, high = max(at, offset), min(at + size, offset + n_bytes)
            if low < high:
                for first, last, start, end in self._groups(buffer, at, low - at, high - at):
                    a, b = max(at + start, low), min(at + end, high)
                    rows = self._unpacked(buffer, at, first, last).data
                    out[a - offset : b - offset] = rows[a - at - start : b - at - start]
                    tick()
        return out

    def free(self, buffer: Buffer, tick: Tick = nothing) -> None:
        with completing(tick) as steady:
            self._forget(buffer, 0, buffer.n_bytes, steady)
            super().free(buffer, steady)

    def scratch_bytes(self) -> int:
        return super().scratch_bytes() + (len(self._team.scratch) if self._team is not None else 0)

    def trim(self, tick: Tick = nothing) -> None:
        if self._team is not None:
            self._team.scratch = np.zeros(0, np.uint8)  # a plan reserves what it needs when it runs
        super().trim(tick)

    # -- plans ---------------------------------------------------------------------------------------------------------

    def compile(self, graph: Graph, buffers: dict[int, Buffer], tick: Tick = nothing) -> Plan:
        return CPUPlan(self, graph, buffers, tick)

    def unpack_for(self, graph: Graph, buffers: dict[int, Buffer], tick: Tick) -> None:
        """Bring back to GGUF's layout what a graph uses in a way that does not fit the packed one."""
        for i, t in enumerate(graph.tensors):
            root, start = graph.root(i)
            r = graph.tensors[root]
            buffer = buffers.get(r.buffer)
            if buffer is not None and buffer.packed and not self._packed_use(graph, i, buffer):
                buffer.check(r.offset + start, t.extent_bytes(), f"tensor {i}")
                self._raw(buffer, r.offset + start, t.extent_bytes(), tick)

    @staticmethod
    def _packed_use(graph: Graph, i: int, buffer: Buffer) -> bool:
        """Whether leaf `i` is just a packed tensor, used only by ops that may read the packed layout."""
        t = graph.tensors[i]
        packed = buffer.packed.get(t.offset)
        if t.op != "NONE" or packed is None or (packed[0], packed[1]) != (t.type, t.ne):
            return False
        for u in graph.tensors:
            if u.view_src == i or (i in u.src and (u.op not in ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS") or u.src[0] != i)):
                return False
        return True
