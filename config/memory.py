"""Memory of this host, as far as this process may have it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable


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


def _find_malloc_trim() -> Callable[[int], int] | None:
    """glibc's: gives back what lies free in the heap between what does not. None where the C library is another."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


_malloc_trim = _find_malloc_trim()


def give_back_free_memory() -> None:
    """Have the C library return to the system what was freed, where it can."""
    if _malloc_trim is not None:
        _malloc_trim(0)
