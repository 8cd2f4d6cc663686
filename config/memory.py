"""Memory of this host, as far as this process may have it."""

from __future__ import annotations

import contextlib
import os


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
