"""Who holds which pages and slots of a model's memory: counted, shared by equal prefixes, copied on write, given back.

A sequence is a list of pages for each window, and a slot where its layers have states. Pages that nobody holds any more are
kept under their names until somebody needs the room, those that were held last the longest. Nothing here touches a device:
what must be copied there is told.

Threads: use from one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msgspec import Struct, field

from ggmq.archs.memory import N_RESERVED_SLOTS, PAGE, SCRAP_PAGE, ZERO_SLOT, Room
from ggmq.names import PAGE_BYTES, ROOT, TOKEN_BYTES, Content, Names, as_bytes, name_of

GIVEN_BACK = SCRAP_PAGE
"""Stands for a page that a windowed layer does not see any more."""


class Pool:
    """Numbers first..n - 1 that are lent out, each to as many as share it. Free ones may be kept: they are taken last."""

    def __init__(self, first: int, n: int) -> None:
        self._free = list(range(n - 1, first - 1, -1))
        self._kept: dict[int, None] = {}  # the first was held last the longest ago
        self._count: dict[int, int] = {}
        self._pins: dict[int, int] = {}

    @property
    def n_free(self) -> int:
        """Those that are kept among them."""
        return len(self._free) + len(self._kept)

    @property
    def n_kept(self) -> int:
        return len(self._kept)

    def kept(self, number: int) -> bool:
        return number in self._kept

    def take(self) -> int:
        """One that is free. Errors: IndexError when none is."""
        if self._free or not self._kept:
            number = self._free.pop()
        else:
            number = next(iter(self._kept))
            del self._kept[number]
        self._count[number] = 1
        return number

    def share(self, number: int) -> int:
        """One more holds it."""
        if number in self._kept:
            del self._kept[number]
        self._count[number] = self._count.get(number, 0) + 1
        return number

    def shared(self, number: int) -> bool:
        """Whether several hold it; those who only want to copy it do not count."""
        return self._count[number] - self._pins.get(number, 0) > 1

    def release(self, number: int, keep: bool = False) -> None:
        """One fewer holds it. keep: if nobody does, it is kept."""
        self._count[number] -= 1
        if not self._count[number]:
            del self._count[number]
            if keep:
                self._kept[number] = None
            else:
                self._free.append(number)

    def pin(self, number: int) -> None:
        """Hold it for a copy."""
        self.share(number)
        self._pins[number] = self._pins.get(number, 0) + 1

    def unpin(self, number: int) -> None:
        """It stays held: `release` follows."""
        self._pins[number] -= 1
        if not self._pins[number]:
            del self._pins[number]

    def pinned(self, number: int) -> bool:
        return number in self._pins

    def forget(self) -> None:
        """What is kept is only free."""
        self._free += self._kept
        self._kept.clear()


class PageCopy(Struct, frozen=True):
    """A page that must be copied before a sequence writes to it, in all layers with this window."""

    window: int
    source: int
    target: int


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
        unsure: its first page that was to be copied, while that is not known to have been done.
    """

    n_past: int = 0
    reads_from: int = 0
    pages: dict[int, list[int]] = field(default_factory=dict)
    slot: int = ZERO_SLOT
    snapshot: tuple[int, int] | None = None
    keys: list[bytes] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    unsure: int | None = None


class Found(NamedTuple):
    """The longest beginning of some tokens that is there: `n` tokens, in full pages and a part of another."""

    keys: list[bytes]
    n: int
    part: Content | None = None


