"""What the devices that compute in the host's memory have in common: buffers, scratch memory, plans of bound nodes."""

from __future__ import annotations

import contextlib
import mmap
import socket
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from config.memory import available_bytes, give_back_free_memory, memory_bytes
from protocol.dtypes import tensor_bytes
from protocol.errors import GgmqError, HandleError, InternalError, KernelError, OutOfMemory
from protocol.messages import DeviceInfo
from protocol.ops import COPYABLE
from workers import tensors
from workers.devices.base import COMPUTED, Abilities, Buffer, Device, Plan, Source, StepNote
from workers.devices.lower import SCRATCH, Lowered, Node, Span
from workers.devices.system import cpu_model, give_back, zeroed
from workers.kernels import reference
from workers.tensors import Bytes
from workers.ticks import PIECE_BYTES, TICK_S, Tick, alongside, completing, nothing, paced, pieces

SHORT_SHARE = 0.05
"""A host with a smaller share of its memory free is short of it."""
SPARE_BYTES = 16 << 20
"""Scratch memory that is kept between plans."""
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Python names it from 3.13 on. A process that has reserved as much as there is could not fork without it."""


@dataclass(slots=True, eq=False)
class HostBuffer(Buffer):
    """Attributes:
    memory: the bytes, zero until written.
    room: the mapping that they lie in, where they have one of their own.
    """

    memory: Bytes
    room: mmap.mmap | None


H = TypeVar("H", bound=HostBuffer)


class Arena:
    """Scratch memory that all plans of a device share, which run one at a time. Address space is reserved once, when a plan
    first needs some, and never moves; pages come as they are used.

    Attributes:
        used_bytes: what plans have left behind.
    between: called between parts of a plan, where another may run while the first bytes are `lent`.
    """

    def __init__(self, total_bytes: Callable[[], int], free_bytes: Callable[[], int]) -> None:
        self._total_bytes, self._free_bytes = total_bytes, free_bytes
        self._room: mmap.mmap | None = None
        self._lent = False
        self.used_bytes = 0
        self.between: Tick | None = None

    def _reserved(self) -> Bytes:
        if self._room is None:
            self._room = mmap.mmap(-1, max(self._total_bytes(), 1 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                                   | MAP_NORESERVE)  # fmt: skip
        return np.frombuffer(self._room, np.uint8)

    @property
    def address(self) -> int:
        return int(self._reserved().ctypes.data)

    def memory(self, n_bytes: int) -> Bytes:
        """Its first bytes. Errors: OutOfMemory when a plan needs more than the host has free."""
        free, room = self._free_bytes() + self.used_bytes, self._reserved()
        if n_bytes > min(free, len(room)):
            raise OutOfMemory(f"a graph needs {n_bytes} bytes of scratch, {free} are free", n_bytes, free)
        return room[:n_bytes]

    def settle(self, n_bytes: int, tick: Tick) -> None:
        """A plan that needs so much of it will run: what a much larger one left behind goes back to the system."""
        if self._room is not None and not self._lent and self.used_bytes > n_bytes + SPARE_BYTES:
            give_back(self._room, n_bytes, self.used_bytes, tick)
            self.used_bytes = n_bytes
        self.used_bytes = max(self.used_bytes, n_bytes)

    @contextlib.contextmanager
    def lent(self, n_bytes: int) -> Iterator[None]:
        """Another plan has the first bytes in the block; behind it they are as before."""
        room = self.memory(n_bytes)
        kept, self._lent = room.copy(), True
        try:
            yield
        finally:
            room[:], self._lent = kept, False

    def trim(self, tick: Tick) -> None:
        if self._room is not None:
            give_back(self._room, 0, self.used_bytes, tick)
        self.used_bytes = 0


class HostDevice(Device[H]):
    """Attributes:
    limit_bytes: what it hands out at most; 0 leaves it to the host.
    used_bytes: what it has handed out.
    """

    def __init__(self, memory_bytes: int = 0) -> None:
        self.limit_bytes = memory_bytes
        self.used_bytes = 0
        self.arena = Arena(self.total_bytes, self.free_bytes)

    def total_bytes(self) -> int:
        return self.limit_bytes or memory_bytes()

    def free_bytes(self) -> int:
        if self.limit_bytes:
            return max(0, self.limit_bytes - self.used_bytes - self.scratch_bytes())
        return available_bytes()

    def share(self, between: Tick | None, short: bool = False) -> None:
        self.arena.between = between

    @contextlib.contextmanager
    def aside(self, plan: Plan) -> Iterator[None]:
        assert plan.scratch_bytes is not None  # who asks has looked
        with self.arena.lent(plan.scratch_bytes):
            yield

    def short(self) -> bool:
        return available_bytes() < SHORT_SHARE * memory_bytes()

    def scratch_bytes(self) -> int:
        """What plans have left behind and `trim` gives back."""
        return self.arena.used_bytes

    def info(self) -> DeviceInfo:
        return DeviceInfo(
            name=self.name, kind=self.kind, description=cpu_model(), host=socket.gethostname()[:256],
            total_bytes=self.total_bytes(), free_bytes=self.free_bytes(), n_threads=self.n_threads(),
            shares_memory=not self.limit_bytes,
        )  # fmt: skip

    def abilities(self) -> Abilities:
        """Here every op has its reference kernel."""
        return Abilities(frozenset(), COMPUTED, frozenset(), frozenset(int(t) for t in COPYABLE))

    def n_threads(self) -> int:
        return 1

    @abstractmethod
    def buffer_of(self, n_bytes: int, memory: Bytes, room: mmap.mmap | None) -> H:
        """A buffer of this memory."""

    def alloc(self, n_bytes: int) -> H:
        free = self.free_bytes()
        if n_bytes > free:
            raise OutOfMemory(f"a buffer needs {n_bytes} bytes, {free} are free", n_bytes, free)
        memory, room = zeroed(n_bytes)
        self.used_bytes += n_bytes
        return self.buffer_of(n_bytes, memory, room)

    def free(self, buffer: H, tick: Tick = nothing) -> None:
        self.used_bytes -= buffer.n_bytes
        room = buffer.room
        buffer.memory, buffer.room, buffer.n_bytes = np.empty(0, np.uint8), None, 0
        if room is not None:
            with completing(tick) as steady:
                give_back(room, 0, len(room), steady)

    def trim(self, tick: Tick = nothing) -> None:
        self.arena.trim(tick)
        give_back_free_memory()

    def write(self, buffer: H, offset: int, data: bytes | memoryview, tick: Tick = nothing) -> None:
        buffer.check(offset, len(data), "write")
        source = np.frombuffer(data, np.uint8)
        for at, n in pieces(len(data)):
            buffer.memory[offset + at : offset + at + n] = source[at : at + n]
            tick()

    def fill(
        self, buffer: H, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], source: Source,
        tick: Tick = nothing,
    ) -> bool:  # fmt: skip
        buffer.check(offset, n_bytes, "write")
        with self.or_zeros(buffer, offset, n_bytes, source, tick):
            at = offset
            for piece in source.pieces(PIECE_BYTES, tick):
                buffer.memory[at : at + len(piece)] = piece
                at += len(piece)
                tick()
        return source.good

    @contextlib.contextmanager
    def or_zeros(self, buffer: H, offset: int, n_bytes: int, source: Source, tick: Tick) -> Iterator[None]:
        """Bytes that are stored in the block are zeros behind it unless all came and were right."""
        good = False
        try:
            yield
            good = source.good
        finally:
            if not good:
                with completing(tick) as steady:
                    for at, n in pieces(n_bytes):
                        buffer.memory[offset + at : offset + at + n] = 0
                        steady()

    def finish(
        self, buffer: H, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], tick: Tick = nothing
    ) -> None:
        pass

    def read(self, buffer: H, offset: int, n_bytes: int, tick: Tick = nothing) -> memoryview:
        buffer.check(offset, n_bytes, "read")
        out = np.empty(n_bytes, np.uint8)
        for at, n in pieces(n_bytes):
            out[at : at + n] = buffer.memory[offset + at : offset + at + n]
            tick()
        return out.data

    def copy(
        self, src: H, src_offset: int, dst: H, dst_offset: int, n_bytes: int, tick: Tick = nothing
    ) -> None:
        src.check(src_offset, n_bytes, "copy from")
        dst.check(dst_offset, n_bytes, "copy to")
        parts = list(pieces(n_bytes))
        if src is dst and dst_offset > src_offset:  # what would be overwritten is copied first
            parts.reverse()
        for at, n in parts:
            self.write(dst, dst_offset + at, self.read(src, src_offset + at, n), tick)


class HostMemory:
    """Where the spans of a lowered graph lie in this process.

    Errors: HandleError for a buffer that is not there, or too small; OutOfMemory.
    """

    def __init__(self, lowered: Lowered, buffers: Mapping[int, HostBuffer], arena: Arena) -> None:
        lowered.check(buffers)
        self.lowered, self.arena = lowered, arena
        used = {span.buffer for span in lowered.places} - {SCRATCH}
        self._memory = {number: buffers[number].memory for number in used}
        self._address = {number: int(memory.ctypes.data) for number, memory in self._memory.items()}
        self._memory[SCRATCH], self._address[SCRATCH] = arena.memory(lowered.scratch_bytes), arena.address

    def address(self, span: Span) -> int:
        """Where a span begins; one of scratch memory may lie behind the results."""
        return self._address[span.buffer] + span.start

    def bytes(self, i: int) -> memoryview:
        """A contiguous tensor's."""
        t, span = self.lowered.graph.tensors[i], self.lowered.places[i]
        return self._memory[span.buffer][span.start : span.start + tensor_bytes(t.type, t.ne)].data

    def array(self, i: int) -> tensors.Array:
        span = self.lowered.places[i]
        return tensors.view(self._memory[span.buffer], self.lowered.graph.tensors[i], span.start)

    def reference(self, node: Node) -> reference.Node:
        """A node as the reference kernels take it."""
        src = [self.array(j) if j >= 0 else None for j in node.tensor.src]
        return reference.Node(node.index, node.op, node.tensor, node.params, self.array(node.index), src, list(node.src))


