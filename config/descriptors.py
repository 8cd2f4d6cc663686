"""File descriptors of this process: how many, and the connections of others among them."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """A socket of this process that others hold, and go on holding. Errors: OSError when it is none."""
    s = socket.socket(fileno=fd)
    try:
        yield s
    finally:
        s.detach()


def open_descriptors() -> list[int]:
    """File descriptors of this process; none where the system does not tell."""
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError as e:  # to look takes one too: where all are in use they are known without
        return list(range(min(descriptor_limit(), 1 << 16))) if e.errno == errno.EMFILE else []


def descriptor_limit() -> int:
    """How many there may be."""
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError):
        return 1 << 30
    return soft if soft != resource.RLIM_INFINITY else 1 << 30


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as its host allows it, up to some thousands."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
