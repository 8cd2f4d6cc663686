"""What a device is: buffers, copies, plans. One interface, the same suite for every device."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from protocol.dtypes import GGMLType
from protocol.errors import HandleError, OutOfMemory
from protocol.graph import Graph
from protocol.messages import DeviceInfo
from workers.tensors import Bytes
from workers.ticks import Tick, completing, nothing

HUGE_PAGE_BYTES = 2 << 20
PIECE_BYTES = 1 << 20
"""What is read, packed or copied at once: it is still in the processor's cache when it is packed, and takes no time."""
FREED_BYTES = 64 << 20
"""What is given back to the system at once."""
SHORT_SHARE = 0.05
"""A host with a smaller share of its memory free is short of it."""
SPARE_BYTES = 16 << 20
"""Scratch memory that is kept between plans."""


class Source(Protocol):
    """Bytes that come once, from front to back, and can be told to be right when all have come.

    Attributes:
        good: once all pieces have been taken: whether all came, and were right.
    """

    good: bool

    def pieces(self, size: int, tick: Tick) -> Iterator[memoryview]:
        """`size` bytes after `size` bytes, and what is left at the end. A piece is valid until the next is taken."""


@dataclass(slots=True)
class Buffer:
    """Bytes on a device.

    Attributes:
        n_bytes: what the client asked for.
        memory: the bytes, zero until written.
        room: the mapping that they lie in, where they have one of their own.
        packed: byte offset of each tensor that is held in a layout of the device's own -> its type, ne and size.
        widened: byte offset of each tensor that is multiplied as a copy of another type -> the copy.
        n_layouts: how often these have changed; a plan that was bound to another layout is bound again.
    """

    n_bytes: int
    memory: Bytes
    room: mmap.mmap | None = None
    packed: dict[int, tuple[GGMLType, tuple[int, int, int, int], int]] = field(default_factory=dict)
    widened: dict[int, Buffer] = field(default_factory=dict)
    n_layouts: int = 0

    def check(self, offset: int, n_bytes: int, what: str) -> None:
        """HandleError unless `offset..offset + n_bytes` lies inside; Python integers do not wrap."""
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.n_bytes:
            raise HandleError(f"{what}: bytes {offset}..{offset + n_bytes} of a buffer of {self.n_bytes}")


class Plan(ABC):
    """A graph compiled for a device: addresses resolved, kernels bound, scratch laid out.

    Attributes:
        fallbacks: ops of the nodes that run the reference kernel because the device has none of its own.
    """

    graph: Graph
    n_nodes: int
    fallbacks: tuple[str, ...] = ()

    @abstractmethod
    def run(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> list[memoryview]:
        """Run with these inputs; the outputs are views that the next `run` of any plan may overwrite."""


class Device(ABC):
    """What takes long takes a tick, which it calls between pieces of a few milliseconds.

    Threads: one thread calls; `run` may use others inside.
    """

    name: str
    kind: str
    kernel_compiles = 0

    def profile(self) -> list[str]:
        """Where the time of the plans went, a line each; empty unless GGMQ_PROFILE is set."""
        return []

    def begin(self) -> None:
        """Start what `prepare` waits for, and go on."""

    def prepare(self, tick: Tick = nothing) -> None:
        """Have ready what work needs and descriptions do not; called before the first buffer. May take a while."""

    @abstractmethod
    def info(self) -> DeviceInfo:
        """Name, kind and memory, as they are now."""

    def short(self) -> bool:
        """Whether others need the memory that is only kept for later."""
        return False

    @abstractmethod
    def alloc(self, n_bytes: int) -> Buffer:
        """A zeroed buffer. Errors: OutOfMemory with both figures."""

    @abstractmethod
    def free(self, buffer: Buffer, tick: Tick = nothing) -> None:
        """Give a buffer's memory back to the system, whoever still points at it."""

    @abstractmethod
    def trim(self, tick: Tick = nothing) -> None:
        """A session has ended: give back what is kept for the next plan and needs not be."""

    @abstractmethod
    def write(self, buffer: Buffer, offset: int, data: bytes | memoryview, tick: Tick = nothing) -> None:
        """Store bytes. Errors: HandleError outside the buffer, before anything is written."""

    @abstractmethod
    def fill(
        self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], source: Source,
        tick: Tick = nothing,
    ) -> bool:  # fmt: skip
        """Store a whole weight that `source` reads, as `write` and `finish` would. False, and zeros, if it was not good.

        Errors: HandleError outside the buffer, before anything is written. After any other there are zeros.
        """

    @abstractmethod
    def finish(
        self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], tick: Tick = nothing
    ) -> None:
        """A whole weight has been written: the device may now hold it in a layout of its own. After an error: zeros."""

    @abstractmethod
    def read(self, buffer: Buffer, offset: int, n_bytes: int, tick: Tick = nothing) -> memoryview:
        """A copy of bytes as they were written. Errors: HandleError outside the buffer."""

    @abstractmethod
    def copy(
        self, src: Buffer, src_offset: int, dst: Buffer, dst_offset: int, n_bytes: int, tick: Tick = nothing
    ) -> None:
        """Copy between buffers; overlap is allowed. Errors: HandleError outside a buffer, before anything is written."""

    @abstractmethod
    def compile(self, graph: Graph, buffers: dict[int, Buffer], tick: Tick = nothing) -> Plan:
        """A plan for a validated graph. Errors: UnsupportedOp, OutOfMemory, HandleError."""


