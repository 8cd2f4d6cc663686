"""Who holds which pages: by rules, against a device that remembers what was written where (a stand-in: a dictionary)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ggmq.archs.memory import N_RESERVED_SLOTS, PAGE, SCRAP_PAGE, ZERO_SLOT, Cells, LayerMemory, Room, States, room_for
from ggmq.names import N_NEAR, ROOT, Content, Names, as_bytes, name_of
from ggmq.pages import GIVEN_BACK, Held, PageCopy, Store

WINDOW = 100
BEGINNINGS = [[b] * 400 for b in range(2)]
"""Sequences begin alike, so that they share."""


class Saved:
    """Pages that lie elsewhere (a stand-in: what they hold is known by their names)."""

    def __init__(self) -> None:
        self._names, self._n = Names(), 0

    def save(self, window: int, content: Content) -> None:
        self._n += 1
        self._names.give(window, self._n, content, content.name)

    def has(self, window: int, name: bytes) -> bool:
        return self._names.page(window, name) is not None

    def near(self, before: bytes, tokens: bytes) -> Iterator[tuple[Content, int]]:
        return self._names.near(before, tokens)


class Ground:
    """A store, and cells that hold all tokens up to their own: what a sequence sees must be its own past."""

    def __init__(self) -> None:
        self.store, self.saved = Store(Room({0: 24, WINDOW: 14}, 0)), Saved()
        self.worth = set[tuple[int, int]]()
        self.store.on_worth = lambda window, page: self.worth.add((window, page))
        self.cells: dict[tuple[int, int], tuple[int, ...]] = {}
        self.tokens: dict[Held, list[int]] = {}
        self.called: dict[bytes, tuple[int, ...]] = {ROOT: ()}

    def one(self, which: int) -> Held:
        return list(self.tokens)[which % len(self.tokens)]

    def begin(self, which: int, n: int, tail: int, elsewhere: bool = False) -> None:
        tokens = [*BEGINNINGS[which % len(BEGINNINGS)][:n], tail]
        n_here = self.store.n_shared(tokens)
        held = self.store.begin(tokens, self.saved if elsewhere else None)
        assert held.n_past < len(tokens) and (held.n_past > n_here if held.awaited else held.n_past <= n_here)
        self.tokens[held] = tokens
        self.check(held)

    def save(self) -> None:
        """What is worth it is kept elsewhere."""
        for window, page in self.worth:
            content = self.store.names.content(window, page)
            if content is not None and (content.n == PAGE or self.store.is_kept(window, page)):
                self.saved.save(window, content)
        self.worth.clear()

    def arrive(self, held: Held, n: int, fails: bool) -> None:
        """Some of what a sequence awaits comes; the rest perhaps not."""
        for a in held.awaited[:n]:
            assert held.pages[a.window][a.at] == a.page
            before = self.called[a.content.before]
            tokens = (*before, *np.frombuffer(a.content.tokens, "<i4").tolist())
            for i in range(a.content.n):
                self.cells[a.window, PAGE * a.page + i] = tokens[: len(before) + i + 1]
            self.store.arrived(held)
        if held.awaited and fails:
            assert self.store.rewind(held, held.n_past) == held.n_past and not held.awaited

    def read(self, held: Held, n: int, part: bool) -> None:
        if held.awaited:
            return
        tokens = self.tokens[held]
        last = min(len(tokens), held.n_past + n)
        before = {w: list(pages) for w, pages in held.pages.items()}
        copies = self.store.grow(held, last)
        if copies is None:
            for window, pages in before.items():  # nothing but what is not seen any more has changed
                assert all(a == b or b == GIVEN_BACK for a, b in zip(pages, held.pages[window], strict=True))
            return
        for c in copies:
            for i in range(PAGE):
                self.cells[c.window, PAGE * c.target + i] = self.cells.get((c.window, PAGE * c.source + i), ())
        for window, pages in held.pages.items():
            for position in range(held.n_past, last):
                at = PAGE * pages[position // PAGE] + position % PAGE
                self.cells[window, at] = tuple(tokens[: position + 1])
                assert at >= PAGE * (SCRAP_PAGE + 1)
        name = ROOT
        for i in range(0, last - PAGE + 1, PAGE):
            name = name_of(name, as_bytes(tokens[i : i + PAGE]))
            self.called[name] = tuple(tokens[: i + PAGE])
        held.n_past, held.unsure = last, None
        self.store.note_read(held, tokens, last, part=part)

    def rewind(self, held: Held, n: int, more: int, token: int) -> None:
        n = min(n, held.n_past, PAGE * held.unsure if held.unsure is not None else n)
        kept = self.store.rewind(held, n)
        assert kept in (0, n) and held.n_past == kept
        self.tokens[held] = [*self.tokens[held][:n], *[token] * (more + 1)]

    def fork(self, held: Held) -> None:
        twin = self.store.fork(held)
        self.tokens[twin] = [*self.tokens[held][: twin.n_past], 7]

    def leave(self, held: Held) -> None:
        self.store.note_read(held, self.tokens[held], 0 if held.awaited else held.n_past, part=True)
        self.store.release(held)
        del self.tokens[held]

    def check(self, held: Held) -> None:
        """What the next token sees is the sequence's own past."""
        tokens = self.tokens[held]
        source = {(c.window, c.target): c.source for c in held.copies}
        for window, pages in held.pages.items():
            first = max(0, held.n_past + 1 - window) if window else 0
            for position in range(first, held.n_past if held.unsure is None else PAGE * held.unsure):
                page = pages[position // PAGE]
                at = PAGE * source.get((window, page), page) + position % PAGE
                assert self.cells[window, at] == tuple(tokens[: position + 1])

    def check_all(self) -> None:
        for held in self.tokens:
            self.check(held)
        for window, n in self.store.room.n_pages.items():
            held_pages = Counter(p for h in self.tokens for p in h.pages[window] if p != GIVEN_BACK)
            held_pages.update(c.source for h in self.tokens for c in h.copies if c.window == window)
            pool = self.store._pools[window]
            assert pool._count == held_pages and self.store.n_free[window] == n - 1 - len(held_pages)
            assert not set(pool._kept) & (set(pool._free) | set(held_pages))
        self.check_names()

    def check_names(self) -> None:
        """A page holds what its name says, if it is held or kept, and no page that is free has one."""
        names = self.store.names
        for (window, page), content in names._content_of.items():
            assert names.page(window, content.name) == page and page not in self.store._pools[window]._free
            before = self.called[content.before]
            tokens = (*before, *np.frombuffer(content.tokens, "<i4").tolist())
            for i in range(len(before), len(tokens)):
                assert self.cells[window, PAGE * page + i % PAGE] == tokens[: i + 1]
        assert len(names._page_of) == len(names._content_of)
        assert sorted(names._n_windows) == sorted(name_of(b, t) for b, ts in names._shelf._behind.items() for t in ts)

    def end(self) -> None:
        for held in list(self.tokens):
            self.leave(held)
        assert self.store.n_free == {w: n - 1 for w, n in self.store.room.n_pages.items()}
        self.check_names()
        self.store.drop_kept()
        assert self.store.n_kept == dict.fromkeys(self.store.room.n_pages, 0) and not len(self.store.names)
        assert self.store.n_free == {w: n - 1 for w, n in self.store.room.n_pages.items()}


class Paged(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ground = Ground()

    @rule(which=st.integers(0, 1), n=st.integers(1, 399), tail=st.integers(0, 9), elsewhere=st.booleans())
    def begin(self, which: int, n: int, tail: int, elsewhere: bool) -> None:
        self.ground.begin(which, n, tail, elsewhere)

    @rule()
    def save(self) -> None:
        self.ground.save()

    @rule()
    def lose(self) -> None:
        self.ground.store.drop_kept()

    @precondition(lambda self: self.ground.tokens)
    @rule(which=st.integers(0, 9), n=st.integers(1, 9), fails=st.booleans())
    def arrive(self, which: int, n: int, fails: bool) -> None:
        self.ground.arrive(self.ground.one(which), n, fails)

    @precondition(lambda self: self.ground.tokens)
    @rule(which=st.integers(0, 9), n=st.integers(1, 150), part=st.booleans())
    def read(self, which: int, n: int, part: bool) -> None:
        self.ground.read(self.ground.one(which), n, part)

    @precondition(lambda self: self.ground.tokens)
    @rule(which=st.integers(0, 9), n=st.integers(0, 400), more=st.integers(0, 140), token=st.integers(0, 1))
    def rewind(self, which: int, n: int, more: int, token: int) -> None:
        self.ground.rewind(self.ground.one(which), n, more, token)

    @precondition(lambda self: self.ground.tokens)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        self.ground.fork(self.ground.one(which))

    @precondition(lambda self: self.ground.tokens)
    @rule(which=st.integers(0, 9))
    def leave(self, which: int) -> None:
        self.ground.leave(self.ground.one(which))

    @invariant()
    def all_is_counted_and_seen_right(self) -> None:
        self.ground.check_all()

    def teardown(self) -> None:
        self.ground.end()


TestPaged = Paged.TestCase


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 1 << 32))
def test_after_a_thousand_joins_and_leaves_every_page_is_free(seed: int) -> None:
    ground, rng, n_joins, n_leaves = Ground(), random.Random(seed), 0, 0
    while n_joins < 1000 or n_leaves < 1000:
        if len(ground.tokens) < 2 or (rng.random() < 0.25 and len(ground.tokens) < 9):
            ground.begin(rng.randrange(2), rng.randrange(1, 400), rng.randrange(3), rng.random() < 0.5)
            n_joins += 1
            continue
        held = ground.one(rng.randrange(9))
        match rng.randrange(11):
            case 0 | 1 | 2 | 3 | 4:
                ground.read(held, rng.randrange(1, 200), rng.random() < 0.3)
            case 5:
                ground.rewind(held, rng.randrange(400), rng.randrange(140), rng.randrange(2))
            case 6:
                ground.fork(held)
                n_joins += 1
            case 7:
                ground.save()
            case 8:
                ground.arrive(held, rng.randrange(1, 9), rng.random() < 0.2)
            case _:
                ground.leave(held)
                n_leaves += 1
        if rng.random() < 0.2:
            ground.check_all()
    ground.end()


