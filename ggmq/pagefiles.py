"""Pages of prompts as files: what a model has read stays over a restart.

An entry is `<model>-<page>-<window>` in the folder, the first two in hex: what the page holds, the bytes of its cells in
all layers with this window, and a BLAKE3 of it all. It is written to a temporary file in the same folder, synced and
renamed; it is verified each time it is read, and a wrong one is removed. Any trouble with the disk means that prompts are
read anew, never a wrong byte. The disk has a thread of its own; whoever asks for something looks later whether it is there.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, NamedTuple, TypeVar

from blake3 import blake3

from ggmq.archs.memory import PAGE
from ggmq.names import TOKEN_BYTES, Content, Names
from protocol.errors import ConfigError
from protocol.frames import Frame

T = TypeVar("T")
HEAD = struct.Struct("<8sIIIIQ16s16s")
"""Magic, format, window, bytes of the name before, tokens, bytes of the cells, model, the name before."""
MAGIC, FORMAT = b"ggmqpage", 1
NAME_BYTES = HASH_BYTES = 16
DIGEST_BYTES = 32
ENTRY = re.compile(rf"[0-9a-f]{{{2 * HASH_BYTES}}}-[0-9a-f]{{{2 * NAME_BYTES}}}-[0-9]+")
PART = ".part-"
ABANDONED_S = 3600.0
QUEUE_BYTES = 64 << 20
"""What may wait to be written."""
MAX_ENTRIES = 1 << 16
STALL_S = 10.0
"""A disk that takes longer than this over one thing is not asked any more."""


class _Known(NamedTuple):
    """What the disk's thread has learnt: an entry is there, or it is not any more."""

    window: int
    content: Content
    there: bool


