"""What a model has read, kept in files: pages go from the devices to the disk and come back, beside what is computed.

Pages are read from the devices when they are full, or when their sequence has ended; a few are on their way at once, and
computing goes on meanwhile. A sequence whose beginning is in files has pages for it at once, and runs when they are filled.

Threads: use from the engine's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from msgspec import Struct, field

from ggmq.archs.base import Arch
from ggmq.archs.memory import PAGE, Room
from ggmq.cluster import Client
from ggmq.loader import PlacedStage
from ggmq.names import Content
from ggmq.pagefiles import HASH_BYTES, PageFiles
from ggmq.pagemoves import Savings, fill, places
from ggmq.pages import Awaited, Held, Store
from ggmq.version import __version__
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.errors import Cancelled, DeadlineExceeded, GgmqError, HandleError, Unavailable

DEFAULT_BYTES = 8 << 30
N_AHEAD = 4
"""Pages of a prompt that are read from files at once."""
N_SAVING = 2
"""Pages that are read from the devices at once."""
WAIT_S = 0.02
CLOSE_S = 5.0
READ_S = 1.0
"""A page that is not read within so long is computed again."""


class Filling(NamedTuple):
    """A page on its way from a file to the devices."""

    awaited: Awaited
    asked: list[int]


class Bringing(Struct):
    """What one sequence awaits.

    Attributes:
        to_read, reading, filling: its pages in order, by how far they are.
        failed: one of them does not come, and so none behind it.
    """

    held: Held
    to_read: deque[Awaited]
    reading: deque[tuple[Awaited, Future[bytes | None]]] = field(default_factory=deque)
    filling: deque[Filling] = field(default_factory=deque)
    failed: bool = False


class PromptCache:
    """The pages of a loaded model, and its files.

    stages: where its layers lie. note: told what a user should know.
    """

    def __init__(
        self, client: Client, store: Store, stages: Sequence[PlacedStage], files: PageFiles, note: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.files = files
        self._client, self._store, self._stages, self._note = client, store, stages, note
        self._saving = Savings(client, store, stages, N_SAVING)
        self._bringing: list[Bringing] = []
        self._off = False
        store.on_worth = self._is_worth

    @property
    def busy(self) -> bool:
        """Whether something is on its way, or would be."""
        return bool(self._saving or self._bringing or not self.ready())

    # -- for the scheduler ---------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        return self._off or self.files.ready()

    def has(self, window: int, name: bytes) -> bool:
        return not self._off and not self.files.stalled and self.files.has(window, name)

    def near(self, before: bytes, tokens: bytes) -> Iterator[tuple[Content, int]]:
        return iter(()) if self._off or self.files.stalled else self.files.near(before, tokens)

    def bring(self, held: Held) -> bool:
        """Have brought what a sequence awaits. Returns: whether all that comes is there. Errors: as `advance`'s."""
        if not any(b.held is held for b in self._bringing):
            self._bringing.append(Bringing(held, deque(held.awaited)))
            self.files.use([(a.window, a.content) for a in reversed(held.awaited)])
        self.advance()
        return not held.awaited

    # -- for the engine ------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Go on with what can be done without waiting. Errors: Unavailable, HandleError."""
        if not self.busy:
            return
        try:
            for b in self._bringing:
                self._advance(b)
            self._bringing = [b for b in self._bringing if b.held.awaited or b.filling]
            for s, cells in self._saving.come():
                self.files.write(s.window, s.content, cells)
            if self.files.stalled:
                self._saving.worth.clear()
            self._saving.ask(lambda: not self.files.crowded, self._is_wanted)
        except (Unavailable, HandleError):
            raise
        except GgmqError as e:  # the text goes on without
            self._give_up(e)

    def wait(self) -> None:
        """Nothing else is to be done: until something of it has come, but not for long. Errors: Unavailable, HandleError."""
        client = self._client
        fillings = [f for b in self._bringing for f in b.filling]
        reads = [job for b in self._bringing for _, job in b.reading]
        if first := fillings or self._saving.under_way:
            for seq in first[0].asked:
                client.await_reply(seq)
        elif reads:
            with contextlib.suppress(TimeoutError):
                reads[0].result(WAIT_S)
        else:  # the disk has enough to write, or says yet what there is
            time.sleep(WAIT_S / 10)
        self.advance()

    def refill(self, pages: Sequence[tuple[int, int, Content]], layers: Collection[int]) -> set[tuple[int, int]]:
        """Have layers that were loaded anew hold again what they had of some pages, as far as that is in files.

        pages: window, page and what it holds. Returns: window and page of those that are whole again.
        Errors: Unavailable, HandleError.
        """
        done, reading = set[tuple[int, int]](), deque[tuple[int, int, Future[bytes | None]]]()
        wanted = deque((w, page, c) for w, page, c in pages if self.ready() and self.has(w, c.name))
        filling = deque[tuple[int, int, list[int]]]()
        while wanted or reading or filling:
            while wanted and len(reading) < N_AHEAD:
                window, page, content = wanted.popleft()
                n_bytes = sum(p.n_bytes for p in places(self._stages, window, page))
                reading.append((window, page, self.files.read(window, content, n_bytes)))
            if reading and len(filling) < N_AHEAD:
                window, page, job = reading.popleft()
                with contextlib.suppress(TimeoutError):
                    if (cells := job.result(READ_S)) is not None:
                        filling.append((window, page, fill(self._client, places(self._stages, window, page), cells, layers)))
            elif filling:
                window, page, asked = filling.popleft()
                for seq in asked:
                    self._client.wait(seq)
                done.add((window, page))
        return done

    def stop(self) -> None:
        """End what is on its way. Errors: Unavailable."""
        self._client.settle()
        self.reset()

    def reset(self) -> None:
        """What was on its way is not any more: the devices have been told to forget it."""
        store = self._store
        self._saving.reset()
        for b in self._bringing:
            for f in b.filling:
                store.go(f.awaited.window, f.awaited.page)
            store.rewind(b.held, b.held.n_past)
        self._bringing.clear()

    def _give_up(self, error: GgmqError) -> None:
        """The devices cannot give pages, or take them: prompts are read as without."""
        self._off = True
        self._note(f"prompt cache: {error}; prompts are read anew from here on")
        client = self._client
        for seq in [*self._saving.asked, *(seq for b in self._bringing for f in b.filling for seq in f.asked)]:
            with contextlib.suppress(GgmqError):
                client.await_reply(seq)
                client.wait(seq)
        self.reset()
        self._saving.worth.clear()

    def close(self, within_s: float = CLOSE_S) -> None:
        """Wait so long for what is still to be kept. Idempotent."""
        due = time.monotonic() + within_s

        def look() -> None:
            if time.monotonic() > due:
                raise DeadlineExceeded("prompt cache: what is still to be kept takes too long")

        before, self._client.on_wait = self._client.on_wait, look
        with contextlib.suppress(GgmqError):
            while self._saving and not self.files.stalled and time.monotonic() < due:
                self.wait()
        self._client.on_wait = before
        self._off = True
        self.files.close(max(0.0, due - time.monotonic()))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _is_worth(self, window: int, page: int) -> None:
        if not self._off and not self.files.stalled:
            self._saving.worth[window, page] = None

    def _is_wanted(self, window: int, page: int, content: Content) -> bool:
        """Whether a page holds something that is in no file."""
        if content.n < PAGE and not self._store.is_kept(window, page):
            return False
        if self.files.holds(window, content):
            self.files.use([(window, content)])
            return False
        return True

    def _advance(self, b: Bringing) -> None:
        """Read ahead, send what was read, and tell the store what has arrived."""
        store, client = self._store, self._client
        while b.filling and all(map(client.answered, b.filling[0].asked)):
            f = b.filling.popleft()
            store.go(f.awaited.window, f.awaited.page)
            for seq in f.asked:
                try:
                    client.wait(seq)
                except Cancelled:
                    b.failed = True
            if b.held.awaited and not b.failed:
                store.arrived(b.held)
        if not b.held.awaited or b.failed:
            self._end(b)
            return
        while b.to_read and len(b.reading) < N_AHEAD:
            a = b.to_read.popleft()
            n_bytes = sum(p.n_bytes for p in places(self._stages, a.window, a.page))
            b.reading.append((a, self.files.read(a.window, a.content, n_bytes)))
        while b.reading and b.reading[0][1].done() and len(b.filling) < N_AHEAD:
            a, job = b.reading.popleft()
            cells = job.result()
            if cells is None:
                b.failed = True
                break
            store.hold(a.window, a.page)
            b.filling.append(Filling(a, fill(self._client, places(self._stages, a.window, a.page), cells)))
        b.failed = b.failed or self.files.stalled
        self._end(b)

    def _end(self, b: Bringing) -> None:
        """If nothing more comes, a sequence has what has come until now."""
        if b.failed and not b.filling and b.held.awaited:
            self._store.rewind(b.held, b.held.n_past)
        if not b.held.awaited:
            b.to_read.clear()
            b.reading.clear()


