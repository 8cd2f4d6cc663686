"""Entries of the cache as they are written: on a thread of their own, since a disk may take long."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from workers.ticks import Job, Tick, nothing

WRITE_BYTES = 1 << 20
SYNC_BYTES = 32 << 20
"""A growing entry is synced this often, so that the end of a large one does not take long."""
ABANDONED_S = 86400.0
PART = ".part-"
GROWING = PART + "locked-"
"""Begins the name of a file that is being written. Its writer holds a lock on it, so others see whether it still lives."""


class Keeper(Protocol):
    """What a growing entry needs of its cache."""

    folder: Path
    growing: dict[Growing, int]

    def path(self, digest: bytes) -> Path: ...

    def later(self, do: Callable[[], None], n_bytes: int = 0, tick: Tick = nothing) -> Job[None]: ...

    def keep(self, entry: Growing, commit: Callable[[], None]) -> None: ...

    def evict(self) -> None: ...

    def trouble(self, reason: str) -> None: ...


class Growing:
    """An entry that is being written, as its bytes come. Nothing is an entry before `keep`.

    Threads: `add`, `keep`, `drop` and `unlink` from one; the disk is written on the thread of the cache.
    """

    def __init__(self, cache: Keeper, digest: bytes) -> None:
        self.cache, self.digest = cache, digest
        self._fd = -1
        self._name = ""
        self._unsynced = 0
        self._failed = False

    def add(self, data: bytes | memoryview, tick: Tick) -> None:
        """The next bytes, which must not change any more. Waits while too many are still to be written."""
        if not self._failed:
            try:
                self.cache.later(partial(self._append, data), len(data), tick)
            except TimeoutError as e:
                self._failed = True
                self.cache.trouble(str(e.strerror))

    def keep(self) -> None:
        """All bytes came and have the hash: make them an entry."""
        self.cache.keep(self, self._commit)

    def drop(self) -> None:
        """Leave nothing behind."""
        del self.cache.growing[self]
        self._failed = True
        with contextlib.suppress(TimeoutError):
            self.cache.later(self._give_up)

    def unlink(self) -> None:
        """Remove what has been written and is no entry yet, though the thread that writes may be busy with it."""
        self._failed = True
        with contextlib.suppress(OSError):
            if self._name:
                os.unlink(self._name)

    def _append(self, data: bytes | memoryview) -> None:
        try:
            left = memoryview(data)
            if self._fd < 0 and not self._failed:
                self._fd, self._name = _create(self.cache.folder)
            while len(left) and not self._failed:
                left = left[os.write(self._fd, left[:WRITE_BYTES]) :]
            self._unsynced += len(data)
            if self._unsynced >= SYNC_BYTES and not self._failed:
                os.fsync(self._fd)
                self._unsynced = 0
        except OSError as e:
            self._fail(e)

    def _commit(self) -> None:
        try:
            if not self._failed:
                os.fsync(self._fd)
                os.replace(self._name, self.cache.path(self.digest))
                self._name = ""
                self.cache.evict()
        except OSError as e:
            self._fail(e)
        self._give_up()

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self.cache.trouble(str(error.strerror))
        self._give_up()

    def _give_up(self) -> None:
        self.unlink()
        fd, self._fd, self._name = self._fd, -1, ""
        if fd >= 0:
            os.close(fd)


def _create(folder: Path) -> tuple[int, str]:
    """A new file in the folder under a name of its own, with this process's lock on it."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        name = str(folder / (GROWING + secrets.token_hex(6)))
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if _unlocked(fd, True) and os.fstat(fd).st_nlink:
            return fd, name
        os.close(fd)  # another process that sweeps was faster


def sweep(folder: Path, older_than_s: float = ABANDONED_S) -> None:
    """Remove what writers that are no more have left: their locks have gone with them. What never had one goes by age."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                if not entry.name.startswith(PART) or not entry.is_file(follow_symlinks=False):
                    continue
                fd = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    old = time.time() - os.fstat(fd).st_mtime >= older_than_s
                    if _unlocked(fd, old) and (old or entry.name.startswith(GROWING)):
                        os.unlink(entry.path)  # under the lock, so that nobody takes it over meanwhile
                finally:
                    os.close(fd)


def _unlocked(fd: int, otherwise: bool) -> bool:
    """Whether nobody else has the lock of a file, which this process then has. otherwise: where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return otherwise
    return True
