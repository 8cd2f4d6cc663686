"""The content-hash cache: weights on disk by their BLAKE3, so that they travel once.

An entry is `<hex hash>` in the cache folder: the bytes and nothing else. It is written to a temporary file in the same
folder, synced and renamed; it is verified each time it is read, and a wrong one is removed and counted as repaired.
Any trouble with the disk means no cache, never a wrong byte; and however long a disk takes, the worker answers meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from config.caches import cache_folder
from workers.growing import HASH_BYTES, PART, Growing, remove, sweep
from workers.ticks import PIECE_BYTES, Aside, Job, Tick, nothing

T = TypeVar("T")
DEFAULT_QUOTA_BYTES = 64 << 30
N_ROOMS = 3
"""Pieces of a file in memory at once: one that is used, and those that are read meanwhile."""
QUEUE_BYTES = 64 << 20
"""What may wait to be written; whoever brings more waits for the disk."""
CLOSE_S = 2.0
"""At its end a worker waits so long for what is still to be written."""
MAX_GROWING = 64
"""Entries that may be under way at once: each holds a descriptor."""


def default_folder() -> Path:
    """Where weights are kept if nobody says otherwise."""
    return cache_folder("ggmq")


# -- reading -----------------------------------------------------------------------------------------------------------


class Reader:
    """Bytes of a hash in a regular file, read once from front to back and hashed on the way, ahead of who uses them.

    Attributes:
        good: once all pieces have been taken: whether all were read, and are what the hash says.
    Threads: use from one, in a `with` block; the file is read and closed on the thread of `aside`.
    """

    def __init__(
        self, aside: Aside, fd: int, offset: int, n_bytes: int, digest: bytes,
        done: Callable[[bool], None] = lambda good: None, fits: bool = True,
    ) -> None:  # fmt: skip
        """done: called aside with the verdict. fits: False where the file's size says that its bytes are others."""
        self.good = False
        self._aside, self._fd, self._offset, self._digest, self._done = aside, fd, offset, digest, done
        self._left = n_bytes if fits else 0
        self._whole = fits
        self._open = True
        self._hash = blake3()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:  # nobody wanted the rest: that says nothing about the file
            self._open = False
            self._aside.start(partial(os.close, self._fd))

    def pieces(self, size: int, tick: Tick) -> Iterator[memoryview]:
        """`size` bytes after `size` bytes, and what is left at the end. A piece is overwritten when the next is taken.

        Ends early where the file does not give them.
        """
        rooms = deque(memoryview(bytearray(min(size, self._left))) for _ in range(N_ROOMS))
        ahead: deque[tuple[Job[bool], memoryview]] = deque()
        while self._left or ahead:
            while self._left and len(ahead) < N_ROOMS:
                rooms.rotate(-1)
                room = rooms[-1][: self._left]
                ahead.append((self._aside.start(partial(self._fill, room, self._offset)), room))
                self._offset += len(room)
                self._left -= len(room)
            job, room = ahead.popleft()
            try:
                if not self._aside.result(job, tick):
                    break
            except TimeoutError:
                return
            yield room
        self._open = False
        with contextlib.suppress(TimeoutError):
            self.good = self._aside.result(self._aside.start(self._finish), tick)

    def _fill(self, room: memoryview, offset: int) -> bool:
        filled = 0
        while filled < len(room) and self._whole:
            try:
                n = os.preadv(self._fd, [room[filled:]], offset + filled)
            except OSError:
                n = 0
            self._whole = n > 0
            filled += n
        if self._whole:
            self._hash.update(room)
        return self._whole

    def _finish(self) -> bool:
        os.close(self._fd)
        good = self._whole and self._hash.digest() == self._digest
        self._done(good)
        return good


def open_range(path: Path, end: int, follow: bool = False) -> tuple[int, int] | None:
    """A descriptor of a regular file of at least `end` bytes, and its size. follow: through a symbolic link."""
    try:  # what is no regular file is not waited for: a FIFO would be, for good
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError:
        return None
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and info.st_size >= end:
        return fd, info.st_size
    os.close(fd)
    return None