def identity(
    arch: Arch, hashes: Mapping[str, bytes], room: Room, activations: GGMLType, n_ctx: int, stages: Sequence[PlacedStage],
    infos: Sequence[m.ListedDevice],
) -> bytes:  # fmt: skip
    """What the bytes of a page depend on besides the tokens: the model, the types, and what computes.

    hashes: of the tensors. infos: the devices. Activations in F32 pass from stage to stage as they are, so where stages
    begin does not matter; in F16 it does.
    """
    kinds = [(infos[s.assignment.device].kind, infos[s.assignment.device].description) for s in stages]
    layers = [(s.assignment.layers.start, s.assignment.layers.stop) for s in stages]
    anywhere = len(set(kinds)) == 1 and activations == GGMLType.F32
    by_length = any("rope_factors" in name for name in arch.gguf.tensors)
    metadata = {k: [v.type, v.value] for k, v in arch.gguf.metadata.items() if not k.startswith(("tokenizer.", "general."))}
    said = [__version__, PAGE, type(arch).__name__, metadata, sorted((n, h.hex()) for n, h in hashes.items()),
            room.k_type.name, room.v_type.name, activations.name, kinds[:1] if anywhere else [kinds, layers],
            n_ctx if by_length else 0]  # fmt: skip
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=HASH_BYTES).digest()
