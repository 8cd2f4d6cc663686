"""Entries of the cache as they are written: on a thread of their own, since a disk may take long.

What an upload that broke off has left of a large weight stays, for whoever sends the rest: a file that its hash names, with
a hash of all bytes up to the end of each piece behind the place of the last byte. It is never an entry; what of it counts is
hashed again when it is taken over. A file has one writer, who holds a lock on it; a second one writes a file of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from workers.ticks import PIECE_BYTES, Job, Tick, nothing

HASH_BYTES = 32
WRITE_BYTES = 1 << 20
SYNC_BYTES = 32 << 20
"""A growing entry is synced this often, so that the end of a large one does not take long."""
ABANDONED_S = 86400.0
PART = ".part-"
GROWING = PART + "locked-"
"""Begins the name of a file that is of use to its writer alone. He holds a lock on it, so others see whether he lives."""


class Keeper(Protocol):
    """What a growing entry needs of its cache."""

    folder: Path
    growing: dict[Growing, int]

    def path(self, digest: bytes) -> Path: ...

    def later(self, do: Callable[[], None], n_bytes: int = 0, tick: Tick = nothing) -> Job[None]: ...

    def read(self, do: Callable[[], bytes], tick: Tick) -> bytes: ...

    def keep(self, entry: Growing, commit: Callable[[], None]) -> None: ...

    def evict(self) -> None: ...

    def trouble(self, reason: str) -> None: ...


class Growing:
    """An entry that is being written, as its bytes come. Nothing is an entry before `keep`.

    Threads: public methods from one, save `take_over`; the disk is written on the thread of the cache.
    """

    def __init__(self, cache: Keeper, digest: bytes, n_bytes: int) -> None:
        self.cache, self.digest, self.n_bytes = cache, digest, n_bytes
        self._fd = -1
        self._name = ""
        self._shared = False
        self._at = self._unsynced = 0
        self._failed = False

    def take_over(self) -> bool:
        """Open what another has left of this weight, on the thread that writes. Returns: whether there is something."""
        name = str(left_behind(self.cache.folder, self.digest, self.n_bytes))
        fd = _own(name, create=False)
        if fd is not None:
            self._fd, self._name, self._shared = fd, name, True
        return fd is not None

    def left(self, tick: Tick) -> Iterator[tuple[bytes, Any]]:
        """Pieces of what was taken over, as far as they are what came, each with the BLAKE3 of all up to its end. Bytes that
        are added come behind them; at least one of the weight is not among them."""
        so_far = blake3()
        for i in range((self.n_bytes - 1) // PIECE_BYTES):
            try:
                piece = self.cache.read(partial(os.pread, self._fd, PIECE_BYTES, i * PIECE_BYTES), tick)
                noted = self.cache.read(partial(os.pread, self._fd, HASH_BYTES, self._note(i)), tick)
            except OSError:
                break
            so_far.update(piece)
            if len(piece) < PIECE_BYTES or so_far.digest() != noted:
                break
            self._at += len(piece)
            yield piece, so_far.copy()
        os.lseek(self._fd, self._at, os.SEEK_SET)

    def add(self, data: bytes | memoryview, tick: Tick, so_far: bytes = b"") -> None:
        """The next bytes, which must not change any more. Waits while too many are still to be written.

        so_far: BLAKE3 of all up to their end, where a piece ends there.
        """
        if not self._failed:
            try:
                self.cache.later(partial(self._append, data, so_far), len(data), tick)
            except TimeoutError as e:
                self._failed = True
                self.cache.trouble(str(e.strerror))

    def keep(self) -> None:
        """All bytes came and have the hash: make them an entry."""
        self.cache.keep(self, self._commit)

    def drop(self) -> None:
        """Leave nothing behind."""
        self._failed = True
        self._end(self._give_up)

    def leave(self) -> None:
        """The rest does not come: leave what did to whoever sends it."""
        self._end(self._leave)

    def _end(self, do: Callable[[], None]) -> None:
        self.cache.growing.pop(self, None)
        with contextlib.suppress(TimeoutError):
            self.cache.later(do)

    def at_exit(self) -> None:
        """The process ends, though the thread that writes may be busy: what nobody can take over is removed."""
        if not self._shared:
            self._unlink()

    def _unlink(self) -> None:
        self._failed = True
        with contextlib.suppress(OSError):
            if self._name:
                os.unlink(self._name)

    def _note(self, piece: int) -> int:
        """Where the hash of all up to the end of a piece lies."""
        return self.n_bytes + HASH_BYTES * piece

    def _open(self) -> None:
        folder = self.cache.folder
        folder.mkdir(parents=True, exist_ok=True)
        if self.n_bytes > PIECE_BYTES:
            name = str(left_behind(folder, self.digest, self.n_bytes))
            fd = _own(name, create=True)
            if fd is not None:
                self._fd, self._name, self._shared = fd, name, True
                return
        self._fd, self._name = _create(folder)

    def _append(self, data: bytes | memoryview, so_far: bytes) -> None:
        try:
            left = memoryview(data)
            if self._fd < 0 and not self._failed:
                self._open()
            while len(left) and not self._failed:
                n = os.write(self._fd, left[:WRITE_BYTES])
                left, self._at = left[n:], self._at + n
            if so_far and self._shared and not self._failed:  # behind the bytes, so that it never says more than there are
                os.pwrite(self._fd, so_far, self._note(self._at // PIECE_BYTES - 1))
            self._unsynced += len(data)
            if self._unsynced >= SYNC_BYTES and not self._failed:
                os.fsync(self._fd)
                self._unsynced = 0
        except OSError as e:
            self._fail(e)

    def _commit(self) -> None:
        try:
            if not self._failed:
                os.ftruncate(self._fd, self.n_bytes)
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

    def _leave(self) -> None:
        if self._shared and not self._failed and os.fstat(self._fd).st_size > self.n_bytes:
            self._name = ""  # a piece of it is whole
        self._give_up()
        self.cache.evict()

    def _give_up(self) -> None:
        self._unlink()
        fd, self._fd, self._name = self._fd, -1, ""
        if fd >= 0:
            os.close(fd)


def left_behind(folder: Path, digest: bytes, n_bytes: int) -> Path:
    """The file that a large weight comes into; it stays when its upload breaks off."""
    return folder / f"{PART}{digest.hex()}.{n_bytes}"


def _own(path: str, create: bool) -> int | None:
    """A descriptor of the regular file of this name, with this process's lock on it. None: there is none, it is something
    else, or another one writes it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        info = os.fstat(fd)
        # one that has other names too may be anybody's file
        if stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and _unlocked(fd, False) and _is_at(fd, path):
            return fd
    os.close(fd)
    return None


def _is_at(fd: int, path: str) -> bool:
    """Whether a file that this process has locked still has this name: the one before may have made it an entry. While it is
    locked it keeps it."""
    info = os.fstat(fd)
    with contextlib.suppress(OSError):
        now = os.lstat(path)
        return (now.st_dev, now.st_ino) == (info.st_dev, info.st_ino)
    return False


def remove(path: str, older_than_s: float = 0.0, of_no_use: bool = False) -> bool:
    """Remove a file that is no entry and that nobody writes, if it is so old, or of use to nobody else. Returns: whether it
    was."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            old = time.time() - os.fstat(fd).st_mtime >= older_than_s
            if _unlocked(fd, old) and (old or of_no_use) and _is_at(fd, path):
                os.unlink(path)  # under the lock, so that nobody takes it over meanwhile
                return True
        finally:
            os.close(fd)
    return False


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
    """Remove what writers that are no more have left: what is of use to nobody else at once, the rest by its age."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(PART) and entry.is_file(follow_symlinks=False):
                remove(entry.path, older_than_s, entry.name.startswith(GROWING))


def _unlocked(fd: int, otherwise: bool) -> bool:
    """Whether nobody else has the lock of a file, which this process then has. otherwise: where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return otherwise
    return True