def test_a_page_that_is_shared_is_held_once_and_copied_when_it_is_written_to() -> None:
    store = Store(Room({0: 10}))
    first = store.begin()
    assert store.grow(first, 100) == []
    first.n_past = 100
    twin = store.fork(first)
    assert store.n_free == {0: 7} and twin.pages == first.pages
    copies = store.grow(twin, 101)
    assert copies is not None and [(c.source, c.window) for c in copies] == [(first.pages[0][1], 0)]
    assert twin.pages[0][0] == first.pages[0][0] and twin.pages[0][1] == copies[0].target != first.pages[0][1]
    assert store.grow(first, 101) == [], "it has that page alone now"


def read(store: Store, tokens: list[int]) -> tuple[Held, int, list[PageCopy]]:
    """A sequence that has read its tokens, how many of them it did not have to, and what was copied."""
    held = store.begin(tokens)
    n, copies = held.n_past, store.grow(held, len(tokens))
    assert copies is not None
    held.n_past, held.unsure = len(tokens), None
    store.note_read(held, tokens, len(tokens), part=True)
    return held, n, copies


def test_what_a_sequence_has_read_stays_when_it_ends_and_is_found_token_by_token() -> None:
    store, tokens = Store(Room({0: 12})), [i % 50 for i in range(200)]
    first, n, _ = read(store, tokens)
    assert n == 0 and store.n_free == {0: 7}
    other, n, copies = read(store, [*tokens[:150], 99, 99])
    assert n == 150 and [c.source for c in copies] == [first.pages[0][2]], "also while the first goes on"
    assert other.pages[0][:2] == first.pages[0][:2]
    pages = list(first.pages[0])
    store.release(first)
    store.release(other)
    assert store.n_free == {0: 11} and store.n_kept == {0: 5}
    assert [store.n_shared(t) for t in (tokens, tokens[:5], [*tokens[:199], 99], [99, *tokens], [*tokens[:151], 1])] == [
        199, 4, 199, 0, 151]  # fmt: skip
    again, n, copies = read(store, [*tokens, 7])
    assert n == 200 and not copies and again.pages[0] == pages, "nobody else has its last page"
    store.release(again)
    whole, n, _ = read(store, [98] * 11 * PAGE)
    assert n == 0 and store.n_kept == {0: 0} and not store.n_shared(tokens), "others need the room"
    store.release(whole)
    assert store.n_shared([98] * 11 * PAGE) == 11 * PAGE - 1