class HostDevice(Device):
    """What the devices that compute in the host's memory have in common."""

    def __init__(self, memory_bytes: int = 0) -> None:
        self.limit_bytes = memory_bytes
        self.used_bytes = 0
        self._arena: mmap.mmap | None = None
        self._arena_used = 0

    def total_bytes(self) -> int:
        return self.limit_bytes or memory_bytes()

    def free_bytes(self) -> int:
        if self.limit_bytes:
            return max(0, self.limit_bytes - self.used_bytes - self.scratch_bytes())
        return available_bytes()

    def short(self) -> bool:
        return available_bytes() < SHORT_SHARE * memory_bytes()

    def scratch_bytes(self) -> int:
        """What plans have left behind and `trim` gives back."""
        return self._arena_used

    def info(self) -> DeviceInfo:
        return DeviceInfo(
            name=self.name, kind=self.kind, description=cpu_model(), host=socket.gethostname()[:256],
            total_bytes=self.total_bytes(), free_bytes=self.free_bytes(), n_threads=self.n_threads(),
            shares_memory=not self.limit_bytes,
        )  # fmt: skip

    def n_threads(self) -> int:
        return 1

    def alloc(self, n_bytes: int) -> Buffer:
        free = self.free_bytes()
        if n_bytes > free:
            raise OutOfMemory(f"a buffer needs {n_bytes} bytes, {free} are free", n_bytes, free)
        return self._buffer(n_bytes)

    def _buffer(self, n_bytes: int) -> Buffer:
        memory, room = zeroed(n_bytes)
        self.used_bytes += n_bytes
        return Buffer(n_bytes, memory, room)

    def free(self, buffer: Buffer, tick: Tick = nothing) -> None:
        self.used_bytes -= buffer.n_bytes
        room = buffer.room
        buffer.memory, buffer.room, buffer.n_bytes = np.empty(0, np.uint8), None, 0
        buffer.packed.clear()
        buffer.n_layouts += 1  # a plan that were run now would find that its buffer has no bytes
        if room is not None:
            with completing(tick) as steady:
                give_back(room, 0, len(room), steady)

    def trim(self, tick: Tick = nothing) -> None:
        if self._arena is not None:
            give_back(self._arena, 0, self._arena_used, tick)
        self._arena_used = 0
        if _malloc_trim is not None:
            _malloc_trim(0)

    def write(self, buffer: Buffer, offset: int, data: bytes | memoryview, tick: Tick = nothing) -> None:
        buffer.check(offset, len(data), "write")
        source = np.frombuffer(data, np.uint8)
        for at, n in steps(len(data)):
            buffer.memory[offset + at : offset + at + n] = source[at : at + n]
            tick()

    def fill(
        self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], source: Source,
        tick: Tick = nothing,
    ) -> bool:  # fmt: skip
        buffer.check(offset, n_bytes, "write")
        with self._or_zeros(buffer, offset, n_bytes, source, tick):
            at = offset
            for piece in source.pieces(PIECE_BYTES, tick):
                buffer.memory[at : at + len(piece)] = piece
                at += len(piece)
                tick()
        return source.good

    @contextlib.contextmanager
    def _or_zeros(self, buffer: Buffer, offset: int, n_bytes: int, source: Source, tick: Tick) -> Iterator[None]:
        """Bytes that are stored in the block are zeros behind it unless all came and were right."""
        good = False
        try:
            yield
            good = source.good
        finally:
            if not good:
                with completing(tick) as steady:
                    for at, n in steps(n_bytes):
                        buffer.memory[offset + at : offset + at + n] = 0
                        steady()

    def finish(
        self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], tick: Tick = nothing
    ) -> None:
        pass

    def read(self, buffer: Buffer, offset: int, n_bytes: int, tick: Tick = nothing) -> memoryview:
        buffer.check(offset, n_bytes, "read")
        out = np.empty(n_bytes, np.uint8)
        for at, n in steps(n_bytes):
            out[at : at + n] = buffer.memory[offset + at : offset + at + n]
            tick()
        return out.data

    def copy(
        self, src: Buffer, src_offset: int, dst: Buffer, dst_offset: int, n_bytes: int, tick: Tick = nothing
    ) -> None:
        src.check(src_offset, n_bytes, "copy from")
        dst.check(dst_offset, n_bytes, "copy to")
        pieces = list(steps(n_bytes))
        if src is dst and dst_offset > src_offset:  # what would be overwritten is copied first
            pieces.reverse()
        for at, n in pieces:
            self.write(dst, dst_offset + at, self.read(src, src_offset + at, n), tick)

    def arena(self, n_bytes: int) -> Bytes:
        """Scratch shared by all plans, which run one at a time. Address space is reserved once; pages come as used.

        Errors: OutOfMemory when a plan needs more than the host has free.
        """
        free = self.free_bytes() + self._arena_used
        if self._arena is None:
            self._arena = mmap.mmap(-1, max(self.total_bytes(), 1 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                                    | getattr(mmap, "MAP_NORESERVE", 0))  # fmt: skip
        if n_bytes > min(free, len(self._arena)):
            raise OutOfMemory(f"a graph needs {n_bytes} bytes of scratch, {free} are free", n_bytes, free)
        return np.frombuffer(self._arena, np.uint8)[:n_bytes]

    def settle(self, n_bytes: int, tick: Tick) -> None:
        """A plan that needs so much of the arena will run: what a much larger one left behind goes back to the system."""
        if self._arena is not None and self._arena_used > n_bytes + SPARE_BYTES:
            give_back(self._arena, n_bytes, self._arena_used, tick)
            self._arena_used = n_bytes
        self._arena_used = max(self._arena_used, n_bytes)

    def arena_address(self) -> int:
        """Where the arena begins; it never moves."""
        return int(self.arena(1).ctypes.data)


def steps(n_bytes: int, size: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Where each piece of so many bytes begins, and its size."""
    return ((at, min(size, n_bytes - at)) for at in range(0, n_bytes, size))


def give_back(room: mmap.mmap, start: int, end: int, tick: Tick) -> None:
    """Give whole pages of a mapping back to the system; they read as zeros from then on."""
    if hasattr(mmap, "MADV_DONTNEED"):
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        for at, n in steps(max(0, end - start), FREED_BYTES):
            room.madvise(mmap.MADV_DONTNEED, start + at, n)
            tick()


def _find_malloc_trim() -> Callable[[int], int] | None:
    """glibc's: gives back what lies free in the heap between what does not. None where the C library is another."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


_malloc_trim = _find_malloc_trim()


def zeroed(n_bytes: int) -> tuple[Bytes, mmap.mmap | None]:
    """Zeroed bytes that begin on a cache line; in huge pages where the system gives them, which weights are read faster
    from. Pages come as they are touched. Returns: the bytes, and the mapping of their own that they lie in, if any."""
    if n_bytes < HUGE_PAGE_BYTES:
        return np.zeros(n_bytes, np.uint8), None
    try:
        room = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as e:
        raise MemoryError(f"{n_bytes} bytes: {e.strerror}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            room.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(room, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE_BYTES
    return memory[start : start + n_bytes], room


def memory_bytes() -> int:
    """Bytes of memory that the host has, or that its cgroup may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max", encoding="ascii") as f:
        total = min(total, int(f.read()))
    return total


def available_bytes() -> int:
    """Bytes of memory that the host can still give out; on Linux what the kernel and the cgroup say."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) * 1024
                    break
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as f:
            limit = f.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as f:
            if limit != "max":
                available = min(available, max(0, int(limit) - int(f.read())))
    except (OSError, ValueError):
        pass
    return available


def cpu_model() -> str:
    """The processor's name, or the empty string."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()[:256]
    except OSError:
        pass
    return ""