def _opened(aside: Aside, path: Path, end: int, follow: bool, tick: Tick) -> tuple[int, int] | None:
    """`open_range`, aside. None also where the disk does not answer."""
    job = aside.start(partial(open_range, path, end, follow))
    try:
        return aside.result(job, tick)
    except BaseException as e:
        aside.start(partial(_close, job))  # else the descriptor would be nobody's
        if isinstance(e, TimeoutError):
            return None
        raise


def _chunk(path: Path, offset: int, n_bytes: int, size: int, follow: bool) -> bytes | None:
    """Bytes of a regular file, which has `size` in all; 0: however many. None where it does not give them."""
    found = open_range(path, offset + n_bytes, follow)
    if found is None:
        return None
    try:
        data = os.pread(found[0], n_bytes, offset) if size in (0, found[1]) else b""
    except OSError:
        data = b""
    finally:
        os.close(found[0])
    return data if len(data) == n_bytes else None


def _known(path: Path, end: int, follow: bool) -> os.stat_result | None:
    """What a regular file of at least `end` bytes is."""
    try:
        info = path.stat(follow_symlinks=follow)
    except OSError:
        return None
    return info if stat.S_ISREG(info.st_mode) and info.st_size >= end else None


def _asked(aside: Aside, do: Callable[[], T | None], tick: Tick) -> T | None:
    """What is found out aside. None also where the disk does not answer."""
    try:
        return aside.result(aside.start(do), tick)
    except TimeoutError:
        return None


def _close(job: Job[tuple[int, int] | None]) -> None:
    found = job.outcome()
    if found is not None:
        os.close(found[0])


