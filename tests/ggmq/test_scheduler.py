"""The scheduler by rules: sequences join and leave, batches are lost, and each has the tokens that it has alone.

Stands in for the stages: a dictionary of cells that hold a hash of all tokens up to their own, written when a batch is sent,
since stages compute in order. What a token sees must be its own past.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ggmq.archs.memory import PAGE, Room
from ggmq.pages import Store
from ggmq.sampling import Sampler, SamplingParams
from ggmq.scheduler import Piece, Scheduler, Sequence, Step

WINDOW = 90
N_CTX = 640
N_SEQ = 12
GREEDY = SamplingParams(temperature=0)


def next_token(past: tuple[int, ...]) -> int:
    return (7 * past[-1] + 3 * past[len(past) // 2] + len(past)) % 5


def alone(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tuple(tokens)))
    return tokens[len(prompt) :]


@dataclass
class Ground:
    """Some stages' worth of batches under way over a memory that is too small for all sequences."""

    n_stages: int
    room: Room = field(default_factory=lambda: Room({0: 26, WINDOW: 22}))
    cells: dict[tuple[int, int], int] = field(default_factory=dict)
    pasts: dict[Sequence, list[int]] = field(default_factory=dict)
    under_way: deque[Step] = field(default_factory=deque)
    wanted: dict[Sequence, list[int]] = field(default_factory=dict)
    n_joined: int = 0
    n_left: int = 0
    most_running: int = 0
    guesser: random.Random | None = None
    n_copies: int = 0
    n_cached: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(Store(self.room), N_CTX, self.n_stages, 128, N_SEQ)
        if self.guesser is not None:
            self.scheduler.draft = self.guess

    def guess(self, sequences: list[Sequence]) -> list[list[int]]:
        """Drafts of all lengths, right and wrong."""
        assert self.guesser is not None
        out = []
        for s in sequences:
            tokens = list(s.tokens)
            for _ in range(self.guesser.choice([0, 1, 3, 7, 13])):
                tokens.append(next_token(tuple(tokens)) if self.guesser.random() < 0.8 else self.guesser.randrange(5))
            out.append(tokens[len(s.tokens) :][: N_CTX - len(s.tokens)])
        return out

    def join(self, prompt: list[int], n: int) -> None:
        s = Sequence(prompt, Sampler(GREEDY), n)
        self.scheduler.add(s)
        self.wanted[s] = alone(prompt, n)
        self.n_joined += 1

    def leave(self, rng: random.Random) -> None:
        if self.wanted:
            s = rng.choice(list(self.wanted))
            self.scheduler.leave(s)
            del self.wanted[s]
            self.n_left += 1

    def past(self, p: Piece) -> list[int]:
        """A hash of all tokens up to each."""
        past = self.pasts.setdefault(p.sequence, [])
        for token in p.sequence.tokens[len(past) :]:
            past.append(hash((past[-1] if past else 0, token)))
        past = past[: p.first + p.n_sure]
        for token in p.drafted:
            past.append(hash((past[-1], token)))
        return past

    def send(self) -> bool:
        if len(self.under_way) >= 2 * self.n_stages or (step := self.scheduler.next()) is None:
            return False
        for c in step.copies:
            self.n_copies += 1
            for i in range(PAGE):
                self.cells[c.window, PAGE * c.target + i] = self.cells.get((c.window, PAGE * c.source + i), 0)
        assert len(self.scheduler.running) <= N_SEQ
        assert 0 < step.n_tokens <= 128 and len({id(p.sequence) for p in step.pieces}) == len(step.pieces)
        for p in step.pieces:
            s = p.sequence
            assert s.held is not None and p.first + p.n_sure <= len(s.tokens) and p.first + p.n <= N_CTX
            past = self.past(p)
            for window, pages in s.held.pages.items():
                for at in range(p.first, p.first + p.n):
                    self.cells[window, PAGE * pages[at // PAGE] + at % PAGE] = past[at]
        for p in step.pieces:  # a batch writes all its cells before it reads any
            past, pages_of = self.past(p), p.sequence.held.pages if p.sequence.held is not None else {}
            for window, pages in pages_of.items():
                for at in range(max(0, p.first + 1 - window) if window else 0, p.first + p.n):
                    assert self.cells[window, PAGE * pages[at // PAGE] + at % PAGE] == past[at]
        self.under_way.append(step)
        self.most_running = max(self.most_running, len(self.scheduler.running))
        return True

    def take(self) -> None:
        """The oldest batch comes back."""
        if not self.under_way:
            return
        step = self.under_way.popleft()
        self.scheduler.read(step)
        for p in step.pieces:
            s = p.sequence
            if p.outputs and not s.finished:
                assert p.first + p.n_sure == len(s.tokens)
                n_right = -1
                for guess in (*p.drafted, None):
                    s.tokens.append(next_token(tuple(s.tokens)))
                    n_right += 1
                    if s.n_made == s.n_predict or s.tokens[-1] != guess:
                        break
                self.scheduler.settle(p, n_right)
                assert s.held is not None and s.held.n_past == s.n_read == len(s.tokens) - 1, "no page was lost"
                if s.n_made == s.n_predict:
                    self.scheduler.leave(s, "limit")
                    assert s.tokens[s.n_prompt :] == self.wanted.pop(s)
                    self.n_cached += s.n_cached
                    self.n_left += 1

    def lose(self, held: bool) -> None:
        """A worker was silent: what was under way is lost, and all that was read too, unless the stages held it."""
        self.under_way.clear()
        if not held:
            self.cells.clear()
        self.scheduler.begin_again(held)

    def end(self) -> None:
        n_steps = 0
        while self.wanted:
            while self.send():
                pass
            assert self.under_way, "everyone waits, and nothing is under way"
            self.take()
            n_steps += 1
            assert n_steps < 100_000, "nobody comes to an end"
        while self.under_way:
            self.take()
        store = self.scheduler.store
        assert store.n_free == {w: n - 1 for w, n in self.room.n_pages.items()}
        assert not self.scheduler.running and not self.scheduler.waiting


def prompt_of(rng: random.Random) -> list[int]:
    """Of a few beginnings, so that pages are shared."""
    which, n = rng.randrange(3), rng.choice([1, 2, 40, 64, 65, 128, 200, 400])
    return [(which + i // 50) % 5 for i in range(n)] + [rng.randrange(5) for _ in range(rng.randrange(3))]


def play(ground: Ground, rng: random.Random, n_joins: int, longest: int) -> None:
    """So many join, each for less than `longest` tokens, leave, and lose what they had, at random; then all have ended."""
    while ground.n_joined < n_joins:
        match rng.randrange(40):
            case 0 | 1 | 2:
                if len(ground.wanted) < 12:
                    ground.join(prompt_of(rng), rng.randrange(1, longest))
            case 3:
                if rng.random() < 0.3:
                    ground.leave(rng)
            case 4:
                if rng.random() < 0.05:
                    ground.lose(rng.random() < 0.7)
            case n if n < 22:
                ground.send()
            case _:
                ground.take()
        if not ground.wanted:
            ground.join(prompt_of(rng), rng.randrange(1, longest))
    ground.end()


@pytest.mark.parametrize("n_stages", [1, 2, 3])
@settings(max_examples=3, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.integers(0, 1 << 32))
def test_a_thousand_join_and_leave_and_each_has_its_own_tokens(n_stages: int, seed: int) -> None:
    ground, rng = Ground(n_stages), random.Random(seed)
    play(ground, rng, 1000, 60)
    assert ground.n_left == ground.n_joined and ground.most_running > 3
    assert ground.n_copies and ground.n_cached > 1000


@pytest.mark.parametrize("n_stages", [1, 2])
@settings(max_examples=3, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.integers(0, 1 << 32))
def test_drafts_right_and_wrong_change_no_token_and_lose_no_page(n_stages: int, seed: int) -> None:
    rng = random.Random(seed)
    ground = Ground(n_stages, guesser=random.Random(seed))
    play(ground, rng, 150, 200)


@pytest.mark.parametrize("n_stages", [1, 3])
def test_tokens_of_others_come_between_the_pieces_of_a_long_prompt(n_stages: int) -> None:
    ground = Ground(n_stages, Room({0: 60}))
    ground.scheduler.n_turn = 64
    ground.join([1, 2, 3], 200)
    while not any(s.n_made for s in ground.wanted):
        ground.send()
        ground.take()
    ground.join([i % 5 for i in range(600)], 3)
    kinds = []
    while len(ground.wanted) == 2:
        while ground.send():
            kinds.append(ground.under_way[-1].decodes)
        ground.take()
    runs = "".join("d" if decodes else "p" for decodes in kinds).strip("d").split("d")
    assert kinds.count(False) == 10 and max(map(len, runs)) <= 2 * n_stages - 1, "never more than are under way at once"
    ground.end()


def test_sequences_are_spread_over_as_many_batches_as_there_are_stages() -> None:
    ground = Ground(3, Room({0: 60}))
    for i in range(12):
        ground.join([i % 5] * (1 + i), 40)
    sizes = []
    while len(ground.wanted) == 12:
        while ground.send():
            step = ground.under_way[-1]
            sizes.append(len(step.pieces) if step.decodes else 0)
        ground.take()
    assert sizes[-20:] == [4] * 20
    ground.end()
