"""The content-hash cache: weights on disk by their BLAKE3, so that they travel once.

An entry is `<hex hash>` in the cache folder: the bytes and nothing else. It is written to a temporary file in the same
folder, synced and renamed; it is verified each time it is read, and a wrong one is removed and counted as repaired.
Any trouble with the disk means no cache, never a wrong byte.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

HASH_BYTES = 32
DEFAULT_QUOTA_BYTES = 64 << 30
PIECE_BYTES = 1 << 20


def cache_folder() -> Path:
    """`$LLAMA_CACHE/ggmq`, else `$XDG_CACHE_HOME/ggmq`, else `~/.cache/ggmq`."""
    base = os.environ.get("LLAMA_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "ggmq" if base else Path.home() / ".cache" / "ggmq"


def content_hash(data: bytes | memoryview) -> bytes:
    """BLAKE3 of the bytes, 32 long."""
    return blake3(data).digest()


class Reader:
    """Bytes of a hash in a regular file, read once from front to back and hashed on the way.

    Threads: use from one.
    """

    def __init__(
        self, fd: int, offset: int, n_bytes: int, digest: bytes, done: Callable[[bool], None] = lambda good: None
    ) -> None:
        self.n_bytes = n_bytes
        self._fd, self._offset, self._at, self._digest, self._done = fd, offset, 0, digest, done
        self._hash = blake3()

    def read(self, room: memoryview) -> bool:
        """Fill `room` with the next bytes. False when the file does not give them."""
        filled = 0
        while filled < len(room):
            try:
                n = os.preadv(self._fd, [room[filled:]], self._offset + self._at + filled)
            except OSError:
                n = 0
            if not n:
                return False
            filled += n
        self._hash.update(room)
        self._at += len(room)
        return True

    def close(self) -> bool:
        """Whether all was read, and was what the hash says."""
        os.close(self._fd)
        good = self._at == self.n_bytes and self._hash.digest() == self._digest
        self._done(good)
        return good


def open_range(path: Path, end: int, follow: bool = False) -> int | None:
    """A descriptor of a regular file of at least `end` bytes. follow: through a symbolic link."""
    try:
        fd = os.open(path, os.O_RDONLY | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    except OSError:
        return None
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and info.st_size >= end:
        return fd
    os.close(fd)
    return None


class ModelFolder:
    """A folder of GGUF files that a worker can reach by itself. Files are named without their folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, name: str, offset: int, n_bytes: int, digest: bytes) -> Reader | None:
        """What a file holds there, if it may be what the hash says."""
        if not name or name != os.path.basename(name) or name in (".", "..") or "\0" in name:
            return None
        fd = open_range(self.folder / name, offset + n_bytes, follow=True)
        return None if fd is None else Reader(fd, offset, n_bytes, digest)


class Cache:
    """Weights by hash in a folder.

    Attributes:
        hits, misses, repairs: counters; `repairs` are entries found damaged and removed.
    Threads: one process uses one object; several processes may share the folder.
    """

    def __init__(self, folder: Path, quota_bytes: int = DEFAULT_QUOTA_BYTES) -> None:
        self.folder, self.quota_bytes = folder, quota_bytes
        self.hits = self.misses = self.repairs = 0
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: bytes) -> Path:
        return self.folder / digest.hex()

    def open(self, digest: bytes, n_bytes: int) -> Reader | None:
        """The entry of this hash; None when it is not there. One that turns out to be damaged is removed."""
        path = self.path(digest)
        fd = open_range(path, 0)
        if fd is None:
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
        size = os.fstat(fd).st_size
        return Reader(fd, 0, n_bytes if size == n_bytes else -1, digest, done)

    def put(self, digest: bytes, data: bytes | memoryview) -> bool:
        """Keep the bytes; they must have been verified. False when the disk would not take them."""
        if len(data) > self.quota_bytes:
            return False
        try:
            fd, name = tempfile.mkstemp(prefix=".part-", dir=self.folder)
        except OSError:
            return False
        try:
            with open(fd, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(name, self.path(digest))
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            return False
        self._evict()
        return True

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

    def _evict(self) -> None:
        """Remove the least recently used entries while the folder is over its quota."""
        entries = sorted(self.entries(), key=lambda e: e[2])
        total = sum(size for _, size, _ in entries)
        for digest, size, _ in entries:
            if total <= self.quota_bytes:
                break
            with contextlib.suppress(OSError):
                self.path(digest).unlink()
                total -= size

    def verify(self) -> tuple[int, int]:
        """Read every entry; remove the damaged ones. Returns: how many were good, how many were removed."""
        good = bad = 0
        for digest, size, _ in self.entries():
            reader = self.open(digest, size)
            if reader is None:
                continue
            room = memoryview(bytearray(PIECE_BYTES))
            left = size
            while left and reader.read(room[: min(left, PIECE_BYTES)]):
                left -= min(left, PIECE_BYTES)
            good, bad = (good + 1, bad) if reader.close() else (good, bad + 1)
        return good, bad

    def clear(self) -> int:
        """Remove every entry and leftover; returns how many entries went."""
        entries = self.entries()
        for digest, _, _ in entries:
            with contextlib.suppress(OSError):
                self.path(digest).unlink()
        for leftover in self.folder.glob(".part-*"):
            with contextlib.suppress(OSError):
                leftover.unlink()
        return len(entries)


def main(argv: list[str] | None = None) -> int:
    """`python -m workers.cache list|verify|clear`: what `ggmq cache` runs."""
    p = argparse.ArgumentParser(prog="ggmq cache")
    p.add_argument("what", choices=["list", "verify", "clear"])
    p.add_argument("--cache-dir", type=Path, default=cache_folder())
    args = p.parse_args(argv)
    try:
        cache = Cache(args.cache_dir)
    except OSError as e:
        print(f"ggmq cache: {args.cache_dir}: {e.strerror}; choose another with --cache-dir", file=sys.stderr)
        return 2
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
