"""Who holds which slots of states: by rules, against a device that remembers of which tokens each state was made."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ggmq.archs.memory import N_RESERVED_SLOTS, ZERO_SLOT, Room
from ggmq.pages import Held, Store

N_SLOTS = 5


class Slots(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = Store(Room({}, N_RESERVED_SLOTS + N_SLOTS))
        self.made_of: dict[int, tuple[int, ...]] = {ZERO_SLOT: ()}
        self.tokens: dict[Held, tuple[int, ...]] = {}
        self.n_read = 0

    def one(self, which: int) -> Held:
        return list(self.tokens)[which % len(self.tokens)]

    @rule()
    def begin(self) -> None:
        self.tokens[self.store.begin()] = ()

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 9), n=st.integers(1, 20))
    def read(self, which: int, n: int) -> None:
        held = self.one(which)
        assert self.store.grow(held, held.n_past + n) == []
        slots, before = self.store.next_slot(held), self.store.n_free_slots
        if slots is None:
            assert before == 0
            return
        read, write = slots
        assert self.made_of[read] == self.tokens[held] and write >= N_RESERVED_SLOTS
        self.tokens[held] += tuple(range(self.n_read, self.n_read + n))
        self.n_read += n
        self.made_of[write] = self.tokens[held]
        held.n_past += n

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 9))
    def snap(self, which: int) -> None:
        self.store.snap(self.one(which))

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 9), n=st.integers(0, 100))
    def rewind(self, which: int, n: int) -> None:
        held = self.one(which)
        kept = self.store.rewind(held, n)
        assert kept <= n and kept == held.n_past
        self.tokens[held] = self.tokens[held][:kept]

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        held = self.one(which)
        self.tokens[self.store.fork(held)] = self.tokens[held]

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        held = self.one(which)
        self.store.release(held)
        del self.tokens[held]

    @invariant()
    def each_state_is_of_its_sequence(self) -> None:
        for held, tokens in self.tokens.items():
            assert self.made_of[held.slot] == tokens
            if held.snapshot is not None:
                assert self.made_of[held.snapshot[0]] == tokens[: held.snapshot[1]]

    @invariant()
    def a_slot_is_free_when_nobody_has_it(self) -> None:
        used = {h.slot for h in self.tokens} | {h.snapshot[0] for h in self.tokens if h.snapshot is not None}
        assert self.store.n_free_slots == N_SLOTS - len(used - {ZERO_SLOT})


TestSlots = Slots.TestCase
