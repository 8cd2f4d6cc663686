"""What the host has: memory that it gives and takes back, and its processor."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from workers.tensors import Bytes
from workers.ticks import Tick, pieces

HUGE_PAGE_BYTES = 2 << 20
FREED_BYTES = 64 << 20
"""What is given back to the system at once."""


def give_back(room: mmap.mmap, start: int, end: int, tick: Tick) -> None:
    """Give whole pages of a mapping back to the system; they read as zeros from then on."""
    if hasattr(mmap, "MADV_DONTNEED"):
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        for at, n in pieces(max(0, end - start), FREED_BYTES):
            room.madvise(mmap.MADV_DONTNEED, start + at, n)
            tick()


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
