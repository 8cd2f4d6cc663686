"""What a device is: buffers, copies, plans. One interface, the same suite for every device."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from protocol.dtypes import GGMLType
from protocol.errors import HandleError, OutOfMemory
from protocol.graph import Graph
from protocol.messages import DeviceInfo
from workers.tensors import Bytes

HUGE_PAGE_BYTES = 2 << 20
PIECE_BYTES = 1 << 20
"""What is read from a file at once: it is still in the processor's cache when it is packed."""
SPARE_BYTES = 16 << 20
"""Scratch memory that is kept between plans."""

Tick = Callable[[], None]
"""Called between nodes by `run`: the process answers PINGs there."""


class Source(Protocol):
    """Bytes that come once, from front to back, and can be told to be right when all have come."""

    def read(self, room: memoryview) -> bool:
        """Fill `room` with the next bytes. False when there are none."""

    def close(self) -> bool:
        """Whether all came, and were right."""


@dataclass(slots=True)
class Buffer:
    """Bytes on a device.

    Attributes:
        n_bytes: what the client asked for.
        memory: the bytes, zero until written.
        packed: byte offset of each tensor that is held in a layout of the device's own -> its type, ne and size.
        n_layouts: how often that has changed; a plan that was bound to another layout is bound again.
    """

    n_bytes: int
    memory: Bytes
    packed: dict[int, tuple[GGMLType, tuple[int, int, int, int], int]] = field(default_factory=dict)
    n_layouts: int = 0

    def check(self, offset: int, n_bytes: int, what: str) -> None:
        """HandleError unless `offset..offset + n_bytes` lies inside; Python integers do not wrap."""
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.n_bytes:
            raise HandleError(f"{what}: bytes {offset}..{offset + n_bytes} of a buffer of {self.n_bytes}")


class Plan(ABC):
    """A graph compiled for a device: addresses resolved, kernels bound, scratch laid out."""

    graph: Graph
    n_nodes: int

    @abstractmethod
    def run(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> list[memoryview]:
        """Run with these inputs; the outputs are views that the next `run` of any plan may overwrite."""


class Device(ABC):
    """Threads: one thread calls; `run` may use others inside."""

    name: str
    kind: str
    kernel_compiles = 0

    def profile(self) -> list[str]:
        """Where the time of the plans went, a line each; empty unless GGMQ_PROFILE is set."""
        return []

    @abstractmethod
    def info(self) -> DeviceInfo:
        """Name, kind and memory, as they are now."""

    @abstractmethod
    def alloc(self, n_bytes: int) -> Buffer:
        """A zeroed buffer. Errors: OutOfMemory with both figures."""

    @abstractmethod
    def free(self, buffer: Buffer) -> None:
        """Give a buffer back."""

    @abstractmethod
    def write(self, buffer: Buffer, offset: int, data: bytes | memoryview) -> None:
        """Store bytes. Errors: HandleError outside the buffer, before anything is written."""

    @abstractmethod
    def fill(
        self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], source: Source
    ) -> bool:
        """Store a whole weight that `source` reads, as `write` and `finish` would. False, and zeros, if it was not good.

        Errors: HandleError outside the buffer, before anything is written.
        """

    @abstractmethod
    def finish(self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int]) -> None:
        """A whole weight has been written: the device may now hold it in a layout of its own."""

    @abstractmethod
    def read(self, buffer: Buffer, offset: int, n_bytes: int) -> bytes:
        """Bytes as they were written. Errors: HandleError outside the buffer."""

    @abstractmethod
    def copy(self, src: Buffer, src_offset: int, dst: Buffer, dst_offset: int, n_bytes: int) -> None:
        """Copy between buffers; overlap is allowed."""

    @abstractmethod
    def compile(self, graph: Graph, buffers: dict[int, Buffer]) -> Plan:
        """A plan for a validated graph. Errors: UnsupportedOp, OutOfMemory, HandleError."""


class HostDevice(Device):
    """What the devices that compute in the host's memory have in common."""

    def __init__(self, memory_bytes: int = 0) -> None:
        self.limit_bytes = memory_bytes
        self.used_bytes = 0
        self._arena: mmap.mmap | None = None
        self._arena_used = 0

    def total_bytes(self) -> int:
        return self.limit_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def free_bytes(self) -> int:
        if self.limit_bytes:
            return max(0, self.limit_bytes - self.used_bytes)
        return available_bytes()

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
        self.used_bytes += n_bytes
        return Buffer(n_bytes, zeroed(n_bytes))

    def free(self, buffer: Buffer) -> None:
        self.used_bytes -= buffer.n_bytes
        buffer.memory = np.empty(0, np.uint8)
        buffer.n_bytes = 0
        buffer.packed.clear()

    def write(self, buffer: Buffer, offset: int, data: bytes | memoryview) -> None:
        n = len(data)
        buffer.check(offset, n, "write")
        buffer.memory[offset : offset + n] = np.frombuffer(data, np.uint8)

    def fill(
        self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], source: Source
    ) -> bool:
        buffer.check(offset, n_bytes, "write")
        target = buffer.memory[offset : offset + n_bytes]
        at = 0
        while at < n_bytes and source.read(target[at : at + PIECE_BYTES].data):
            at += PIECE_BYTES
        good = source.close()
        if not good:
            target[:] = 0
        return good

    def finish(self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int]) -> None:
        pass

    def read(self, buffer: Buffer, offset: int, n_bytes: int) -> bytes:
        buffer.check(offset, n_bytes, "read")
        return buffer.memory[offset : offset + n_bytes].tobytes()

    def copy(self, src: Buffer, src_offset: int, dst: Buffer, dst_offset: int, n_bytes: int) -> None:
        src.check(src_offset, n_bytes, "copy from")
        dst.check(dst_offset, n_bytes, "copy to")
        data = src.memory[src_offset : src_offset + n_bytes].copy()
        dst.memory[dst_offset : dst_offset + n_bytes] = data

    def arena(self, n_bytes: int) -> Bytes:
        """Scratch shared by all plans, which run one at a time. Address space is reserved once; pages come as used.

        Errors: OutOfMemory when a plan needs more than the host has free.
        """
        free = self.free_bytes()
        if self._arena is None:
            self._arena = mmap.mmap(-1, max(self.total_bytes(), 1 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                                    | getattr(mmap, "MAP_NORESERVE", 0))  # fmt: skip
        if n_bytes > min(free, len(self._arena)):
            raise OutOfMemory(f"a graph needs {n_bytes} bytes of scratch, {free} are free", n_bytes, free)
        return np.frombuffer(self._arena, np.uint8)[:n_bytes]

    def settle(self, n_bytes: int) -> None:
        """A plan that needs so much of the arena will run: what a much larger one left behind goes back to the system."""
        if self._arena is not None and self._arena_used > n_bytes + SPARE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            page = mmap.PAGESIZE
            start = -(-n_bytes // page) * page
            self._arena.madvise(mmap.MADV_DONTNEED, start, -(-self._arena_used // page) * page - start)
            self._arena_used = n_bytes
        self._arena_used = max(self._arena_used, n_bytes)

    def arena_address(self) -> int:
        """Where the arena begins; it never moves."""
        return int(self.arena(1).ctypes.data)


def zeroed(n_bytes: int) -> Bytes:
    """Zeroed bytes that begin on a cache line; in huge pages where the system gives them, which weights are read faster
    from. Pages come as they are touched."""
    if n_bytes < HUGE_PAGE_BYTES:
        return np.zeros(n_bytes, np.uint8)
    room = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            room.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(room, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE_BYTES
    return memory[start : start + n_bytes]


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