Step = Callable[[Tick], None]
ASIDE_COST = 20_000_000
"""A node of which NumPy has so much to do is computed beside the thread that looks at the sockets."""


def compute(node: reference.Node, cost: int, tick: Tick) -> None:
    """One node by its definition. Sums of NumPy would run in another order in parts, so a long one is done aside."""
    if cost < ASIDE_COST:
        reference.run(node)
    else:
        alongside.do(partial(reference.run, node), tick)


class HostPlan(Plan):
    """Bound nodes, run one after the other. `steps`: what is called in turn, and the node that each begins with."""

    def __init__(self, memory: HostMemory, steps: Iterable[tuple[Step, int]]) -> None:
        self.graph = graph = memory.lowered.graph
        self._arena, self._scratch_bytes = memory.arena, memory.lowered.scratch_bytes
        self.inputs = [memory.bytes(i) for i in graph.inputs]
        self.outputs = [memory.bytes(i) for i in graph.outputs]
        self.n_nodes = sum(len(group) for group in memory.lowered.groups)
        self.steps = steps

    @property
    def scratch_bytes(self) -> int:
        return self._scratch_bytes

    def run(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> list[memoryview]:
        return self._run(inputs, tick, None)

    def run_noted(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> tuple[list[memoryview], list[StepNote]]:
        """One note for each of `steps`, in order."""
        notes: list[StepNote] = []
        return self._run(inputs, tick, notes), notes

    def _run(self, inputs: Sequence[bytes | memoryview], tick: Tick, notes: list[StepNote] | None) -> list[memoryview]:
        if len(inputs) != len(self.inputs):
            raise HandleError(f"graph takes {len(self.inputs)} inputs, got {len(inputs)}")
        for i, (target, data) in enumerate(zip(self.inputs, inputs, strict=True)):
            if len(target) != len(data):
                raise HandleError(f"input {i}: expected {len(target)} bytes, got {len(data)}")
        pace = paced(tick)
        for target, data in zip(self.inputs, inputs, strict=True):
            source = memoryview(data).cast("B")
            for at, n in pieces(len(source)):
                target[at : at + n] = source[at : at + n]
                pace()
        due = time.monotonic() + TICK_S
        with np.errstate(all="ignore"):
            for step, index in self.steps:
                begun_ns = time.monotonic_ns() if notes is not None else 0
                try:
                    step(tick)
                except GgmqError:
                    raise
                except MemoryError as e:
                    raise KernelError(f"node {index}: out of memory in a kernel") from e
                except Exception as e:
                    raise InternalError(f"node {index} ({self.graph.tensors[index].op}): {type(e).__name__}: {e}") from e
                if notes is not None:
                    title = self.graph.tensors[index].op if index >= 0 else "tables"
                    notes.append(StepNote(title, index, begun_ns, time.monotonic_ns()))
                now = time.monotonic()
                if now >= due:
                    tick()
                    due = now + TICK_S
                if self._arena.between is not None:
                    self._arena.between()
        return self.outputs
