"""Who holds which pages and slots of a model's memory: counted, shared by equal prefixes, copied on write, given back.

A sequence is a list of pages for each window, and a slot where its layers have states. Pages that nobody holds any more are
kept under their names until somebody needs the room, those that were held last the longest. Nothing here touches a device:
what must be copied there is told.

Threads: use from one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct, field

from ggmq.archs.memory import N_RESERVED_SLOTS, PAGE, SCRAP_PAGE, ZERO_SLOT, Cells, LayerMemory, Room
from ggmq.names import PAGE_BYTES, ROOT, TOKEN_BYTES, Content, Names, as_bytes, name_of
from ggmq.pools import Pool

GIVEN_BACK = SCRAP_PAGE
"""Stands for a page that a windowed layer does not see any more."""


class PageCopy(Struct, frozen=True):
    """A page that must be copied before a sequence writes to it, in all layers with this window."""

    window: int
    source: int
    target: int


class Awaited(NamedTuple):
    """A page of a sequence that has a place, and whose cells are still to come from elsewhere: its `at`-th."""

    window: int
    at: int
    page: int
    content: Content


class Elsewhere(Protocol):
    """Pages that lie where they can be brought from."""

    def has(self, window: int, name: bytes) -> bool: ...

    def near(self, before: bytes, tokens: bytes) -> Iterator[tuple[Content, int]]:
        """As `Shelf.near`."""
        ...


class Held(Struct, eq=False):
    """What one sequence holds.

    Attributes:
        n_past: tokens before the next that it will read.
        reads_from: where the batch begins that is being made; what windowed layers see is counted from there.
        pages: by window, the page of each 64 tokens.
        slot: where its state is read from; ZERO_SLOT before the first token.
        snapshot: a slot with an older state, and the tokens that had been read when it was made.
        keys: names of its full pages, which know all tokens up to their end.
        copies: what must be copied before its first batch.
        unsure: its first page that was to be copied or brought, while that is not known to have been done.
        awaited: what is to be brought before it can be read on.
    """

    n_past: int = 0
    reads_from: int = 0
    pages: dict[int, list[int]] = field(default_factory=dict)
    slot: int = ZERO_SLOT
    snapshot: tuple[int, int] | None = None
    keys: list[bytes] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    unsure: int | None = None
    awaited: list[Awaited] = field(default_factory=list)


class Found(NamedTuple):
    """The longest beginning of some tokens that is there: `n` tokens, in full pages and a part of another."""

    keys: list[bytes]
    n: int
    part: Content | None = None


class Store:
    """The pages and slots of a loaded model.

    Attributes:
        on_worth: told a window and a page that is worth keeping elsewhere: it is full, or nobody writes to it any more.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self.on_worth: Callable[[int, int], None] = lambda window, page: None
        self._pools = {window: Pool(SCRAP_PAGE + 1, n) for window, n in room.n_pages.items()}
        self._slots = Pool(N_RESERVED_SLOTS, room.n_slots)
        self._held: set[Held] = set()
        self.names = Names()

    @property
    def n_free(self) -> dict[int, int]:
        """Free pages, by window."""
        return {window: pool.n_free for window, pool in self._pools.items()}

    @property
    def n_read(self) -> int:
        """Tokens of all sequences that hold something, those that several have read counted for each."""
        return sum(held.n_past for held in self._held)

    @property
    def n_kept(self) -> dict[int, int]:
        """Those of the free pages whose content is kept, by window."""
        return {window: pool.n_kept for window, pool in self._pools.items()}

    @property
    def n_free_slots(self) -> int:
        return self._slots.n_free

    # -- sequences -----------------------------------------------------------------------------------------------------

    def begin(self, tokens: Sequence[int] = (), elsewhere: Elsewhere | None = None) -> Held:
        """A new sequence. It has what is there of the beginning of its tokens; one at least is left to be read. Of a page
        that it will write to it has a copy, see `grow`.

        elsewhere: what is there too; what the sequence has of it is `awaited`, and `arrived` when it is there.
        """
        held = Held(pages={window: [] for window in self._pools})
        self._held.add(held)
        found = self._find(tokens)
        if elsewhere is not None:
            brought = self._find(tokens, elsewhere=elsewhere)
            if brought.n > found.n and self._has_room(brought):
                found = brought
        if found.part is not None and not self._has_room(found):
            found = self._find(tokens, parts=False)
        held.keys, held.n_past = found.keys, found.n
        held.reads_from = held.n_past
        for window, pool in self._pools.items():
            first = self._first_seen(window, found.n)
            there = [self.names.page(window, key) for key in found.keys[first:]]
            held.pages[window] = [GIVEN_BACK] * first + [GIVEN_BACK if p is None else pool.share(p) for p in there]
            part = found.part
            if part is not None and self.names.page(window, part.name) is not None:
                held.pages[window].append(self._own(held, window, part))
                part = None
            raw = as_bytes(tokens[: PAGE * len(found.keys)]) if None in there else b""
            missing = [(first + i, Content(found.keys[first + i - 1] if first + i else ROOT,
                                           raw[PAGE_BYTES * (first + i) : PAGE_BYTES * (first + i + 1)]))
                       for i, p in enumerate(there) if p is None]  # fmt: skip
            if part is not None:
                missing.append((len(found.keys), part))
                held.pages[window].append(GIVEN_BACK)
            for at, content in missing:
                page = held.pages[window][at] = self._take(window)
                held.awaited.append(Awaited(window, at, page, content))
        held.awaited.sort(key=lambda a: a.at)
        if held.awaited:
            held.unsure = held.awaited[0].at
        return held

    def arrived(self, held: Held) -> None:
        """The first of what a sequence awaits is there; when all is, it can be read on."""
        a = held.awaited.pop(0)
        if a.at < len(held.keys):  # one that is not full is written to now
            self.names.give(a.window, a.page, a.content, held.keys[a.at])
        held.unsure = held.awaited[0].at if held.awaited else None

    def hold(self, window: int, page: int) -> None:
        """Nobody else is to write to a page, whoever has it, until it is let `go`."""
        self._pools[window].pin(page)

    def go(self, window: int, page: int) -> None:
        self._pools[window].unpin(page)
        self._pools[window].release(page, self.names.content(window, page) is not None)

    def is_kept(self, window: int, page: int) -> bool:
        """Whether a page that nobody holds stays for those to come."""
        return self._pools[window].kept(page)

    def n_shared(self, tokens: Sequence[int]) -> int:
        """Tokens of a sequence that would not have to be read."""
        return self._find(tokens).n

    def fork(self, held: Held) -> Held:
        """Another sequence with the same past. Pages are copied when one of the two writes to them."""
        twin = Held(held.n_past, held.n_past, {}, held.slot, None, list(held.keys))
        for window, pages in held.pages.items():
            twin.pages[window] = [p if p == GIVEN_BACK else self._pools[window].share(p) for p in pages]
        if held.slot != ZERO_SLOT:
            self._slots.share(held.slot)
        self._held.add(twin)
        if held.copies or held.awaited:
            self.rewind(twin, PAGE * (held.awaited[0].at if held.awaited else len(held.keys)))
        return twin

    def release(self, held: Held) -> None:
        """A sequence has ended: what it holds alone is free, and kept as far as it has a name."""
        self._held.remove(held)
        self._drop_copies(held)
        for window, pages in held.pages.items():
            self._give_back(window, pages if window else reversed(pages))  # the end is of no use without the beginning
        self._drop_states(held)
        held.pages, held.keys, held.n_past, held.awaited = {}, [], 0, []

    def rewind(self, held: Held, n_tokens: int) -> int:
        """Go back to `n_tokens`, or as far as what is kept allows. Returns: how many tokens are still read."""
        n = min(n_tokens, held.n_past)
        if held.unsure is not None:
            n = min(n, PAGE * held.unsure)
        held.awaited = []
        if self.room.n_slots and n < held.n_past:
            n = held.snapshot[1] if held.snapshot is not None and held.snapshot[1] <= n else 0
            if n and held.snapshot is not None:
                self._let_go(held.slot)
                held.slot = self._slots.share(held.snapshot[0])
        for window, pages in held.pages.items():
            if GIVEN_BACK in pages[self._first_seen(window, n) : -(-n // PAGE)]:
                n = 0
        if not n:
            self._drop_states(held)
        if n <= PAGE * len(held.keys):
            self._drop_copies(held)
        for window, pages in held.pages.items():
            keep = -(-n // PAGE)
            self._give_back(window, pages[keep:])
            del pages[keep:]
        del held.keys[n // PAGE :]
        held.n_past, held.reads_from, held.unsure = n, n, None
        return n

    def note_read(self, held: Held, tokens: Sequence[int], n_tokens: int, part: bool = False) -> None:
        """The device has read the first `n_tokens` of a sequence: its full pages can be shared.

        part: the last one too, which is not full.
        """
        for i in range(len(held.keys), n_tokens // PAGE):
            content = Content(held.keys[-1] if held.keys else ROOT, as_bytes(tokens[PAGE * i : PAGE * (i + 1)]))
            held.keys.append(content.name)
            self._name(held, i, content)
        n_full = n_tokens // PAGE
        if part and n_tokens % PAGE and not held.copies and held.unsure is None:
            before = held.keys[n_full - 1] if n_full else ROOT
            self._name(held, n_full, Content(before, as_bytes(tokens[PAGE * n_full : n_tokens])))

    def forget(self, but: Collection[Held] = ()) -> None:
        """Devices have lost what they held: all sequences begin again, save some, and nothing is kept."""
        for held in self._held:
            if held not in but:
                self.rewind(held, 0)
        self.drop_kept()

    def is_whole(self, held: Held) -> bool:
        """Whether a sequence has all pages from its first token on, so that they can be filled anew where they lie."""
        return not self.room.n_slots and not any(GIVEN_BACK in pages for pages in held.pages.values())

    def used_bytes(self, memory: LayerMemory) -> list[tuple[int, int]]:
        """Where in a layer's memory something lies that is held or kept: offsets and lengths."""
        if isinstance(memory.keeps, Cells):
            spans = [s for page in self._pools[memory.keeps.window].used() for s in memory.page_bytes(page)]
        elif memory.keeps is not None:
            spans = [s for slot in self._slots.used() for s in memory.slot_bytes(slot)]
        else:
            spans = []
        out: list[tuple[int, int]] = []
        for at, n in sorted(spans):
            if out and sum(out[-1]) == at:
                at, n = out[-1][0], out.pop()[1] + n
            out.append((at, n))
        return out

    def drop_kept(self) -> None:
        """Nothing is kept, and what sequences hold is not shared with those to come."""
        self.names.clear()
        for pool in self._pools.values():
            pool.forget()

    # -- cells -----------------------------------------------------------------------------------------------------------

    def grow(self, held: Held, n_tokens: int) -> list[PageCopy] | None:
        """Have cells for the tokens from n_past to `n_tokens`, which will be read next.

        Returns: what must be copied first, before anything else is written; None, and nothing has changed, when there is no
        room.
        """
        held.reads_from = held.n_past
        if self._pools and n_tokens <= held.n_past:
            return []
        writes = range(held.n_past // PAGE, -(-n_tokens // PAGE))
        for window, pool in self._pools.items():
            pages = held.pages[window]
            need = sum(i >= len(pages) or self._must_copy(window, pages[i], held.n_past - PAGE * i) for i in writes)
            if need > pool.n_free:
                self._reclaim(window, need)
            if need > pool.n_free:
                return None
        copies, begun = [], held.copies
        for window, pool in self._pools.items():
            pages = held.pages[window]
            for i in writes:
                if i >= len(pages):
                    pages.append(self._take(window))
                elif self._must_copy(window, pages[i], held.n_past - PAGE * i):
                    old, pages[i] = pages[i], self._take(window)
                    self._give_back(window, [old])
                    copies.append(PageCopy(window, old, pages[i]))
                else:
                    content = self.names.content(window, pages[i])
                    if content is not None and content.n > held.n_past - PAGE * i:
                        self.names.drop(window, pages[i])
        if begun or copies:
            held.unsure = writes.start
        self._drop_copies(held)
        return begun + copies

    def has_slot(self, held: Held) -> bool:
        """Whether `next_slot` has room. Snapshots are given up where slots are short."""
        if held.slot != ZERO_SLOT and not self._slots.shared(held.slot):
            return True
        if not self._slots.n_free:
            self._drop_snapshots()
        return self._slots.n_free > 0 or (held.slot != ZERO_SLOT and not self._slots.shared(held.slot))

    def next_slot(self, held: Held) -> tuple[int, int] | None:
        """Where the next batch reads a sequence's state, and where it writes it. A state that others hold stays as it is.

        Returns: None, and nothing has changed, when there is no room.
        """
        if not self.has_slot(held):
            return None
        read = held.slot
        if read == ZERO_SLOT or self._slots.shared(read):
            held.slot = self._slots.take()
            self._let_go(read)
        return read, held.slot

    def snap(self, held: Held) -> None:
        """Keep the state as it is now, so that the sequence can be rewound to here."""
        if self.room.n_slots and held.slot != ZERO_SLOT:
            if held.snapshot is not None:
                self._let_go(held.snapshot[0])
            held.snapshot = self._slots.share(held.slot), held.n_past

    # -- inside --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _first_seen(window: int, n_past: int) -> int:
        """The first page of which the token behind `n_past` sees something."""
        return max(0, n_past + 1 - window) // PAGE if window else 0

    def _find(self, tokens: Sequence[int], parts: bool = True, elsewhere: Elsewhere | None = None) -> Found:
        """The longest beginning, with one token left, that is there in every window's layers. parts: of pages too."""
        if self.room.n_slots or (not len(self.names) and elsewhere is None):  # a state is not made of pages
            return Found([], 0)
        raw = as_bytes(tokens)[: TOKEN_BYTES * (len(tokens) - 1)]
        keys, before = list[bytes](), ROOT
        windows = tuple(self._pools)

        def is_there(window: int, name: bytes) -> bool:
            return self.names.page(window, name) is not None or (elsewhere is not None and elsewhere.has(window, name))

        unbroken = {window: [0] for window in windows}  # pages in a row that are there, up to each
        for at in range(0, len(raw) - PAGE_BYTES + 1, PAGE_BYTES):
            before = name_of(before, raw[at : at + PAGE_BYTES])
            there = {window: is_there(window, before) for window in windows}
            if not any(there.values()) or not there.get(0, True):
                break
            keys.append(before)
            for window in windows:
                unbroken[window].append(unbroken[window][-1] + 1 if there[window] else 0)
        for d in range(len(keys), -1, -1):

            def is_seen(n: int, d: int = d) -> bool:
                return all(unbroken[w][d] >= d - self._first_seen(w, n) for w in windows)

            rest = raw[PAGE_BYTES * d : PAGE_BYTES * (d + 1)]
            for content, n in self._near(keys[d - 1] if d else ROOT, rest, elsewhere) if parts and rest else ():
                name, n_past = content.name, PAGE * d + n
                if n < PAGE and is_seen(n_past) and all(is_there(w, name) for w in windows):
                    return Found(keys[:d], n_past, content)
            if is_seen(PAGE * d):
                return Found(keys[:d], PAGE * d)
        return Found([], 0)

    def _near(self, before: bytes, tokens: bytes, elsewhere: Elsewhere | None) -> Iterable[tuple[Content, int]]:
        """Pages that begin as `tokens`, the most alike first, of several those that are here."""
        here = self.names.near(before, tokens)
        return here if elsewhere is None else sorted([*here, *elsewhere.near(before, tokens)], key=lambda near: -near[1])

    def _page(self, window: int, name: bytes) -> int:
        page = self.names.page(window, name)
        assert page is not None  # it was found
        return page

    def _has_room(self, found: Found) -> bool:
        """Whether a sequence can have pages for what is not here, and one of its own to write to, or the very page."""
        for window, pool in self._pools.items():
            seen = [self.names.page(window, key) for key in found.keys[self._first_seen(window, found.n) :]]
            n_free = pool.n_free - sum(page is not None and pool.kept(page) for page in seen)
            n_missing = seen.count(None)
            if n_missing and found.part is not None and self.names.page(window, found.part.name) is not None:
                n_missing += 1  # what is copied is held meanwhile
            if n_free < 1 + n_missing:
                return False
        return True

    def _own(self, held: Held, window: int, content: Content) -> int:
        """A page to write to behind what it has in common with a named one: that one, if nobody else wants it."""
        pool, page = self._pools[window], self._page(window, content.name)
        n = held.n_past % PAGE
        if pool.kept(page) and (content.n == n or pool.n_free == 1):
            if content.n > n:
                self.names.drop(window, page)
            return pool.share(page)
        pool.pin(page)
        target = self._take(window)
        held.copies.append(PageCopy(window, page, target))
        return target

    def _drop_copies(self, held: Held) -> None:
        """What was to be copied is on its way, or not wanted any more."""
        for c in held.copies:
            self._pools[c.window].unpin(c.source)
            self._give_back(c.window, [c.source])
        held.copies = []

    def _must_copy(self, window: int, page: int, n_kept: int) -> bool:
        """Whether a page that a sequence has must stay as it is when it writes behind the first `n_kept` cells."""
        pool = self._pools[window]
        content = self.names.content(window, page)
        return pool.shared(page) or (pool.pinned(page) and content is not None and content.n > n_kept)

    def _take(self, window: int) -> int:
        page = self._pools[window].take()
        self.names.drop(window, page)
        return page

    def _name(self, held: Held, i: int, content: Content) -> None:
        """Name the i-th page of a sequence in each window's layers."""
        name = content.name
        for window, pages in held.pages.items():
            if pages[i] != GIVEN_BACK and self.names.give(window, pages[i], content, name) and content.n == PAGE:
                self.on_worth(window, pages[i])

    def _reclaim(self, window: int, wanted: int) -> None:
        """Give back pages that no sequence sees any more, until so many are free."""
        if not window:
            return
        pool = self._pools[window]
        for held in self._held:
            pages = held.pages[window]
            for i in range(min(len(pages), self._first_seen(window, held.reads_from))):
                if pool.n_free >= wanted:
                    return
                if pages[i] != GIVEN_BACK:
                    self._give_back(window, [pages[i]])
                    pages[i] = GIVEN_BACK

    def _give_back(self, window: int, pages: Iterable[int]) -> None:
        for page in pages:
            if page != GIVEN_BACK:
                content = self.names.content(window, page)
                self._pools[window].release(page, content is not None)
                if self._pools[window].kept(page):
                    self.on_worth(window, page)

    def _let_go(self, slot: int) -> None:
        if slot != ZERO_SLOT:
            self._slots.release(slot)

    def _drop_snapshots(self) -> None:
        for held in self._held:
            if held.snapshot is not None:
                self._let_go(held.snapshot[0])
                held.snapshot = None

    def _drop_states(self, held: Held) -> None:
        self._let_go(held.slot)
        if held.snapshot is not None:
            self._let_go(held.snapshot[0])
        held.slot, held.snapshot = ZERO_SLOT, None