class ModelFolder:
    """A folder of GGUF files that a worker can reach by itself. Files are named without their folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reading = Aside("ggmq-model-folder")

    def open(self, name: str, offset: int, n_bytes: int, digest: bytes, tick: Tick = nothing) -> Reader | None:
        """What a file holds there, if it may be what the hash says."""
        if not self._is_name(name):
            return None
        found = _opened(self._reading, self.folder / name, offset + n_bytes, True, tick)
        return None if found is None else Reader(self._reading, found[0], offset, n_bytes, digest)

    def look(self, name: str, end: int, tick: Tick = nothing) -> os.stat_result | None:
        """What a file of at least `end` bytes is."""
        return _asked(self._reading, partial(_known, self.folder / name, end, True), tick) if self._is_name(name) else None

    def chunk(self, name: str, offset: int, n_bytes: int, tick: Tick = nothing) -> bytes | None:
        """Bytes of a file, whatever they are."""
        if not self._is_name(name):
            return None
        return _asked(self._reading, partial(_chunk, self.folder / name, offset, n_bytes, 0, True), tick)

    @staticmethod
    def _is_name(name: str) -> bool:
        return bool(name) and name == os.path.basename(name) and name not in (".", "..") and "\0" not in name


class Cache:
    """Weights by hash in a folder.

    Attributes:
        hits, misses, repairs: counters; `repairs` are entries found damaged and removed.
        growing: entries under way whose bytes have not all come.
    Threads: one process uses one object, from one thread; it reads and writes on two others. Several processes may share
    the folder.
    """

    def __init__(self, folder: Path, quota_bytes: int = DEFAULT_QUOTA_BYTES) -> None:
        self.folder, self.quota_bytes = folder, quota_bytes
        self.hits = self.misses = self.repairs = 0
        self.growing: dict[Growing, int] = {}
        self._kept: dict[bytes, tuple[Job[None], Growing]] = {}
        self._queue: deque[tuple[Job[None], int]] = deque()
        self._queued_bytes = 0
        self._reading, self._writing = Aside("ggmq-cache-read"), Aside("ggmq-cache-write")
        self._told: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            self.trouble(str(e.strerror))
        sweep(folder)

    def path(self, digest: bytes) -> Path:
        return self.folder / digest.hex()

    def trouble(self, reason: str) -> None:
        """Say once what keeps weights out of the cache."""
        if reason not in self._told:
            self._told.add(reason)
            print(f"worker: cache {self.folder}: {reason}; the worker goes on, and weights that are not kept are sent again "
                  "next time: make room, mend the folder, or choose another with --cache-dir",
                  file=sys.stderr, flush=True)  # fmt: skip

    # -- reading -------------------------------------------------------------------------------------------------------

    def open(self, digest: bytes, n_bytes: int, tick: Tick = nothing) -> Reader | None:
        """The entry of this hash; None when it is not there. One that turns out to be damaged is removed."""
        self._settled(digest, tick)
        path = self.path(digest)
        found = _opened(self._reading, path, 0, False, tick)
        if found is None:
            self.misses += 1
            return None

        def done(good: bool) -> None:
            if good:
                self.hits += 1
                with contextlib.suppress(OSError):
                    os.utime(path)
            else:
                self.repairs += 1
                self.misses += 1
                with contextlib.suppress(OSError):
                    path.unlink()

        # an entry that is too long is as wrong as one that is cut: its size is part of what is read
        return Reader(self._reading, found[0], 0, n_bytes, digest, done, fits=found[1] == n_bytes)

    def _settled(self, digest: bytes, tick: Tick) -> None:
        """Wait for an entry that is still being written."""
        kept = self._kept.get(digest)
        if kept is not None:
            with contextlib.suppress(TimeoutError):
                self._writing.wait(kept[0], tick)

    def has(self, digest: bytes, n_bytes: int, tick: Tick = nothing) -> bool:
        """Whether there is an entry of this hash and size; its bytes are not looked at."""
        kept = self._kept.get(digest)
        if kept is not None and not kept[0].finished:
            return True
        known = _asked(self._reading, partial(_known, self.path(digest), n_bytes, False), tick)
        return known is not None and known.st_size == n_bytes

    def chunk(self, digest: bytes, n_bytes: int, at: int, n: int, tick: Tick = nothing) -> bytes | None:
        """Bytes of an entry that has `n_bytes`. They are not verified: whoever has them all can."""
        self._settled(digest, tick)
        return _asked(self._reading, partial(_chunk, self.path(digest), at, n, n_bytes, False), tick)

    # -- writing -------------------------------------------------------------------------------------------------------

    def begin(self, digest: bytes, n_bytes: int) -> Growing | None:
        """An entry that is to be written as its bytes come. None when it cannot be kept."""
        if n_bytes > self.quota_bytes:
            self.trouble(f"a weight of {n_bytes} bytes is larger than the quota of {self.quota_bytes}")
        if not self._has_room(n_bytes):
            return None
        entry = Growing(self, digest, n_bytes)
        self.growing[entry] = n_bytes
        return entry

    def resume(self, digest: bytes, n_bytes: int, tick: Tick = nothing) -> Growing | None:
        """An entry whose upload broke off, as far as it came (`Growing.left`). None: there is none, or another has it."""
        if n_bytes <= PIECE_BYTES or not self._has_room(n_bytes):
            return None
        entry = Growing(self, digest, n_bytes)
        try:
            if not self._writing.result(self._writing.start(entry.take_over), tick):
                return None
        except BaseException as e:
            entry.leave()
            if isinstance(e, TimeoutError):
                return None
            raise
        self.growing[entry] = n_bytes
        return entry

    def _has_room(self, n_bytes: int) -> bool:
        full = sum(self.growing.values()) + n_bytes > self.quota_bytes
        return not (full or self._writing.stalled or len(self.growing) >= MAX_GROWING)

    def read(self, do: Callable[[], bytes], tick: Tick) -> bytes:
        """Read something aside. Errors: OSError."""
        return self._reading.result(self._reading.start(do), tick)

    def later(self, do: Callable[[], None], n_bytes: int = 0, tick: Tick = nothing) -> Job[None]:
        """Do something on the thread that writes, which holds so many bytes until it is done. Waits while it holds too many.

        Errors: TimeoutError when the disk takes too long.
        """
        job = self._writing.start(do)
        self._queue.append((job, n_bytes))
        self._queued_bytes += n_bytes
        while self._queue and (self._queued_bytes > QUEUE_BYTES or self._queue[0][0].finished):
            self._writing.wait(self._queue[0][0], tick)
            self._queued_bytes -= self._queue.popleft()[1]
        return job

    def keep(self, entry: Growing, commit: Callable[[], None]) -> None:
        """All bytes of an entry are on their way: make it one behind them."""
        del self.growing[entry]
        self._kept = {digest: kept for digest, kept in self._kept.items() if not kept[0].finished}
        self._kept[entry.digest] = self._writing.start(commit), entry

    def close(self, within_s: float = CLOSE_S) -> None:
        """Wait so long for what is still to be written; what is not an entry then stays only where another can go on."""
        due = time.monotonic() + within_s
        for job, _ in self._kept.values():
            job.wait(nothing, max(0.0, due - time.monotonic()))
        for entry in [*self.growing, *(entry for _, entry in self._kept.values())]:
            entry.at_exit()

    def entries(self) -> list[tuple[bytes, int, float]]:
        """Hash, bytes and last use of each entry; names that are no hash are not entries."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError, ValueError):
                    if len(entry.name) == 2 * HASH_BYTES and entry.is_file(follow_symlinks=False):
                        s = entry.stat(follow_symlinks=False)
                        found.append((bytes.fromhex(entry.name), s.st_size, s.st_mtime))
        return found

    def evict(self) -> None:
        """Remove the least recently used entries, and what uploads left, while the folder is over its quota."""
        found = [(used, size, str(self.path(digest)), False) for digest, size, used in self.entries()]
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):
                    if entry.name.startswith(PART) and entry.is_file(follow_symlinks=False):
                        s = entry.stat(follow_symlinks=False)
                        found.append((s.st_mtime, 512 * s.st_blocks, entry.path, True))  # it has holes
        total = sum(size for _, size, _, _ in found)
        for _, size, path, part in sorted(found):
            if total <= self.quota_bytes:
                break
            with contextlib.suppress(OSError):
                if not part:
                    os.unlink(path)
                elif not remove(path):
                    continue
                total -= size

    def verify(self) -> tuple[int, int]:
        """Read every entry; remove the damaged ones. Returns: how many were good, how many were removed."""
        good = bad = 0
        for digest, size, _ in self.entries():
            reader = self.open(digest, size)
            if reader is not None:
                with reader:
                    for _ in reader.pieces(PIECE_BYTES, nothing):
                        pass
                good, bad = (good + 1, bad) if reader.good else (good, bad + 1)
        return good, bad

    def clear(self) -> int:
        """Remove every entry, and what writers that are no more have left; returns how many entries went."""
        entries = self.entries()
        for digest, _, _ in entries:
            with contextlib.suppress(OSError):
                self.path(digest).unlink()
        sweep(self.folder, 0)
        return len(entries)


def main(argv: list[str] | None = None) -> int:
    """`python -m workers.cache list|verify|clear`: what `ggmq cache` runs."""
    p = argparse.ArgumentParser(prog="ggmq cache")
    p.add_argument("what", choices=["list", "verify", "clear"])
    p.add_argument("--cache-dir", type=Path, default=default_folder())
    args = p.parse_args(argv)
    try:
        args.cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        print(f"ggmq cache: {args.cache_dir}: {e.strerror}; choose another with --cache-dir", file=sys.stderr)
        return 2
    cache = Cache(args.cache_dir)
    if args.what == "clear":
        print(f"removed {cache.clear()} entries from {cache.folder}")
        return 0
    if args.what == "verify":
        good, bad = cache.verify()
        print(f"{good} entries are good, {bad} were damaged and have been removed")
        return 1 if bad else 0
    entries = sorted(cache.entries(), key=lambda e: -e[2])
    for digest, size, used in entries:
        print(f"{digest.hex()} {size:>14} bytes, used {time.strftime('%Y-%m-%d %H:%M', time.localtime(used))}")
    print(f"{len(entries)} entries, {sum(e[1] for e in entries):,} bytes in {cache.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
