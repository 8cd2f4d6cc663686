"""What the stages compute next: which sequences, and how much of each. The one place that cuts prompts into pieces.

Sequences wait until there is room for them, then run. A batch is either one token of many sequences (decode) or pieces of
prompts, and the two take turns, so that nobody's tokens wait for the whole of another's prompt. Several batches may be under
way, so that every stage is busy; a sequence whose next token is not known yet is in none of those that follow.

Nothing here knows a clock or a device. Source: Yu et al. (Orca); Agrawal et al. (Sarathi) for prompts in pieces.

Threads: use from one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field

from ggmq.archs.memory import PAGE
from ggmq.pages import Elsewhere, Held, PageCopy, Store
from ggmq.sampling import Sampler
from ggmq.speculation import Drafter
from protocol.errors import FormatError

if TYPE_CHECKING:
    from ggmq.grammar import Constraint


class Sequence(Struct, eq=False):
    """One conversation's tokens, and what it holds in the memory of the stages.

    Attributes:
        tokens: the prompt and what was made of it.
        n_prompt: tokens of the prompt.
        n_predict: tokens to make at most; negative: no bound.
        all_logits: the logits of every token are wanted, and nothing is made.
        embed: the hidden states of all tokens are wanted, or that of the last, and nothing is made.
        rows: of what is wanted of a sequence that makes nothing, what has come.
        n_probs: the log-probability of each token that is made is wanted, with so many of the most likely; negative: not.
        constraint: what its text may be.
        n_cached: tokens that were there already when it first ran.
        n_read: tokens whose keys and values are there for certain; those up to `held.n_past` are on their way.
        held: what it holds while it runs.
        drafters: who guesses its tokens; none while nobody has.
        n_drafted, n_accepted: tokens that were guessed and checked, and those of them that were right.
        n_unsure: guessed tokens at the end of what is on its way.
        finished: why it has ended: `end` (of its own), `limit`, `context` (it is full), `left`; empty while it has not.
    """

    tokens: list[int]
    sampler: Sampler
    n_predict: int = -1
    all_logits: bool = False
    embed: Literal["", "hidden", "last"] = ""
    rows: npt.NDArray[np.float32] | None = None
    n_probs: int = -1
    constraint: Constraint | None = None
    n_prompt: int = 0
    n_cached: int = 0
    n_read: int = 0
    held: Held | None = None
    finished: str = ""
    n_under_way: int = 0
    drafters: list[Drafter] = field(default_factory=list)
    n_drafted: int = 0
    n_accepted: int = 0
    n_unsure: int = 0

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def n_made(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def is_read(self) -> bool:
        """Nothing is made of it."""
        return self.all_logits or self.embed != ""

    @property
    def is_read_whole(self) -> bool:
        """Something is wanted behind each of its tokens, so that none is taken from others."""
        return self.all_logits or self.embed == "hidden"

    @property
    def n_pending(self) -> int:
        """Tokens that no batch has yet."""
        return len(self.tokens) - (self.held.n_past - self.n_unsure if self.held is not None else 0)


class Piece(Struct, frozen=True):
    """Consecutive tokens of a sequence in a batch.

    Attributes:
        first, n: position of the first, and how many.
        outputs: how many of the last of them are followed by logits: none, 1, or all.
        slots: where the sequence's state is read from and written to; zeros where it has none.
        drafted: the last of them, where those are guesses; behind the token before them and each of them are logits.
    """

    sequence: Sequence
    first: int
    n: int
    outputs: int
    slots: tuple[int, int] = (0, 0)
    drafted: Tokens[int] = ()

    @property
    def n_sure(self) -> int:
        return self.n - len(self.drafted)


class Step(Struct):
    """A batch: pieces, and the pages that must be copied before it is computed."""

    pieces: list[Piece]
    copies: list[PageCopy] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return sum(p.n for p in self.pieces)

    @property
    def decodes(self) -> bool:
        """Whether each sequence has one token of its own in it, behind which another is made."""
        return all(p.n_sure == 1 and p.outputs for p in self.pieces)


class Bringer(Elsewhere, Protocol):
    """Brings pages from elsewhere."""

    def ready(self) -> bool:
        """Whether it knows by now what there is."""
        ...

    def bring(self, held: Held) -> bool:
        """Have brought what a sequence awaits. Returns: whether all that comes is there."""
        ...


class Scheduler:
    """Attributes:
    n_batch: tokens of prompts in a batch, at most.
    n_seq: sequences that run at once, at most.
    n_turn: the same while others wait for the stages, or their tokens would come late.
    draft: guesses what comes next, for each sequence of a decode.
    bringer: brings what was read of a prompt before; None: nothing is anywhere.
    """

    def __init__(self, store: Store, n_ctx: int, n_stages: int, n_batch: int, n_seq: int) -> None:
        self.store, self.n_ctx, self.n_stages, self.n_seq = store, n_ctx, n_stages, n_seq
        self.n_batch = self.n_turn = n_batch
        self.draft: Callable[[list[Sequence]], Tokens[Tokens[int]]] = lambda sequences: [()] * len(sequences)
        self.bringer: Bringer | None = None
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._even = store.room.n_slots > 0  # layers with states take as many tokens of each sequence
        self._decoded = False
        self._n_decoding = 0

    def add(self, sequence: Sequence) -> None:
        """Errors: FormatError for a prompt that is empty or does not fit."""
        if not sequence.tokens:
            raise FormatError("prompt: expected at least one token; give some text with -p")
        if len(sequence.tokens) >= self.n_ctx + sequence.is_read:
            raise FormatError(f"prompt: {len(sequence.tokens)} tokens do not fit a context of {self.n_ctx}; use a larger -c")
        self.waiting.append(sequence)

    def leave(self, sequence: Sequence, why: str = "left", keep: bool = False) -> None:
        """A sequence ends: its pages are free for others at once, since what is under way comes before theirs.

        keep: it still holds them, for one that goes on from there.
        """
        sequence.finished = sequence.finished or why
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if not keep:
            self.let_go(sequence)
            while sequence.drafters:
                sequence.drafters.pop().close()

    def let_go(self, sequence: Sequence) -> None:
        """A sequence gives up what it holds. What it has read stays there under its name while there is room."""
        if sequence.held is not None:
            self.store.note_read(sequence.held, sequence.tokens, sequence.n_read, part=True)
            self.store.release(sequence.held)
            sequence.held = None

    def next(self) -> Step | None:
        """The next batch, or None while there is nothing that could be computed."""
        for s in self.running:
            if s.held is not None:  # what was sent is computed before what comes now
                s.held.reads_from = s.held.n_past - s.n_unsure
        self._admit()
        decode = [s for s in self.running if s.n_pending == 1 and not s.is_read and s.n_read >= s.n_prompt - 1]
        prompts = [s for s in self.running if s.n_pending and s not in decode]
        step = None
        free = self._n_decoding < self.n_stages  # one for each stage: with more, they would never fill up
        if decode and free and (not prompts or not self._decoded):
            step = self._decode(decode)
        if step is None and prompts:
            step = self._prompts(prompts)
        if step is None and decode and free and self._decoded:
            step = self._decode(decode)
        if step is not None:
            self._decoded = step.decodes
            self._n_decoding += step.decodes
        return step

    def read(self, step: Step) -> None:
        """A batch has been computed."""
        self._n_decoding -= step.decodes
        for p in step.pieces:
            s = p.sequence
            s.n_under_way -= 1
            if s.held is not None:
                s.n_read, s.held.unsure = p.first + p.n_sure, None
                self.store.note_read(s.held, s.tokens, s.n_read, part=s.n_read == s.n_prompt)

    def settle(self, p: Piece, n_right: int) -> None:
        """So many of the drafted tokens of a piece were right; what was read of the others is forgotten."""
        s = p.sequence
        s.n_drafted, s.n_accepted = s.n_drafted + len(p.drafted), s.n_accepted + n_right
        if s.n_unsure and s.held is not None:
            s.n_read, s.n_unsure = p.first + p.n_sure + n_right, 0
            self.store.rewind(s.held, s.n_read)

    def begin_again(self, held: bool) -> None:
        """What was under way is lost. held: the stages still have what was read before."""
        self._n_decoding = 0
        if not held:
            self.store.forget()
        for s in (*self.running, *self.waiting):
            s.n_under_way = s.n_unsure = 0
            if s.held is not None:
                s.n_read = self.store.rewind(s.held, s.n_read)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let those run that wait, in order, while there is room for the beginning of each."""
        while self.waiting and len(self.running) < self.n_seq:
            s = self.waiting[0]
            if s.held is None:
                if self.bringer is not None and not self.bringer.ready():
                    return
                tokens = () if s.is_read_whole else s.tokens  # what is not read again has no logits
                common = max((n for other in self.running if (n := _in_common(s, other)) > other.n_read), default=0)
                if tokens and common and common > self.store.n_shared(tokens):
                    return  # another is reading the same beginning: it is read once
                short = any(n < 2 for n in self.store.n_free.values()) or (self._even and self.store.n_free_slots < 2)
                if short and self.running:
                    return
                s.held = self.store.begin(tokens, self.bringer)
            if s.held.awaited and self.bringer is not None and not self.bringer.bring(s.held):
                return
            s.n_read = s.held.n_past
            if not s.n_made:
                s.n_cached = s.n_read
            self.running.append(self.waiting.popleft())

    def _decode(self, sequences: list[Sequence]) -> Step | None:
        """A token of each, of as many as keep every stage busy."""
        n = -(-len([s for s in self.running if s.n_read >= s.n_prompt - 1]) // self.n_stages)
        step = Step([])
        chosen = sequences[:n]
        for s, drafted in zip(chosen, self.draft(chosen), strict=True):
            self._add(step, s, 1, make_room=True, drafted=drafted)
        return step if step.pieces else None

    def _prompts(self, sequences: list[Sequence]) -> Step | None:
        """Pieces of prompts, the oldest first, up to the budget."""
        step = Step([])
        left = min(self.n_batch, self.n_turn)
        for s in sequences:
            n = min(s.n_pending, left)
            while n and not self._add(step, s, n, make_room=n == 1):
                n //= 2
            left -= n
            if not left or (self._even and step.pieces):
                break
        return step if step.pieces else None

    def _add(self, step: Step, s: Sequence, n: int, make_room: bool, drafted: Tokens[int] = ()) -> bool:
        """Put the next n tokens of a sequence into a batch, and guesses behind them if there is room for those too.

        Returns: whether there was room for the n.
        """
        held = s.held
        if held is None:  # it has just been sent back to wait
            return False
        first = held.n_past
        while self._even and not self.store.has_slot(held):  # first: copies that are promised are carried out
            if not make_room or not self._preempt(s):
                return False
        copies = self.store.grow(held, first + n + len(drafted))
        if copies is None and drafted:  # nobody goes for a guess
            drafted, copies = (), self.store.grow(held, first + n)
        while copies is None and make_room and self._preempt(s):
            copies = self.store.grow(held, first + n)
        if copies is None:
            return False
        slots = self.store.next_slot(held) if self._even else (0, 0)
        assert slots is not None  # there was one, and those that were sent back hold fewer
        last = first + n == len(s.tokens)
        n_out = n if s.is_read_whole else last + len(drafted)
        step.pieces.append(Piece(s, first, n + len(drafted), n_out, slots, drafted))
        step.copies += copies
        held.n_past, s.n_unsure = first + n + len(drafted), len(drafted)
        s.n_under_way += 1
        return True

    def _preempt(self, s: Sequence) -> bool:
        """Have the youngest of those that came later and are in no batch wait again; what is not kept is read anew.

        Returns: whether there was one. The oldest is never sent back, so everyone's turn comes.
        """
        for other in reversed(self.running[self.running.index(s) + 1 :]):
            if not other.n_under_way and other.held is not None:
                self.let_go(other)
                other.n_read = 0
                self.running.remove(other)
                self.waiting.appendleft(other)
                return True
        return False


def _in_common(a: Sequence, b: Sequence) -> int:
    """Tokens in full pages of the prompt of b, which it is reading, that a begins with too."""
    if b.n_read >= b.n_prompt or b.is_read_whole:
        return 0
    n = 0
    most = min(len(a.tokens) - 1, b.n_prompt) // PAGE * PAGE
    while n < most and a.tokens[n : n + PAGE] == b.tokens[n : n + PAGE]:
        n += PAGE
    return n