def test_the_end_of_a_text_makes_room_before_its_beginning_and_old_texts_before_new_ones() -> None:
    store = Store(Room({0: 10}))
    texts = [[t] * 4 * PAGE for t in (1, 2)]
    for text in texts:
        store.release(read(store, text)[0])
    assert store.n_kept == {0: 8}
    store.release(read(store, [3] * 3 * PAGE)[0])
    assert [store.n_shared([*text, 0]) for text in texts] == [2 * PAGE, 4 * PAGE]


def test_a_page_that_somebody_will_copy_is_not_written_over() -> None:
    store, tokens = Store(Room({0: 9})), list(range(100))
    first, _, _ = read(store, tokens)
    second = store.begin([*tokens[:90], 7])
    assert store.rewind(first, 70) == 70
    copies, own = store.grow(first, 80), first.pages[0][1]
    assert copies is not None and [(c.source, c.target) for c in copies] == [(second.copies[0].source, own)]
    source = second.copies[0].source
    store.release(first)
    promised = store.grow(second, 91)
    assert promised is not None and [c.source for c in promised] == [source]
    store.release(second)
    assert store.n_free == {0: 8}


def test_with_one_page_left_a_sequence_takes_the_very_page_that_is_kept() -> None:
    store, tokens = Store(Room({0: 3})), list(range(100))
    store.release(read(store, tokens)[0])
    held, n, copies = read(store, [*tokens[:90], *range(10)])
    assert n == 90 and not copies and not store.n_kept[0]
    assert store.n_shared([*tokens[:95]]) == 90
    store.release(held)


