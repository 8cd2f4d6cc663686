"""Who holds which pages and slots of a model's memory: counted, shared by equal prefixes, copied on write, given back.

A sequence is a list of pages for each window, and a slot where its layers have states. Nothing here touches a device: what
must be copied there is told.

Threads: use from one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from msgspec import Struct, field

from ggmq.archs.memory import N_RESERVED_SLOTS, PAGE, SCRAP_PAGE, ZERO_SLOT, Room

GIVEN_BACK = SCRAP_PAGE
"""Stands for a page that a windowed layer does not see any more."""


class Pool:
    """Numbers first..n - 1 that are lent out, each to as many as share it."""

    def __init__(self, first: int, n: int) -> None:
        self._free = list(range(n - 1, first - 1, -1))
        self._count: dict[int, int] = {}

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """One that is free. Errors: IndexError when none is."""
        number = self._free.pop()
        self._count[number] = 1
        return number

    def share(self, number: int) -> int:
        """One more holds it."""
        self._count[number] += 1
        return number

    def shared(self, number: int) -> bool:
        return self._count[number] > 1

    def release(self, number: int) -> bool:
        """One fewer holds it. Returns: whether nobody does, so that it is free."""
        self._count[number] -= 1
        if self._count[number]:
            return False
        del self._count[number]
        self._free.append(number)
        return True


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
    """

    n_past: int = 0
    reads_from: int = 0
    pages: dict[int, list[int]] = field(default_factory=dict)
    slot: int = ZERO_SLOT
    snapshot: tuple[int, int] | None = None
    keys: list[bytes] = field(default_factory=list)


