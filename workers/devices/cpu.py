"""The CPU device: a team of threads that runs Numba kernels over repacked weights.

Ops without a kernel of their own run the reference kernel on the caller's thread.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import numpy as np

from protocol.dtypes import TYPES, GGMLType, row_bytes
from protocol.graph import Graph, Tensor
from workers.devices.base import PIECE_BYTES, Buffer, HostDevice, Plan, Source, cpu_model
from workers.devices.cpu_plan import CPUPlan
from workers.kernels import layout, native
from workers.tensors import Array, Bytes, load


class Copy:
    """Bytes that are in memory already, as a source."""

    def __init__(self, memory: Bytes) -> None:
        self.memory, self.at = memory, 0

    def read(self, room: memoryview) -> bool:
        n = len(room)
        target = np.frombuffer(room, np.uint8)
        target[:] = self.memory[self.at : self.at + n]
        self.at += n
        return True

    def close(self) -> bool:
        return True


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
        self.team = native.Team(native.load(cpu_model()), n_threads, cpus)
        self._wide: dict[tuple[int, int], tuple[Array, int]] = {}

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
        return layout.KIND_OF[GGMLType(type_id)], row_bytes(type_id, ne[0]), rows // 16, ne[0] // info.block

    @staticmethod
    def _packable(type_id: int, ne: tuple[int, int, int, int]) -> bool:
        if type_id not in layout.KIND_OF or ne[1] < layout.GROUP or (ne[2] * ne[3] != 1 and ne[1] % layout.GROUP):
            return False
        return not (ne[0] % 32 and TYPES[type_id].quantized)

    def finish(self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int]) -> None:
        if self._packable(type_id, ne):  # else the bytes lie where they should
            self._store(buffer, offset, n_bytes, type_id, ne, Copy(buffer.memory[offset : offset + n_bytes]))

    def fill(
        self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], source: Source
    ) -> bool:
        buffer.check(offset, n_bytes, "write")
        return self._store(buffer, offset, n_bytes, type_id, ne, source)

    def _store(
        self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], source: Source
    ) -> bool:
        """Pack rows as they come, a piece at a time, by way of scratch memory; no second copy of a weight is made."""
        self._raw(buffer, offset, n_bytes)
        self._forget(buffer)
        if not self._packable(type_id, ne):
            return super().fill(buffer, offset, n_bytes, type_id, ne, source)
        kind, row, n_groups, n_blocks = self._shape(type_id, ne)
        group = layout.GROUP * row
        together = max(1, PIECE_BYTES // group)
        self.team.reserve(together * group)
        room = self.team.scratch[: together * group]
        whole = True
        for first in range(0, n_groups, together):
            n = min(together, n_groups - first)
            whole = whole and source.read(room[: n * group].data)
            self.team.call(layout.PACK_ROWS, kind, room.ctypes.data, row, n, n_blocks,
                           self._at(buffer, offset + first * group))  # fmt: skip
        rest = buffer.memory[offset + n_groups * group : offset + n_bytes]
        whole = whole and (not len(rest) or source.read(rest.data))
        good = source.close() and whole
        if good:
            buffer.packed[offset] = (GGMLType(type_id), ne, n_bytes)
            buffer.n_layouts += 1
        else:
            buffer.memory[offset : offset + n_bytes] = 0
        return good

    @staticmethod
    def _at(buffer: Buffer, offset: int) -> int:
        return int(buffer.memory.ctypes.data + offset)

    def _forget(self, buffer: Buffer) -> None:
        for key in [k for k in self._wide if k[0] == id(buffer)]:
            del self._wide[key]

    def _unpacked(self, buffer: Buffer, at: int, first: int, last: int) -> Array:
        """Rows of a packed tensor in GGUF's layout. Shapes: uint8 [last - first, row_bytes]."""
        type_id, ne, _ = buffer.packed[at]
        kind, row, n_groups, n_blocks = self._shape(type_id, ne)
        out = np.empty((last - first, row), np.uint8)
        self.team.call(layout.UNPACK_ROWS, kind, self._at(buffer, at), row, first, last, 16 * n_groups, n_blocks,
                       out.ctypes.data)  # fmt: skip
        return out

    def widened(self, buffer: Buffer | None, t: Tensor) -> tuple[int, int] | None:
        """Address and packed rows of a float16 copy of weights whose type has no products of its own."""
        if buffer is None or t.op != "NONE" or not TYPES[t.type].quantized:
            return None
        key = (id(buffer), t.offset)
        if key not in self._wide:
            blocks = buffer.memory[t.offset : t.offset + row_bytes(t.type, t.ne[0]) * t.n_rows]
            shaped = blocks.reshape(1, 1, t.n_rows, t.ne[0] // TYPES[t.type].block, TYPES[t.type].bytes)
            halves = load(shaped, t.type, np.float32).astype(np.float16).reshape(-1)
            row = 2 * t.ne[0]
            n_packed = t.n_rows // 16 * 16 if t.ne[1] % 16 == 0 or t.ne[2] * t.ne[3] == 1 else 0
            raw = halves[: n_packed * t.ne[0]].copy()
            self.team.call(layout.PACK_ROWS, layout.KIND_OF[GGMLType.F16], raw.ctypes.data, row, n_packed // 16, t.ne[0],
                           halves.ctypes.data)  # fmt: skip
            self._wide[key] = (halves, min(n_packed, t.ne[1] // 16 * 16))
        halves, n_packed = self._wide[key]
        return halves.ctypes.data, n_packed

    def _raw(self, buffer: Buffer, offset: int, n_bytes: int) -> None:
        """Bring every packed tensor that these bytes touch back to GGUF's layout."""
        touched = [(at, p) for at, p in buffer.packed.items() if at < offset + n_bytes and offset < at + p[2]]
        for at, (_, ne, size) in touched:
            buffer.memory[at : at + size] = self._unpacked(buffer, at, 0, ne[1] * ne[2] * ne[3]).reshape(-1)
            del buffer.packed[at]
            buffer.n_layouts += 1

    def unpack(self, buffer: Buffer, t: Tensor) -> None:
        """Bring what tensor t shares bytes with back to GGUF's layout."""
        self._raw(buffer, t.offset, t.extent_bytes())

    def write(self, buffer: Buffer, offset: int, data: bytes | memoryview) -> None:
        buffer.check(offset, len(data), "write")
        self._raw(buffer, offset, len(data))
        self._forget(buffer)
        super().write(buffer, offset, data)

    def read(self, buffer: Buffer, offset: int, n_bytes: int) -> bytes:
        buffer.check(offset, n_bytes, "read")
        out = buffer.memory[offset : offset + n_bytes].copy()
        for at, (_, ne, size) in buffer.packed.items():
            low, high = max(at, offset), min(at + size, offset + n_bytes)
            if low < high:
                rows = self._unpacked(buffer, at, 0, ne[1] * ne[2] * ne[3]).reshape(-1)
                out[low - offset : high - offset] = rows[low - at : high - at]
        return out.tobytes()

    def copy(self, src: Buffer, src_offset: int, dst: Buffer, dst_offset: int, n_bytes: int) -> None:
        src.check(src_offset, n_bytes, "copy from")
        dst.check(dst_offset, n_bytes, "copy to")
        self.write(dst, dst_offset, self.read(src, src_offset, n_bytes))

    def free(self, buffer: Buffer) -> None:
        self._forget(buffer)
        super().free(buffer)

    # -- plans ---------------------------------------------------------------------------------------------------------

    def compile(self, graph: Graph, buffers: dict[int, Buffer]) -> Plan:
        return CPUPlan(self, graph, buffers)

    def unpack_for(self, graph: Graph, buffers: dict[int, Buffer]) -> None:
        """Bring back to GGUF's layout what a graph uses in a way that does not fit the packed one."""
        for i, t in enumerate(graph.tensors):
            root, start = graph.root(i)
            r = graph.tensors[root]
            buffer = buffers.get(r.buffer)
            if buffer is not None and buffer.packed and not self._packed_use(graph, i, buffer):
                buffer.check(r.offset + start, t.extent_bytes(), f"tensor {i}")
                self._raw(buffer, r.offset + start, t.extent_bytes())

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