def test_a_long_prompt_is_looked_up_in_little_work() -> None:
    """Among many that end in its last page; the neighbours in order are looked at, no others."""
    store, common = Store(Room({0: 2000})), [i % 90 for i in range(1000)]
    for i in range(1500):
        store.release(read(store, [*common, 100 + i, 5])[0])
    seen = list(store.names.near(store.begin([*common, 7]).keys[-1], as_bytes([*common[960:], 1077, 5, 5])))
    assert 0 < len(seen) <= N_NEAR and seen[0][1] == 42
    assert store.n_shared([*common, 1077, 5, 5]) == 1002


def test_a_state_is_never_overwritten_while_a_snapshot_is_kept() -> None:
    store = Store(Room({}, N_RESERVED_SLOTS + 4))
    held = store.begin()
    read, write = store.next_slot(held)
    assert read == ZERO_SLOT and write >= N_RESERVED_SLOTS
    held.n_past = 10
    assert store.next_slot(held) == (write, write), "in place while nobody else has it"
    store.snap(held)
    read, other = store.next_slot(held)
    assert read == write != other
    held.n_past = 15
    assert store.rewind(held, 12) == 10 and store.next_slot(held)[0] == write
    assert store.rewind(held, 9) == 0 and held.slot == ZERO_SLOT and store.n_free_slots == 4
    twin = store.fork(held)
    store.release(held)
    store.release(twin)
    assert store.n_free_slots == 4


def test_the_room_of_a_window_does_not_grow_with_the_context() -> None:
    layers = [Cells(64, 64, 32), Cells(64, 64, 32, 1000), None, States({"conv": 3, "ssm": 5})]
    small, large = room_for(layers, 8192, 4, 512), room_for(layers, 65536, 4, 512)
    assert small.n_pages[0] * 8 > large.n_pages[0] > small.n_pages[0] * 7
    assert small.n_pages[1000] == large.n_pages[1000] < 200
    assert small.n_slots == N_RESERVED_SLOTS + 8
    shared = room_for(layers, 8192, 4, 512, n_tokens=10_000)
    assert shared.n_pages == {0: 1 + 157, 1000: min(small.n_pages[1000], 1 + 157)} and shared.n_slots == small.n_slots
    assert room_for(layers, 8192, 4, 512, n_tokens=1).n_pages == {0: 129, 1000: small.n_pages[1000]}
    assert room_for(layers, 8192, 1, 512, n_tokens=4 * 8192) == small.__class__(small.n_pages, N_RESERVED_SLOTS + 2)
    memory = LayerMemory(layers[3], small, 1)
    assert [(n, at) for _, n, _, at in memory.parts().values()] == [(3, 0), (5, 128)] and memory.n_bytes == 128 + 256
    assert LayerMemory(None, small, 1).n_bytes == 0