class PageFiles:
    """The entries of one model in a folder.

    folder: made if it is not there, for its owner alone. model: what entries belong to, 16 bytes. n_bytes: quota of the
    folder, with what other models have there. note: told what a user should know.
    Errors: ConfigError for a folder that cannot be one.
    Threads: use from one. Several processes may share the folder.
    """

    def __init__(self, folder: Path, model: bytes, n_bytes: int, note: Callable[[str], None]) -> None:
        self.folder, self.model, self.n_bytes = folder, model, n_bytes
        self._note, self._told = note, set[str]()
        self._names, self._n_entries = Names(), 0
        self._news: SimpleQueue[_Known | str] = SimpleQueue()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._pending: dict[Future[None], int] = {}
        self._begun_s: float | None = None  # set by the disk's thread while it does something
        self._total_bytes = self._n_files = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"--prompt-cache {folder}: expected a folder, {e.strerror}; name another") from None
        self._thread = threading.Thread(target=self._run, daemon=True, name="ggmq-prompt-cache")
        self._thread.start()
        self._scanned = self._start(self._scan)

    # -- what is there -------------------------------------------------------------------------------------------------

    @property
    def stalled(self) -> bool:
        """Whether the disk takes so long that nothing is to be expected of it."""
        begun = self._begun_s
        return begun is not None and time.monotonic() - begun > STALL_S

    def ready(self) -> bool:
        """Whether it is known what there is, or will not be for a long time."""
        is_known = self._scanned.done() or self.stalled  # first: what it found has been told by then
        self._learn()
        return is_known

    def has(self, window: int, name: bytes) -> bool:
        return self._names.page(window, name) is not None

    def near(self, before: bytes, tokens: bytes) -> Iterator[tuple[Content, int]]:
        """As `Shelf.near`."""
        return self._names.near(before, tokens)

    def holds(self, window: int, content: Content) -> bool:
        """Whether there is this content, or one that goes on from it."""
        if content.n == PAGE:
            return self.has(window, content.name)
        return any(n == content.n and self.has(window, c.name) for c, n in self.near(content.before, content.tokens))

    # -- reading and writing -------------------------------------------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """Whether as much waits to be written as may."""
        self._pending = {job: n for job, n in self._pending.items() if not job.done()}
        return sum(self._pending.values()) >= QUEUE_BYTES

    def read(self, window: int, content: Content, n_bytes: int) -> Future[bytes | None]:
        """The `n_bytes` of an entry; None when it is not there, or damaged."""
        return self._start(partial(self._read, window, content, n_bytes))

    def use(self, entries: Sequence[tuple[int, Content]]) -> None:
        """Entries were of use: they stay the longest, of them the last."""
        paths = [self._path(window, content.name) for window, content in entries]

        def touch() -> None:
            for path in paths:
                with contextlib.suppress(OSError):
                    os.utime(path)

        self._start(touch)

    def write(self, window: int, content: Content, cells: Sequence[Frame]) -> None:
        """Have an entry made of a page's bytes, which must not change."""
        n_bytes = sum(len(c) for c in cells)
        if n_bytes > self.n_bytes:
            return
        self._pending[self._start(partial(self._write, window, content, cells))] = n_bytes
        self._know(_Known(window, content, True))
        for shorter, n in list(self.near(content.before, content.tokens)):
            if n == shorter.n < content.n and self.has(window, shorter.name):
                self._know(_Known(window, shorter, False))
                self._start(partial(self._remove, self._path(window, shorter.name)))

    def close(self, within_s: float) -> None:
        """Wait so long for what is still to be written. Idempotent."""
        self._jobs.put(None)
        self._thread.join(within_s)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _path(self, window: int, name: bytes) -> Path:
        return self.folder / f"{self.model.hex()}-{name.hex()}-{window}"

    def _learn(self) -> None:
        while not self._news.empty():
            news = self._news.get()
            if isinstance(news, _Known):
                self._know(news)
            elif news not in self._told:
                self._told.add(news)
                self._note(news)

    def _know(self, known: _Known) -> None:
        name = known.content.name
        if known.there:
            self._n_entries += 1
            self._names.give(known.window, self._n_entries, known.content, name)
        else:
            number = self._names.page(known.window, name)
            if number is not None:
                self._names.drop(known.window, number)

    def _start(self, do: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(do())
            except BaseException as e:
                future.set_exception(e)

        self._jobs.put(job)
        return future

    # -- in the disk's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._begun_s = time.monotonic()
            job()
            self._begun_s = None

    def _trouble(self, e: OSError) -> None:
        self._news.put(f"prompt cache {self.folder}: {e.strerror}; prompts that are not kept are read anew: make room, mend "
                       "the folder, or choose another with --prompt-cache")  # fmt: skip

    def _scan(self) -> None:
        """Learn what there is, and remove what writers that are no more have left."""
        mine = f"{self.model.hex()}-"
        try:
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):
                    s = entry.stat(follow_symlinks=False)
                    if entry.name.startswith(PART) and time.time() - s.st_mtime > ABANDONED_S:
                        os.unlink(entry.path)
                    if not ENTRY.fullmatch(entry.name):
                        continue
                    self._total_bytes, self._n_files = self._total_bytes + s.st_size, self._n_files + 1
                    if entry.name.startswith(mine):
                        self._begun_s = time.monotonic()
                        window = int(entry.name.rpartition("-")[2])
                        content = self._content(Path(entry.path), window)
                        if content is not None:
                            self._news.put(_Known(window, content, True))
        except OSError as e:
            self._trouble(e)
        self._evict()

    def _content(self, path: Path, window: int) -> Content | None:
        """What an entry says it holds; its bytes are not looked at."""
        with _opened(path) as f:
            head = f.read(HEAD.size + PAGE * TOKEN_BYTES)
        content = self._parsed(head, window)
        return content if content is not None and path == self._path(window, content.name) else None

    def _parsed(self, raw: bytes, window: int) -> Content | None:
        if len(raw) < HEAD.size:
            return None
        magic, form, said, n_before, n_tokens, _, model, before = HEAD.unpack_from(raw)
        tokens = raw[HEAD.size : HEAD.size + TOKEN_BYTES * n_tokens]
        if ((magic, form, said, model) != (MAGIC, FORMAT, window, self.model) or n_before not in (0, NAME_BYTES)
                or not 0 < n_tokens <= PAGE or len(tokens) != TOKEN_BYTES * n_tokens):  # fmt: skip
            return None
        return Content(before[:n_before], tokens)

    def _read(self, window: int, content: Content, n_bytes: int) -> bytes | None:
        path, start = self._path(window, content.name), HEAD.size + len(content.tokens)
        whole = start + n_bytes + DIGEST_BYTES
        try:
            with _opened(path) as f:
                raw = f.read(whole + 1)
        except OSError:
            self._news.put(_Known(window, content, False))
            return None
        good = len(raw) == whole and blake3(raw[:-DIGEST_BYTES]).digest() == raw[-DIGEST_BYTES:]
        if not good or self._parsed(raw, window) != content:
            self._remove(path)
            self._news.put(_Known(window, content, False))
            return None
        return raw[start:-DIGEST_BYTES]

    def _write(self, window: int, content: Content, cells: Sequence[Frame]) -> None:
        head = HEAD.pack(MAGIC, FORMAT, window, len(content.before), content.n, sum(len(c) for c in cells), self.model,
                         content.before) + content.tokens  # fmt: skip
        digest, temporary = blake3(head), ""
        try:
            fd, temporary = tempfile.mkstemp(dir=self.folder, prefix=PART)  # for its owner alone
            with open(fd, "wb") as f:
                f.write(head)
                for c in cells:
                    digest.update(c)
                    f.write(c)
                f.write(digest.digest())
                f.flush()
                os.fsync(fd)
                n_bytes = f.tell()
            os.replace(temporary, self._path(window, content.name))
        except OSError as e:
            if temporary:
                self._remove(Path(temporary))
            self._news.put(_Known(window, content, False))
            self._trouble(e)
            return
        self._total_bytes, self._n_files = self._total_bytes + n_bytes, self._n_files + 1
        self._evict()

    def _evict(self) -> None:
        """Remove what was of use the longest ago while the folder is over its quota, and a little more, so that this is
        seldom."""
        if self._total_bytes <= self.n_bytes and self._n_files <= MAX_ENTRIES:
            return
        entries = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):
                    if ENTRY.fullmatch(entry.name):
                        s = entry.stat(follow_symlinks=False)
                        entries.append((s.st_mtime_ns, s.st_size, Path(entry.path)))
        self._total_bytes, self._n_files = sum(size for _, size, _ in entries), len(entries)
        if self._total_bytes <= self.n_bytes and self._n_files <= MAX_ENTRIES:
            return
        for _, size, path in sorted(entries):
            if self._total_bytes <= self.n_bytes * 9 // 10 and self._n_files <= MAX_ENTRIES * 9 // 10:
                break
            self._forget(path)
            self._remove(path)
            self._total_bytes, self._n_files = self._total_bytes - size, self._n_files - 1

    def _forget(self, path: Path) -> None:
        """An entry is about to be removed: whoever looks for it is told."""
        if path.name.startswith(f"{self.model.hex()}-"):
            window = int(path.name.rpartition("-")[2])
            with contextlib.suppress(OSError):
                content = self._content(path, window)
                if content is not None:
                    self._news.put(_Known(window, content, False))

    @staticmethod
    def _remove(path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()


def _opened(path: Path) -> BinaryIO:
    """A file, through no link; a FIFO would be waited for, for good. Errors: OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return open(fd, "rb")
    except OSError:  # a folder
        os.close(fd)
        raise