class Store:
    """The pages and slots of a loaded model."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self._pools = {window: Pool(SCRAP_PAGE + 1, n) for window, n in room.n_pages.items()}
        self._slots = Pool(N_RESERVED_SLOTS, room.n_slots)
        self._held: set[Held] = set()
        self.names = Names()

    @property
    def n_free(self) -> dict[int, int]:
        """Free pages, by window."""
        return {window: pool.n_free for window, pool in self._pools.items()}

    @property
    def n_kept(self) -> dict[int, int]:
        """Those of the free pages whose content is kept, by window."""
        return {window: pool.n_kept for window, pool in self._pools.items()}

    @property
    def n_free_slots(self) -> int:
        return self._slots.n_free

    # -- sequences -----------------------------------------------------------------------------------------------------

    def begin(self, tokens: Sequence[int] = ()) -> Held:
        """A new sequence. It has what is there of the beginning of its tokens; one at least is left to be read. Of a page
        that it will write to it has a copy, see `grow`."""
        held = Held(pages={window: [] for window in self._pools})
        self._held.add(held)
        found = self._find(tokens)
        if found.part is not None and not self._has_room(found, found.part.name):
            found = self._find(tokens, parts=False)
        for window, pool in self._pools.items():
            first = self._first_seen(window, found.n)
            pages = held.pages[window] = [GIVEN_BACK] * first
            pages += [pool.share(self._page(window, k)) for k in found.keys[first:]]
        held.keys, held.n_past = found.keys, found.n
        held.reads_from = held.n_past
        if found.part is not None:
            for window, pages in held.pages.items():
                pages.append(self._own(held, window, found.part))
        return held

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
        if held.copies:
            self.rewind(twin, PAGE * len(held.keys))
        return twin

    def release(self, held: Held) -> None:
        """A sequence has ended: what it holds alone is free, and kept as far as it has a name."""
        self._held.remove(held)
        self._drop_copies(held)
        for window, pages in held.pages.items():
            self._give_back(window, pages if window else reversed(pages))  # the end is of no use without the beginning
        self._drop_states(held)
        held.pages, held.keys, held.n_past = {}, [], 0

    def rewind(self, held: Held, n_tokens: int) -> int:
        """Go back to `n_tokens`, or as far as what is kept allows. Returns: how many tokens are still read."""
        n = min(n_tokens, held.n_past)
        if held.unsure is not None:
            n = min(n, PAGE * held.unsure)
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

    def forget(self) -> None:
        """The device has lost what it held: all sequences begin again, and nothing is kept."""
        for held in self._held:
            self.rewind(held, 0)
        self.drop_kept()

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

    def _find(self, tokens: Sequence[int], parts: bool = True) -> Found:
        """The longest beginning, with one token left, that is there in every window's layers. parts: of pages too."""
        if self.room.n_slots or not len(self.names):  # a state is not made of pages
            return Found([], 0)
        raw = as_bytes(tokens)[: TOKEN_BYTES * (len(tokens) - 1)]
        keys, before = list[bytes](), ROOT
        windows = tuple(self._pools)
        unbroken = {window: [0] for window in windows}  # pages in a row that are there, up to each
        for at in range(0, len(raw) - PAGE_BYTES + 1, PAGE_BYTES):
            before = name_of(before, raw[at : at + PAGE_BYTES])
            there = [self.names.page(window, before) is not None for window in windows]
            if not any(there) or (0 in self._pools and self.names.page(0, before) is None):
                break
            keys.append(before)
            for window, is_there in zip(windows, there, strict=True):
                unbroken[window].append(unbroken[window][-1] + 1 if is_there else 0)
        for d in range(len(keys), -1, -1):

            def is_seen(n: int, d: int = d) -> bool:
                return all(unbroken[w][d] >= d - self._first_seen(w, n) for w in windows)

            rest = raw[PAGE_BYTES * d : PAGE_BYTES * (d + 1)]
            for content, n in self.names.near(keys[d - 1] if d else ROOT, rest) if parts and rest else ():
                name, n_past = content.name, PAGE * d + n
                if n < PAGE and is_seen(n_past) and all(self.names.page(w, name) is not None for w in windows):
                    return Found(keys[:d], n_past, content)
            if is_seen(PAGE * d):
                return Found(keys[:d], PAGE * d)
        return Found([], 0)

    def _page(self, window: int, name: bytes) -> int:
        page = self.names.page(window, name)
        assert page is not None  # it was found
        return page

    def _has_room(self, found: Found, part: bytes) -> bool:
        """Whether a sequence can have a page of its own for its part, or the very page."""
        for window, pool in self._pools.items():
            seen = found.keys[self._first_seen(window, found.n) :]
            n_free = pool.n_free - sum(pool.kept(self._page(window, key)) for key in seen)
            if n_free < 1:
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
            if pages[i] != GIVEN_BACK:
                self.names.give(window, pages[i], content, name)

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
                self._pools[window].release(page, self.names.content(window, page) is not None)

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
