"""The token loop: schedule, run, sample, emit, for every sequence that runs. `step` is the whole of it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ggmq.model import MAX_TRIES, Model
from ggmq.promptcache import CLOSE_S, PromptCache
from ggmq.rereading import read_again
from ggmq.runner import ALL, ARGMAX, HIDDEN, MIN_PIECE, PIECE, Rows, UnderWay
from ggmq.sampling import Sampler, SamplingParams, log_probs
from ggmq.scheduler import Piece, Scheduler, Sequence, Step
from ggmq.speculation import Ask, Mode, NGram, Speculation, one_by_one
from protocol.errors import GgmqError, HandleError, OutOfMemory, Unavailable

if TYPE_CHECKING:
    from ggmq.draftmodel import DraftModel
    from ggmq.grammar import Constraint


@dataclass(slots=True)
class Timings:
    """Units: tokens and seconds. Of what was drafted only what was right is part of what was decoded."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    n_drafted: int = 0
    n_accepted: int = 0


Want = Literal["logits", "hidden", "last"]
"""What is wanted of a text that is only read: logits behind all tokens, hidden states, or the last token's."""


class Made(NamedTuple):
    """A token of a sequence. The last of them may be the one that ended it: see `sequence.finished`.

    `logprob`: log-probability of the token, and `top` those of the most likely ones, where the sequence asks for them.
    """

    sequence: Sequence
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Engine:
    """Runs sequences on a loaded model, each with parameters of its own.

    Attributes:
        n_batch: tokens of prompts that go through the stages at once.
        speculate: how drafts are made; the text is the same.
        draft: a small model that makes them.
        end_ids: tokens after which a sequence is over.
        n_failed: steps in a row that a lost worker ended.
        told: is called with what happens to workers: a word, and its figures.
        cut: what ended the last text of `generate` before the model did: `limit` (n_predict), `context` (it is full), or
            nothing.
    Threads: use from one.
    """

    model: Model
    end_ids: frozenset[int] = frozenset()
    n_batch: int = 512
    speculate: Mode = "off"
    draft: DraftModel | None = None
    timings: Timings = field(default_factory=Timings)
    n_failed: int = 0
    told: Callable[..., None] = lambda event, **figures: None
    cut: Literal["", "limit", "context"] = ""
    scheduler: Scheduler = field(init=False)
    _under_way: deque[tuple[Step, UnderWay, float]] = field(default_factory=deque)
    _speculation: Speculation | None = None
    _read_s: float = 0.0
    _conversation: Sequence | None = None
    _interrupted: bool = False
    _pauses: bool = False
    _error: BaseException | None = None

    def __post_init__(self) -> None:
        self.n_batch = min(self.n_batch, self.model.n_batch)
        self.scheduler = Scheduler(self.model.store, self.model.n_ctx, len(self.model.stages), self.n_batch,
                                   self.model.n_seq)  # fmt: skip
        self.scheduler.bringer = self.model.prompts if isinstance(self.model.prompts, PromptCache) else None
        if self.speculate != "off" and not self.model.store.room.has_states:  # a state cannot go back
            self._speculation = Speculation(self.speculate, self.draft.draft_all if self.draft is not None else one_by_one)
            self.scheduler.draft = self._draft

    # -- many sequences ------------------------------------------------------------------------------------------------

    def add(self, tokens: Tokens[int], params: SamplingParams, n_predict: int = -1, *, n_probs: int = -1,
            constraint: Constraint | None = None) -> Sequence:  # fmt: skip
        """Have a sequence wait for its turn. It shares what others have read of the same beginning.

        n_probs, constraint: as `Sequence` has them.
        Errors: FormatError for a prompt that is empty or does not fit.
        """
        sequence = Sequence(list(tokens), Sampler(params), n_predict, n_probs=n_probs, constraint=constraint)
        self.scheduler.add(sequence)
        return sequence

    def read(self, tokens: Tokens[int], want: Want) -> Sequence:
        """Have a text read without going on: its `rows` are what is wanted when it has `finished`.

        Shapes: float32 [n, n_vocab] for `logits`, [n, n_embd] for `hidden`, the hidden states behind the last norm, and
        [1, n_embd] for `last`, that of the last token.
        Errors: FormatError for a text that is empty or does not fit.
        """
        sequence = Sequence(list(tokens), Sampler(SamplingParams()), all_logits=want == "logits",
                            embed="" if want == "logits" else want)  # fmt: skip
        self.scheduler.add(sequence)
        return sequence

    def adopt(self, sequence: Sequence) -> None:
        """Go on with a sequence of an engine whose model is gone: what it has made stays, all of it is read again."""
        sequence.held, sequence.n_read, sequence.n_under_way, sequence.n_unsure = None, 0, 0, 0
        sequence.drafters.clear()
        self.scheduler.waiting.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A sequence is not wanted any more: its memory is free for others."""
        self.scheduler.leave(sequence)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._under_way or self.scheduler.running or self.scheduler.waiting or self._moves_pages)

    @property
    def _moves_pages(self) -> bool:
        """Whether pages are on their way from files or to them, or are to be."""
        return self.model.prompts is not None and self.model.prompts.busy

    def step(self) -> list[Made]:
        """Schedule, run, sample, emit: tokens that were made, none while prompts are still being read, or read again.

        Errors: what the workers report, when it cannot be recovered from. The sequences stay as they were.
        """
        start = time.perf_counter()
        try:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._interrupted:
                self.abandon()
            self._schedule()
            if not self._under_way:
                if self.model.prompts is not None:
                    self.model.prompts.wait()
                return []
            step, sent, sent_s = self._under_way[0]
            out = self.model.runner.wait(sent)
        except (Unavailable, HandleError) as e:
            self._recover(e)
            return []
        except BaseException:
            self._interrupted = True
            raise
        self._under_way.popleft()
        self.n_failed = 0
        self.scheduler.read(step)
        before_s, self._read_s = self._read_s, time.perf_counter()
        if self._speculation is not None and step.decodes:
            self._speculation.took(step.n_tokens, self._read_s - max(sent_s, before_s), sent.is_new)
        made = [token for piece, rows in zip(step.pieces, out, strict=True) for token in self._sample(piece, rows)]
        self._go_on()
        self._count(step, len(made), time.perf_counter() - start)
        return made

    def _go_on(self) -> None:
        """Send what comes next before these tokens are told, so that the stages compute meanwhile."""
        try:
            self._schedule()
        except BaseException as e:  # these tokens are told first
            self._error, self._interrupted = e, True

    def _schedule(self) -> None:
        """Send batches until every stage has one and one is waiting behind it; then pages may move."""
        self._pauses |= self.model.learn_links()
        if self.model.client.changed or self._pauses:
            if self._under_way:  # nothing more is sent until layers can be moved, or links taken
                return
            self._pauses = False
            self.tend()
        self._send()
        if self.model.prompts is not None:
            self.model.prompts.advance()

    def _send(self) -> None:
        n_stages = len(self.model.stages)
        while len(self._under_way) < 2 * n_stages:
            if len(self._under_way) <= n_stages:  # what was sent before tells how fast prompts are read
                self._set_turn()
            step = self.scheduler.next()
            if step is None and self.busy and not self._under_way and not self._moves_pages:
                if self._forget_conversation():
                    continue
                raise OutOfMemory(f"the memory of the sequences is full: {self.model.store.n_free} pages are free, by "
                                  "window; load the model for more sequences, or end some", 1, 0)  # fmt: skip
            if step is None:
                return
            self._interrupted = True  # until it is sent, the sequences are ahead of what is under way
            if step.copies:
                self._finish_under_way()
                self.model.runner.copy_pages(step.copies)
            now = time.perf_counter()
            self._under_way.append((step, self.model.runner.submit([self._rows(p) for p in step.pieces]), now))
            self._interrupted = False

    def _set_turn(self) -> None:
        """How much of a prompt may go at once, so that all stages work and nobody's tokens come late."""
        s, n = self.scheduler, self.n_batch if len(self.model.stages) == 1 else PIECE
        longest = max((x.n_pending for x in (*s.running, *s.waiting)), default=0)
        if longest > MIN_PIECE and (any(x.n_pending <= 1 for x in s.running) or self.model.shares()):
            n = min(n, self.model.runner.piece_of_a_turn())
        s.n_turn = n

    def _rows(self, p: Piece) -> Rows:
        s, params = p.sequence, p.sequence.sampler.params
        assert s.held is not None  # it runs
        want = HIDDEN if s.embed else ALL
        if not s.is_read and s.n_probs < 0 and s.constraint is None:
            want = ARGMAX if params.greedy else params.n_candidates(self.model.arch.hp.n_vocab)
        pages = {window: list(pages) for window, pages in s.held.pages.items()}
        tokens = [*s.tokens[p.first : p.first + p.n_sure], *p.drafted]
        return Rows(tokens, p.first, pages, range(p.n - p.outputs, p.n), want, p.slots)

    def _draft(self, sequences: list[Sequence]) -> list[list[int]]:
        """Guesses of what comes next, for each sequence of a decode."""
        assert self._speculation is not None  # nobody asks otherwise
        asks = []
        for s in sequences:
            if not s.drafters:
                if self.speculate != "draft":
                    s.drafters.append(NGram())
                if self.speculate != "ngram" and self.draft is not None:
                    s.drafters.append(self.draft.drafter())
            room = min(self.model.n_ctx - len(s.tokens), self.n_batch - 1)
            asks.append(Ask(s.drafters, s.tokens, room, room if s.n_predict < 0 else s.n_predict - s.n_made - 1))
        return self._speculation.drafts(asks)

    def _finish_under_way(self) -> None:
        """Wait for what was sent, and keep the answers: pages are copied when nothing writes to them."""
        for _, sent, _ in self._under_way:
            self.model.client.await_reply(sent.seq)

    def _sample(self, piece: Piece, rows: npt.NDArray[Any]) -> list[Made]:
        """The token behind a piece; behind each drafted one that was right another."""
        s, made = piece.sequence, list[Made]()
        if s.finished or not piece.outputs:
            return made
        if s.is_read:
            if s.rows is None:
                s.rows = np.empty((len(s.tokens) if s.is_read_whole else 1, rows.shape[1]), np.float32)
            at = piece.first + piece.n - piece.outputs - (len(s.tokens) - len(s.rows))
            s.rows[at : at + piece.outputs] = rows
            if s.n_read == len(s.tokens):
                self.scheduler.leave(s, "end")
            return made
        if s is self._conversation and not s.n_made and s.held is not None:
            self.model.store.snap(s.held)
        why = ""
        for row, drafted in zip(rows, (*piece.drafted, None), strict=True):
            token = self._pick(s, row)
            if token is None:
                why = "end"
                break
            logprob, top = log_probs(row, token, s.n_probs) if s.n_probs >= 0 else (None, ())
            s.tokens.append(token)
            made.append(Made(s, token, logprob, top))
            if token in self.end_ids or (s.constraint is not None and s.constraint.ended):
                why = "end"
            elif 0 <= s.n_predict <= s.n_made:
                why = "limit"
            elif len(s.tokens) > self.model.n_ctx:
                why = "context"
            if why or token != drafted:
                break
        if piece.drafted:
            n_right = max(0, len(made) - 1)
            self.scheduler.settle(piece, n_right)
            self.timings.n_drafted += len(piece.drafted)
            self.timings.n_accepted += n_right
        if why:
            self.scheduler.leave(s, why, keep=s is self._conversation)
        return made

    @staticmethod
    def _pick(s: Sequence, row: npt.NDArray[Any]) -> int | None:
        """The next token of a sequence; None where its constraint allows none."""
        if row.dtype == np.int32:
            return int(row)
        if row.dtype != np.float32:
            return s.sampler.pick(row["logit"], s.tokens, row["id"])
        if s.constraint is None:
            return s.sampler.pick(row, s.tokens)
        allowed = s.constraint.mask()
        if not allowed.any():
            return None
        token = s.sampler.pick(row, s.tokens, allowed=allowed)
        s.constraint.take(token)
        return token

    def _count(self, step: Step, n_made: int, seconds: float) -> None:
        t = self.timings
        if step.decodes:
            t.decode_tokens, t.decode_s = t.decode_tokens + n_made, t.decode_s + seconds
        else:
            t.prefill_tokens, t.prefill_s = t.prefill_tokens + step.n_tokens, t.prefill_s + seconds

    # -- when something goes wrong -------------------------------------------------------------------------------------

    def _recover(self, error: Unavailable | HandleError) -> None:
        """Have the stages ready for the same steps again; from the first token on where they lost what they had. The tokens
        are those that would have come. Errors: what the model cannot recover from."""
        self._interrupted = True
        self.n_failed += 1
        if self.n_failed > MAX_TRIES:
            raise error
        if isinstance(error, HandleError):  # a worker that was started again knows nothing of us
            self.model.client.settle()
            if self.model.held():
                raise error
            error = Unavailable(str(error))
        start = time.perf_counter()
        self.told("worker lost", error=error)
        for n_left in reversed(range(MAX_TRIES)):
            self.model.recover(error)
            empty = self.model.keeper.empty
            self._under_way.clear()
            self._forget_moves()
            self.scheduler.n_stages = len(self.model.stages)
            whole = len(empty) < self.model.arch.hp.n_layer
            self.scheduler.begin_again(whole)
            try:
                if empty and whole:
                    sequences = [*self.scheduler.running, *self.scheduler.waiting]
                    read_again(self.model, [*sequences, *([self._conversation] if self._conversation else [])], empty)
                break
            except (Unavailable, HandleError) as e:  # another one, or the same once more
                if not n_left:
                    raise
                error = e if isinstance(e, Unavailable) else Unavailable(str(e))
        empty.clear()
        self._interrupted = False
        self.told("recovered", seconds=time.perf_counter() - start)

    def abandon(self) -> None:
        """End what was interrupted on the workers, so that other texts can begin. Errors: Unavailable as the client's."""
        self.model.client.cancel()
        self.model.client.settle()
        self._under_way.clear()
        self._forget_moves()
        self.scheduler.begin_again(not self.model.keeper.empty)  # of a recovery that failed
        self.model.keeper.empty.clear()
        self._interrupted, self._error = False, None

    def tend(self, idle: bool = False) -> None:
        """Look whether the bus has changed: devices that are to be left are left, between two batches.

        idle: nothing runs, so layers may go to devices that are new. Errors: Unavailable.
        """
        client = self.model.client
        if idle:
            client.look()
        keeper = self.model.keeper
        if self._under_way or client.lost or not (client.changed or (idle and keeper.is_crowded)):
            return
        infos = keeper.look()
        lost = keeper.lost(infos)
        if idle and lost is not None:
            self._recover(lost)
            return
        with contextlib.suppress(OutOfMemory):
            moved = self.model.tend(infos, idle, self._stop_moves)
            self.scheduler.n_stages = len(self.model.stages)
            if self.draft is not None:
                moved = self.draft.model.tend(infos, idle) or moved
            if moved:
                self.told("moved")

    def watch(self) -> None:
        """Nothing is asked for, for a while: call this several times a second, so that devices that are to be left are left
        all the same. What goes wrong is for the next step."""
        try:
            self.model.client.look()
            self.tend()
        except GgmqError as e:
            self._error, self._interrupted = e, True

    def _stop_moves(self) -> None:
        if self.model.prompts is not None:
            self.model.prompts.stop()

    def _forget_moves(self) -> None:
        if self.model.prompts is not None:
            self.model.prompts.reset()

    def close(self, within_s: float = CLOSE_S) -> None:
        """What was read is kept in files where the model keeps prompts, as far as that takes no longer. Idempotent."""
        s = self._conversation
        if s is not None and s.held is not None:
            self.leave(s)
            self.scheduler.let_go(s)
        if self.model.prompts is not None:
            self.model.prompts.close(within_s)

    # -- one conversation ----------------------------------------------------------------------------------------------

    def start(self, tokens: Tokens[int], params: SamplingParams) -> None:
        """Begin with a prompt. What it shares with the conversation before is not read again.

        Errors: FormatError for a prompt that is empty or does not fit.
        """
        if self._interrupted or self._under_way:
            self.abandon()
        old, new = self._conversation, Sequence(list(tokens), Sampler(params))
        self.scheduler.add(new)
        if old is not None:
            held = old.held
            if not old.finished:
                self.scheduler.leave(old, keep=True)
            if held is not None:
                most = min(old.n_read, len(tokens) - 1)
                n = next((i for i in range(most) if old.tokens[i] != tokens[i]), most)
                if self.model.store.n_shared(tokens) > n:  # of some other text more is kept
                    self.scheduler.let_go(old)
                else:
                    new.held, old.held, new.n_read = held, None, self.model.store.rewind(held, n)
                    new.n_cached = new.n_read
            new.drafters, old.drafters = old.drafters, []
            for drafter in new.drafters:
                drafter.begin()
        self._conversation = new

    def _forget_conversation(self) -> bool:
        """Give up what one that has ended holds for the next. Returns: whether it held anything."""
        s = self._conversation
        if s is None or not s.finished or s.held is None:
            return False
        self.scheduler.let_go(s)
        return True

    def generate(self, n_predict: int) -> Iterator[int]:
        """Tokens of the conversation until `n_predict` (negative: no bound), an end token, or a full context; `cut` tells
        which."""
        s = self._conversation
        assert s is not None  # start comes first
        s.n_predict, self.cut = (-1 if n_predict < 0 else s.n_made + n_predict), ""
        if not n_predict:
            self.scheduler.leave(s, "limit", keep=True)
        while not s.finished:
            for made in self.step():
                if made.sequence is s and made.token not in self.end_ids:
                    yield made.token
        if s.finished in ("limit", "context"):
            self.cut = "limit" if s.finished == "limit" else "context"

    def logits(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Logits behind every token. Shapes: int32 [n] to float32 [n, n_vocab]. Errors: as `read`'s and `step`'s."""
        return self._rows_of(self.read(tokens.tolist(), "logits"))

    def embed(self, tokens: Tokens[int]) -> npt.NDArray[np.float32]:
        """Hidden states of all tokens behind the last norm; `ggmq.embeddings` makes one vector of them.

        Shapes: [n] to float32 [n, n_embd]. Errors: as `read`'s and `step`'s.
        """
        return self._rows_of(self.read(tokens, "hidden"))

    def _rows_of(self, s: Sequence) -> npt.NDArray[np.float32]:
        try:
            while not s.finished:
                self.step()
        finally:
            self.leave(s)
        assert s.rows is not None  # it was read to its end
        return s.rows


def chosen_seed(seed: int) -> int | None:
    """A seed as the command line gives it: -1 takes a new one."""
    return None if seed < 0 else seed & 0xFFFFFFFF
