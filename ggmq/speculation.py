"""Drafts: several tokens are checked in one pass, and the text is the one without them.

A drafter guesses what comes next, from what the text has had before or with a small model. A pass then has the last true
token and the guesses behind it; behind each the sequence's own sampler picks as ever, and what was guessed counts as long as
it is what is picked. A token's bits do not depend on its company, so nothing else changes than how many passes there are.

How many tokens are drafted follows from measurements: how long a pass of so many takes, and how often drafts of this kind
were right. Guesses by lookup cost nothing, so they are made and compared with the text even while none is sent.

Nothing here knows a device. Source: Leviathan et al., Chen et al. (speculative sampling); Saxena (prompt lookup).

Threads: use from one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

Mode = Literal["auto", "ngram", "draft", "off"]
"""`auto`: drafts of every kind that there is, where they win; `ngram`, `draft`: always those; `off`: none."""

SIZES = (4, 8, 14)
"""Tokens that a sequence may have in a pass, besides one: few, since each size is a graph of its own."""
MAX_PASS = 16
"""Tokens of a pass with drafts, of all sequences; above it a pass costs more than what it can bring."""
ALWAYS = 8
"""The size where nothing is measured."""
MARGIN = 1.03
"""So much sooner the text must come for drafts to be sent."""
SURE = 1.5
"""So many times the tokens a second are expected of drafts whose sequence has lost by them."""
N_TIMES = 5
SLOPE = 0.1
"""What a token adds to a pass whose size was never timed, in parts of a pass of one."""
STALE = 512
"""Passes after which a time that was not measured again is forgotten."""
PUTS = 10
"""Passes that a graph takes to be put, until it was measured."""
FADE, WEIGHT = 0.95, 2.0
"""What counts of an older trial, and how many trials a first guess stands for."""


class Odds:
    """How often drafts of a kind are right, by depth.

    Attributes:
        expected: tokens that a pass of each of SIZES makes.
    """

    __slots__ = ("_right", "_tried", "expected")

    def __init__(self, guess: float) -> None:
        self._tried = [WEIGHT] * (SIZES[-1] - 1)
        self._right = [WEIGHT * guess] * (SIZES[-1] - 1)
        self.expected: tuple[float, ...] = ()
        self._sum()

    def note(self, n_right: int, n: int) -> None:
        """Of a draft of n tokens the first `n_right` were right."""
        tried, right = self._tried, self._right
        for i in range(n_right):
            tried[i] = FADE * tried[i] + 1
            right[i] = FADE * right[i] + 1
        if n_right < n:
            tried[n_right] = FADE * tried[n_right] + 1
            right[n_right] *= FADE
        self._sum()

    def _sum(self) -> None:
        total, alive, out, i = 1.0, 1.0, [], 0
        for size in SIZES:
            while i < size - 1:
                alive *= self._right[i] / self._tried[i]
                total += alive
                i += 1
            out.append(total)
        self.expected = tuple(out)


class Account:
    """What a sequence's drafts have brought so far, in passes without drafts. While it is in debt only those are sent that
    are almost sure, so a text loses little more than a pass with drafts and a small part of its length."""

    MOST, INCOME = 16.0, 0.01
    """What it may have at most, so that a text that has changed is noticed; and what each token adds."""

    def __init__(self) -> None:
        self.balance = self._cost = 0.0
        self._n = 0

    def spend(self, n_tokens: int, cost: float) -> None:
        """A draft of a text of so many tokens is sent; its pass takes so much longer."""
        self._n, self._cost = n_tokens, cost

    def follow(self, n_tokens: int) -> None:
        """So many tokens the text has now."""
        new = n_tokens - self._n if self._n else 0  # a prompt is no income
        if self._cost:
            self.balance += new - 1 - self._cost
        self.balance = min(self.MOST, self.balance + self.INCOME * new)
        self._n, self._cost = n_tokens, 0.0


class Drafter:
    """One sequence's drafts of one kind.

    Attributes:
        step_s: what another drafted token costs, in seconds; 0: nothing.
        account: what its drafts have brought.
    """

    step_s = 0.0

    def __init__(self) -> None:
        self.account = Account()

    def follow(self, tokens: Sequence[int]) -> Odds | None:
        """The text as it is now, which only grows. Returns: how good a draft would be; None: there is none to be had."""
        raise NotImplementedError

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """At most n tokens that may come next, of the text that was followed last."""
        raise NotImplementedError

    def begin(self) -> None:
        """Another text comes, which may begin as the one before."""
        self.account = Account()

    def close(self) -> None:
        """The sequence has ended."""


class NGram(Drafter):
    """Prompt lookup: what came after the same words before, in the prompt or in what was made.

    It follows the place that it has found as long as the text does, so what it knows of a match is its length. Where a text
    that was followed for long leaves its source by a token, the source is gone on with behind it: a value was changed.
    """

    LENGTHS = (8, 4, 2)
    """Words that are looked up, in tokens; the longest first."""
    SURE = 8
    """From this length on a match is kept, and its source worth coming back to."""
    N_STRAY = 4
    """Tokens in a row after which a source that was left is given up."""
    GUESSES = (0.2, 0.2, 0.5, 0.7, 0.85)
    """By the length of the match: 0 or 1, 2, 4, 8, 16."""

    def __init__(self) -> None:
        self._odds = [Odds(guess) for guess in self.GUESSES]
        self.begin()

    def begin(self) -> None:
        super().begin()
        self._n = 0
        self._places: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in self.LENGTHS}
        self._at = self._length = self._n_stray = 0
        self._trial: list[int] = []
        self._trial_odds = self._odds[0]
        self._n_right = 0

    def follow(self, tokens: Sequence[int]) -> Odds | None:
        if not self._n and tokens:
            self._read(list(tokens))
        for i in range(self._n, len(tokens)):
            self._take(tokens, i)
        self._n = len(tokens)
        if not self._trial and self._at:
            self._trial, self._n_right, self._trial_odds = self.draft(tokens, SIZES[-1] - 1), 0, self._kind()
        return self._kind() if self._at else None

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        if not self._at or n <= 0:
            return []
        found = list(tokens[self._at : min(self._at + n, len(tokens))])
        return (found * -(-n // len(found)))[:n]  # a text that runs into itself goes round

    def _kind(self) -> Odds:
        return self._odds[min(self._length.bit_length() - (self._length > 0), 4)]

    def _read(self, tokens: list[int]) -> None:
        """The prompt: what stands before each of its tokens."""
        for n, places in self._places.items():
            places.update(zip(zip(*(tokens[i:] for i in range(n)), strict=False), range(n, len(tokens)), strict=False))
        self._n = len(tokens)
        self._look_up(tokens, len(tokens), 1)

    def _take(self, tokens: Sequence[int], i: int) -> None:
        """The token at i has come."""
        token = tokens[i]
        if self._trial:
            right = self._trial[self._n_right] == token
            self._n_right += right
            if not right or self._n_right == len(self._trial):
                self._trial_odds.note(self._n_right, len(self._trial))
                self._trial = []
        for n, places in self._places.items():
            if i >= n:
                places[tuple(tokens[i - n : i])] = i
        if self._at and tokens[self._at] == token:
            self._at += 1
            self._length += 1
            if self._length >= self.SURE:
                self._n_stray = 0
            else:
                self._look_up(tokens, i + 1, max(self._length, 2 if self._n_stray else 1))
            return
        left, strays = self._at, self._n_stray + 1
        worth = bool(left) and (self._length >= self.SURE or self._n_stray > 0) and strays <= self.N_STRAY
        self._at = self._length = self._n_stray = 0
        if not self._look_up(tokens, i + 1, 2 if worth else 1) and worth:
            self._at, self._n_stray = left + 1, strays

    def _look_up(self, tokens: Sequence[int], end: int, beyond: int) -> bool:
        """Find the last place where the text before `end` stands with more than `beyond` tokens."""
        for n in self.LENGTHS:
            if n <= beyond:
                return False
            place = self._places[n].get(tuple(tokens[end - n : end])) if end >= n else None
            if place is not None:
                self._at, self._length, self._n_stray = place, n, 0
                return True
        return False


class Ask(NamedTuple):
    """A sequence that a pass will have a token of.

    Attributes:
        room: tokens that may be drafted, at most.
        wanted: those of them that may be of use.
    """

    drafters: Sequence[Drafter]
    tokens: Sequence[int]
    room: int
    wanted: int


DraftAll = Callable[[list[tuple[Drafter, Sequence[int], int]]], list[list[int]]]
"""Drafts of several sequences at once: of each so many tokens."""


def one_by_one(wanted: list[tuple[Drafter, Sequence[int], int]]) -> list[list[int]]:
    return [drafter.draft(tokens, n) for drafter, tokens, n in wanted]


class Speculation:
    """What is drafted for the next pass.

    draft_all: drafts for all of them at once, where that is cheaper.
    """

    N_PATIENT, MOST_PATIENT = 32, 1024
    """Passes after which a drafter that costs something is tried again; each time in vain twice as many."""

    def __init__(self, mode: Mode, draft_all: DraftAll = one_by_one) -> None:
        self.mode, self._draft_all = mode, draft_all
        self.times = PassTimes()
        self._known: set[tuple[int, ...]] = set()
        self._credit_s = 0.0
        self._n_since, self._patience = 0, self.N_PATIENT

    def drafts(self, asks: Sequence[Ask]) -> list[list[int]]:
        """What is drafted for each; empty where it does not pay."""
        most = next((size for size in reversed(SIZES) if size * len(asks) <= MAX_PASS), 0)
        out: list[list[int]] = [[] for _ in asks]
        if not most:
            return out
        offers: list[tuple[int, Drafter, Odds]] = []
        for i, ask in enumerate(asks):
            best: tuple[Drafter, Odds] | None = None
            for drafter in ask.drafters:
                odds = drafter.follow(ask.tokens)
                drafter.account.follow(len(ask.tokens))
                if odds is None or (drafter.account.balance < 0 and not self._sure(drafter, odds)):
                    continue
                if ask.room > 0 and (best is None or self._worth(drafter, odds) > self._worth(*best)):
                    best = drafter, odds
            if best is not None:
                offers.append((i, *best))
        if not offers:
            return out
        size = min(most, ALWAYS) if self.mode != "auto" else self._size(asks, offers, most)
        if size > 1:
            wanted = [(drafter, asks[i].tokens, min(size - 1, asks[i].room)) for i, drafter, _ in offers]
            for (i, _, _), drafted in zip(offers, self._draft_all(wanted), strict=True):
                out[i] = drafted
            self._charge(asks, offers, out)
        return out

    def _charge(self, asks: Sequence[Ask], offers: list[tuple[int, Drafter, Odds]], drafts: list[list[int]]) -> None:
        """Each sequence pays for its part of what the pass takes longer, and for what was drafted."""
        n_drafted, alone_s = sum(map(len, drafts)), self.times.of(len(asks))
        longer_s = self.times.of(len(asks) + n_drafted) - alone_s
        for i, drafter, _ in offers:
            if n := len(drafts[i]):
                cost_s = longer_s * n / n_drafted + drafter.step_s * n
                drafter.account.spend(len(asks[i].tokens), cost_s / alone_s if alone_s else 0.0)

    def took(self, n_tokens: int, seconds: float, is_new: bool) -> None:
        """A pass of so many tokens took so long. is_new: a graph had to be put for it."""
        self.times.note(n_tokens, seconds, is_new)

    def _worth(self, drafter: Drafter, odds: Odds) -> float:
        """Tokens a second of a sequence alone with these drafts; without times, tokens a pass."""
        return max(n / (self.times.of(size) + (size - 1) * drafter.step_s or 1.0)
                   for size, n in zip(SIZES, odds.expected, strict=True))  # fmt: skip

    def _sure(self, drafter: Drafter, odds: Odds) -> bool:
        """Whether drafts are so good that one that has lost may send them."""
        return self.mode != "auto" or self._worth(drafter, odds) * self.times.of(1) > SURE

    def _size(self, asks: Sequence[Ask], offers: list[tuple[int, Drafter, Odds]], most: int) -> int:
        """Tokens of a sequence in the pass that makes most of its time; 1: no drafts."""
        m, times = len(asks), self.times
        alone_s = times.of(m)
        if not alone_s:
            return 1
        costs = any(drafter.step_s for _, drafter, _ in offers)
        self._n_since += costs
        if costs and self._n_since > self._patience:
            self._n_since, self._patience = 0, min(2 * self._patience, self.MOST_PATIENT)
            return SIZES[0]
        longest = max(8, max(len(ask.tokens) for ask in asks).bit_length())  # graphs are made for 256 tokens, 512, 1024 ...
        best, best_known = (0.0, 1), (0.0, 1)  # seconds that a pass saves, and its size
        for k, size in enumerate(SIZES):
            if size > most:
                break
            made, n_tokens, step_s = float(m), m, 0.0
            for i, drafter, odds in offers:
                made += min(odds.expected[k], asks[i].wanted + 1) - 1
                n_tokens += min(size - 1, asks[i].room)
                step_s = max(step_s, drafter.step_s)
            saved = made / m * alone_s - MARGIN * (times.of(n_tokens) + (size - 1) * step_s)
            if saved > best[0]:
                best = saved, size
            if saved > best_known[0] and (m, n_tokens, longest) in self._known:
                best_known = saved, size
        if best[1] != best_known[1]:  # a graph is put when what it would have saved so far is what it costs
            self._credit_s += best[0] - best_known[0]
            if self._credit_s < times.put_s:
                best = best_known
            else:
                self._credit_s = 0.0
                n_tokens = m + sum(min(best[1] - 1, asks[i].room) for i, _, _ in offers)
                self._known.add((m, n_tokens, longest))
        if costs and best[1] > 1:
            self._n_since, self._patience = 0, self.N_PATIENT
        return best[1]


class PassTimes:
    """How long passes take, by their tokens; the median of the last few.

    Attributes:
        put_s: what a graph takes to be put.
    """

    def __init__(self) -> None:
        self._last: dict[int, deque[float]] = {}
        self._median: dict[int, float] = {}
        self._when: dict[int, int] = {}
        self._n = 0
        self._put_s = math.inf

    @property
    def put_s(self) -> float:
        if self._put_s < math.inf:
            return self._put_s
        return PUTS * min(self._median.values(), default=0.0)

    def note(self, n_tokens: int, seconds: float, is_new: bool) -> None:
        if is_new:
            self._put_s = min(self._put_s, seconds)
            return
        self._n += 1
        last = self._last.setdefault(n_tokens, deque(maxlen=N_TIMES))
        last.append(seconds)
        self._median[n_tokens] = sorted(last)[len(last) // 2]
        self._when[n_tokens] = self._n
        if not self._n % STALE:
            for n in [n for n, when in self._when.items() if when + STALE < self._n and n in SIZES]:
                del self._last[n], self._median[n], self._when[n]

    def of(self, n_tokens: int) -> float:
        """Seconds; 0 while nothing is known."""
        known = self._median.get(n_tokens)
        if known is None and self._median:
            near = max((n for n in self._median if n < n_tokens), default=min(self._median))
            known = self._median[near] + SLOPE * self._median[min(self._median)] * max(0, n_tokens - near)
        return known or 0.0