class Store:
    """The pages and slots of a loaded model."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self._pools = {window: Pool(SCRAP_PAGE + 1, n) for window, n in room.n_pages.items()}
        self._slots = Pool(N_RESERVED_SLOTS, room.n_slots)
        self._held: set[Held] = set()
        self._page_of: dict[tuple[int, bytes], int] = {}
        self._key_of: dict[tuple[int, int], bytes] = {}

    @property
    def n_free(self) -> dict[int, int]:
        """Free pages, by window."""
        return {window: pool.n_free for window, pool in self._pools.items()}

    @property
    def n_free_slots(self) -> int:
        return self._slots.n_free

    # -- sequences -----------------------------------------------------------------------------------------------------

    def begin(self, tokens: Sequence[int] = ()) -> Held:
        """A new sequence. It shares the pages of others whose tokens begin as its own; one token is left to be read."""
        held = Held(pages={window: [] for window in self._pools})
        self._held.add(held)
        keys = self._known(tokens)
        for window, pool in self._pools.items():
            first = self._first_seen(window, PAGE * len(keys))
            held.pages[window] = [GIVEN_BACK] * first + [pool.share(self._page_of[window, k]) for k in keys[first:]]
        held.keys, held.n_past = keys, PAGE * len(keys)
        held.reads_from = held.n_past
        return held

    def n_shared(self, tokens: Sequence[int]) -> int:
        """Tokens of a sequence that would not have to be read."""
        return PAGE * len(self._known(tokens))

    def fork(self, held: Held) -> Held:
        """Another sequence with the same past. Pages are copied when one of the two writes to them."""
        twin = Held(held.n_past, held.n_past, {}, held.slot, None, list(held.keys))
        for window, pages in held.pages.items():
            twin.pages[window] = [p if p == GIVEN_BACK else self._pools[window].share(p) for p in pages]
        if held.slot != ZERO_SLOT:
            self._slots.share(held.slot)
        self._held.add(twin)
        return twin

    def release(self, held: Held) -> None:
        """A sequence has ended: what it holds alone is free."""
        self._held.remove(held)
        for window, pages in held.pages.items():
            self._give_back(window, pages)
        self._drop_states(held)
        held.pages, held.keys, held.n_past = {}, [], 0

    def rewind(self, held: Held, n_tokens: int) -> int:
        """Go back to `n_tokens`, or as far as what is kept allows. Returns: how many tokens are still read."""
        n = min(n_tokens, held.n_past)
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
        for window, pages in held.pages.items():
            keep = -(-n // PAGE)
            self._give_back(window, pages[keep:])
            del pages[keep:]
        del held.keys[n // PAGE :]
        held.n_past = held.reads_from = n
        return n

    def note_read(self, held: Held, tokens: Sequence[int], n_tokens: int) -> None:
        """The device has read the first `n_tokens` of a sequence: its full pages can be shared."""
        for i in range(len(held.keys), n_tokens // PAGE):
            key = _key(held.keys[-1] if held.keys else b"", tokens[PAGE * i : PAGE * (i + 1)])
            held.keys.append(key)
            for window, pages in held.pages.items():
                if pages[i] != GIVEN_BACK and (window, key) not in self._page_of:
                    self._page_of[window, key] = pages[i]
                    self._key_of[window, pages[i]] = key

    # -- cells -----------------------------------------------------------------------------------------------------------

    def grow(self, held: Held, n_tokens: int) -> list[PageCopy] | None:
        """Have cells for the tokens from n_past to `n_tokens`, which will be read next.

        Returns: what must be copied first; None, and nothing has changed, when there is no room.
        """
        held.reads_from = held.n_past
        if self._pools and n_tokens <= held.n_past:
            return []
        writes = range(held.n_past // PAGE, -(-n_tokens // PAGE))
        for window, pool in self._pools.items():
            need = sum(i >= len(held.pages[window]) or pool.shared(held.pages[window][i]) for i in writes)
            if need > pool.n_free:
                self._reclaim(window, need)
            if need > pool.n_free:
                return None
        copies = []
        for window, pool in self._pools.items():
            pages = held.pages[window]
            for i in writes:
                if i >= len(pages):
                    pages.append(pool.take())
                elif pool.shared(pages[i]):
                    old, pages[i] = pages[i], pool.take()
                    pool.release(old)
                    copies.append(PageCopy(window, old, pages[i]))
                else:
                    self._forget(window, pages[i])
        return copies

    def next_slot(self, held: Held) -> tuple[int, int] | None:
        """Where the next batch reads a sequence's state, and where it writes it. A state that others hold stays as it is.

        Snapshots are given up where slots are short. Returns: None, and nothing has changed, when there is no room.
        """
        read = held.slot
        if read == ZERO_SLOT or self._slots.shared(read):
            if not self._slots.n_free:
                self._drop_snapshots()
            if read == ZERO_SLOT or self._slots.shared(read):
                if not self._slots.n_free:
                    return None
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

    def _known(self, tokens: Sequence[int]) -> list[bytes]:
        """Names of the longest beginning of full pages that are there in every window's layers."""
        if self.room.n_slots or not self._page_of:  # a state is not made of pages
            return []
        keys: list[bytes] = []
        good = 0
        for i in range((len(tokens) - 1) // PAGE):
            keys.append(_key(keys[-1] if keys else b"", tokens[PAGE * i : PAGE * (i + 1)]))
            if not any((window, keys[-1]) in self._page_of for window in self._pools):
                break
            if 0 in self._pools and (0, keys[-1]) not in self._page_of:
                break
            seen = ((w, k) for w in self._pools if w for k in keys[self._first_seen(w, PAGE * len(keys)) :])
            if all(place in self._page_of for place in seen):
                good = len(keys)
        return keys[:good]

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
            if page != GIVEN_BACK and self._pools[window].release(page):
                self._forget(window, page)

    def _forget(self, window: int, page: int) -> None:
        """A page will hold something else."""
        key = self._key_of.pop((window, page), None)
        if key is not None:
            del self._page_of[window, key]

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


def _key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page: of its tokens and of all before them."""
    return blake2b(before + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()
