"""The CUDA device: one GPU, whose memory and kernels `driver` reaches.

Ops without a kernel of their own run the reference kernel on the host, over copies of their operands.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping

from protocol.errors import OutOfMemory
from protocol.graph import Graph
from protocol.messages import DeviceInfo
from protocol.ops import COPYABLE
from workers.devices.base import COMPUTED, Abilities, Device, Source
from workers.devices.bindings import Bindings
from workers.devices.cuda import attention, cells, products, rows, scans
from workers.devices.cuda.copies import Copies, wait_for_all
from workers.devices.cuda.driver import Driver
from workers.devices.cuda.plan import CUDAPlan
from workers.devices.cuda.weights import CUDABuffer, Memory, Ne, Weights, packs
from workers.devices.lower import lower_aside
from workers.kernels.cuda.planes import KINDS
from workers.kernels.cuda.row_launches import NORMS
from workers.ticks import PIECE_BYTES, Tick, completing, nothing, pieces

BINDINGS = Bindings({**rows.BINDINGS, **attention.BINDINGS, **products.BINDINGS, **scans.BINDINGS})
PATTERNS = tuple(ops for ops in BINDINGS if len(ops) > 1)
RUNS = (*cells.RUNS, *(("ADD", *ops) for ops in BINDINGS if ops[0] in NORMS))
"""What a binding joins to the launch in front of it."""
SHORT_SHARE = 0.05
"""A device with a smaller share of its memory free is short of it."""
FIRST_ARENA_BYTES = 1 << 20


class CUDADevice(Device[CUDABuffer]):
    """Attributes:
    limit_bytes: what it hands out at most; 0 leaves it to the device.
    arena: address of the scratch memory that all plans share, which run one at a time.
    staging: host memory that plans' inputs and outputs pass through.
    n_arenas: how often these have moved; a plan that was bound to another place is bound again.
    """

    kind = "cuda"

    def __init__(self, name: str, driver: Driver, memory_bytes: int = 0) -> None:
        self.name, self.driver, self.limit_bytes = name, driver, memory_bytes
        self.used_bytes = 0
        self.copies = Copies(driver)
        self.weights = Weights(driver, self.copies)
        self.n_arenas = 0
        self._arena: Memory | None = None
        self.staging = memoryview(b"")

    @property
    def kernel_compiles(self) -> int:  # type: ignore[override]
        """Kernels that were compiled by this process, and not taken from the disk."""
        return self.driver.n_compiles

    @property
    def broken(self) -> bool:  # type: ignore[override]
        return self.driver.broken

    # -- memory --------------------------------------------------------------------------------------------------------

    def total_bytes(self) -> int:
        return min(self.limit_bytes or self.driver.memory()[1], self.driver.memory()[1])

    def free_bytes(self) -> int:
        free = self.driver.memory()[0]
        return min(free, max(0, self.limit_bytes - self.used_bytes)) if self.limit_bytes else free

    def info(self) -> DeviceInfo:
        return DeviceInfo(
            name=self.name, kind=self.kind, description=self.driver.facts.description, host=socket.gethostname()[:256],
            total_bytes=self.total_bytes(), free_bytes=self.free_bytes(), n_threads=1,
        )  # fmt: skip

    def abilities(self) -> Abilities:
        fast = frozenset(op for op in COMPUTED if (op,) in BINDINGS)
        types = frozenset(int(t) for t in KINDS)
        return Abilities(fast, COMPUTED - fast, types, frozenset(int(t) for t in COPYABLE) - types)

    def short(self) -> bool:
        free, total = self.driver.memory()
        return free < SHORT_SHARE * total

    def scratch_bytes(self) -> int:
        return self._arena.n_bytes if self._arena is not None else 0

    @property
    def arena(self) -> int:
        if self._arena is None:
            self._arena = Memory(self.driver, FIRST_ARENA_BYTES)
            self.n_arenas += 1
        return self._arena.address

    def reserve(self, scratch_bytes: int, staging_bytes: int, tick: Tick) -> None:
        """Room for a plan; it grows by half at least, so that it seldom moves. Errors: OutOfMemory."""
        if self._arena is None or self._arena.n_bytes < scratch_bytes:
            wait_for_all(self.driver, tick)
            size = max(scratch_bytes, self._arena.n_bytes * 3 // 2 if self._arena is not None else FIRST_ARENA_BYTES)
            self._arena = None  # what it was may be what the new one needs
            self.n_arenas += 1
            self._arena = Memory(self.driver, size)
        if len(self.staging) < staging_bytes:
            wait_for_all(self.driver, tick)
            self.staging = self.driver.staging(max(staging_bytes, len(self.staging) * 3 // 2, PIECE_BYTES))
            self.n_arenas += 1

    def alloc(self, n_bytes: int) -> CUDABuffer:
        free = self.free_bytes()
        if n_bytes > free:
            raise OutOfMemory(f"a buffer needs {n_bytes} bytes, {free} are free", n_bytes, free)
        memory = Memory(self.driver, n_bytes)
        self.driver.fill(memory.address, 0, n_bytes)
        self.used_bytes += n_bytes
        return CUDABuffer(n_bytes, memory)

    def free(self, buffer: CUDABuffer, tick: Tick = nothing) -> None:
        self.used_bytes -= buffer.n_bytes
        if buffer.memory is not None:
            buffer.memory.free()
        buffer.memory, buffer.n_bytes = None, 0
        buffer.packed.clear()
        buffer.widened.clear()
        buffer.n_layouts += 1  # a plan that were run now would find that its buffer has no bytes

    def trim(self, tick: Tick = nothing) -> None:
        self.weights.trim()
        self.driver.trim()

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _raw(self, buffer: CUDABuffer, offset: int, n_bytes: int, tick: Tick) -> None:
        """Other bytes come here."""
        self.weights.unpack(buffer, offset, n_bytes, tick)
        self.weights.forget(buffer, offset, n_bytes)

    def write(self, buffer: CUDABuffer, offset: int, data: bytes | memoryview, tick: Tick = nothing) -> None:
        buffer.check(offset, len(data), "write")
        self._raw(buffer, offset, len(data), tick)
        self.copies.store(buffer.address + offset, memoryview(data), tick)

    def fill(
        self, buffer: CUDABuffer, offset: int, n_bytes: int, type_id: int, ne: Ne, source: Source, tick: Tick = nothing
    ) -> bool:
        """Rows are packed as they come, a piece at a time; no second copy of a weight is made."""
        buffer.check(offset, n_bytes, "write")
        self._raw(buffer, offset, n_bytes, tick)
        with self._or_zeros(buffer, offset, n_bytes, source, tick):
            if packs(type_id, ne, buffer.address + offset):
                self.weights.pack(buffer, offset, n_bytes, type_id, ne, source, tick)
            else:
                at = offset
                for piece in source.pieces(PIECE_BYTES, tick):
                    self.copies.put(buffer.address + at, piece, tick)
                    at += len(piece)
                self.copies.settle(tick)
        return source.good

    @contextlib.contextmanager
    def _or_zeros(self, buffer: CUDABuffer, offset: int, n_bytes: int, source: Source, tick: Tick) -> Iterator[None]:
        """Bytes that are stored in the block are zeros behind it unless all came and were right."""
        good = False
        try:
            yield
            good = source.good
        finally:
            if not good:
                buffer.packed.pop(offset, None)
                self.driver.fill(buffer.address + offset, 0, n_bytes)

    def finish(
        self, buffer: CUDABuffer, offset: int, n_bytes: int, type_id: int, ne: Ne, tick: Tick = nothing
    ) -> None:
        if not packs(type_id, ne, buffer.address + offset):  # the bytes lie where they should
            return
        self._raw(buffer, offset, n_bytes, tick)
        try:
            self.weights.pack_here(buffer, offset, n_bytes, type_id, ne, tick)
        except BaseException:
            self.driver.fill(buffer.address + offset, 0, n_bytes)
            raise

    def read(self, buffer: CUDABuffer, offset: int, n_bytes: int, tick: Tick = nothing) -> memoryview:
        buffer.check(offset, n_bytes, "read")
        out = self.copies.fetch(buffer.address + offset, n_bytes, tick).data
        self.weights.read(buffer, offset, out, tick)
        return out

    def copy(
        self, src: CUDABuffer, src_offset: int, dst: CUDABuffer, dst_offset: int, n_bytes: int, tick: Tick = nothing
    ) -> None:
        src.check(src_offset, n_bytes, "copy from")
        dst.check(dst_offset, n_bytes, "copy to")
        self.weights.unpack(src, src_offset, n_bytes, tick)
        self._raw(dst, dst_offset, n_bytes, tick)
        source, to = src.address + src_offset, dst.address + dst_offset
        if source + n_bytes <= to or to + n_bytes <= source:
            self.driver.copy(to, source, n_bytes)
            return
        parts = list(pieces(n_bytes))
        if to > source:  # what would be overwritten is copied first
            parts.reverse()
        room = self.weights.raw_room(PIECE_BYTES)
        with completing(tick) as steady:
            for at, n in parts:
                self.driver.copy(room, source + at, n)
                self.driver.copy(to + at, room, n)
                steady()

    def compile(self, graph: Graph, buffers: Mapping[int, CUDABuffer], tick: Tick = nothing) -> CUDAPlan:
        plan = CUDAPlan(self, lower_aside(graph, tick, PATTERNS, RUNS), buffers, BINDINGS)
        plan.bind(tick)
        return plan
