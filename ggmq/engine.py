"""The token loop: schedule, run, sample, emit. `step` is the whole of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ggmq.runner import MAX_TRIES, Runner
from ggmq.sampling import Sampler, SamplingParams
from protocol.errors import FormatError, Unavailable


@dataclass(slots=True)
class Conversation:
    """One conversation: its tokens, and how many of them have keys and values in the cache."""

    tokens: list[int]
    sampler: Sampler
    n_past: int = 0

    @property
    def pending(self) -> list[int]:
        return self.tokens[self.n_past :]


@dataclass(slots=True)
class Timings:
    """Units: tokens and seconds."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0


@dataclass(slots=True)
class Engine:
    """Runs one sequence at a time on a loaded model.

    Attributes:
        n_batch: tokens of a prompt that go through the stages at once.
        end_ids: tokens after which a sequence is over.
        n_failed: steps in a row that a worker's silence ended.
        cut: what ended the last text before the model did: `limit` (n_predict), `context` (it is full), or nothing.
    """

    runner: Runner
    end_ids: frozenset[int] = frozenset()
    n_batch: int = 512
    timings: Timings = field(default_factory=Timings)
    n_failed: int = 0
    cut: Literal["", "limit", "context"] = ""
    _sequence: Conversation | None = None

    def start(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """Begin with a prompt. What it shares with the tokens in the cache is not computed again."""
        if not tokens:
            raise FormatError("prompt: expected at least one token; give some text with -p")
        if len(tokens) >= self.runner.n_ctx:
            raise FormatError(f"prompt: {len(tokens)} tokens do not fit a context of {self.runner.n_ctx}; use a larger -c")
        kept = 0
        if self._sequence is not None:
            known = self._sequence.tokens[: self._sequence.n_past]
            while kept < min(len(known), len(tokens) - 1) and known[kept] == tokens[kept]:
                kept += 1
        self._sequence = Conversation(list(tokens), Sampler(params), kept)

    def step(self) -> int | None:
        """Schedule, run, sample, emit: the next token, or None while the prompt is still being read, or read again."""
        sequence = self._sequence
        assert sequence is not None  # start comes first
        piece, last = self._schedule(sequence)
        start = time.perf_counter()
        params = sequence.sampler.params
        top_k = 0 if params.greedy else params.n_candidates(self.runner.arch.hp.n_vocab)
        try:
            out = self.runner.forward(piece, sequence.n_past, [len(piece) - 1] if last else [0], params.greedy, top_k=top_k)
        except Unavailable as e:
            self._recover(sequence, e)
            return None
        self.n_failed = 0
        prefill = len(piece) > 1 or not last or sequence.n_past + 1 < len(sequence.tokens)
        sequence.n_past += len(piece)
        self._count(len(piece), time.perf_counter() - start, prefill)
        if not last:
            return None
        if params.greedy:
            token = int(out[0])
        elif top_k:
            token = sequence.sampler.pick(out[0]["logit"], sequence.tokens, out[0]["id"])
        else:
            token = sequence.sampler.pick(out[0], sequence.tokens)
        sequence.tokens.append(token)
        return token

    def _recover(self, sequence: Conversation, error: Unavailable) -> None:
        """Have the stages ready for the same step again; from the first token on where they lost what they had. The tokens
        are those that would have come. Errors: what the runner cannot recover from."""
        self.n_failed += 1
        if self.n_failed > MAX_TRIES:
            raise error
        if not self.runner.recover(error):
            sequence.n_past = 0

    def _schedule(self, sequence: Conversation) -> tuple[list[int], bool]:
        """The next piece of the sequence, and whether it is the last before a new token."""
        pending = sequence.pending
        return pending[: self.n_batch], len(pending) <= self.n_batch

    def _count(self, n: int, seconds: float, prefill: bool) -> None:
        t = self.timings
        if prefill:
            t.prefill_tokens, t.prefill_s = t.prefill_tokens + n, t.prefill_s + seconds
        else:
            t.decode_tokens, t.decode_s = t.decode_tokens + n, t.decode_s + seconds

    def generate(self, n_predict: int) -> Iterator[int]:
        """Tokens until `n_predict` (negative: no bound), an end token, or a full context; `cut` tells which."""
        n, self.cut = 0, ""
        while n_predict < 0 or n < n_predict:
            sequence = self._sequence
            assert sequence is not None  # start comes first
            if len(sequence.tokens) > self.runner.n_ctx:
                self.cut = "context"
                return
            token = self.step()
            if token is None:
                continue
            if token in self.end_ids:
                return
            n += 1
            yield token
        self.cut = "limit"

    def abandon(self) -> None:
        """End what was interrupted on the workers, so that the next text can begin. Errors: Unavailable as the client's."""
        self.runner.client.cancel()
        self.runner.client.settle()


def chosen_seed(seed: int) -> int | None:
    """A seed as the command line gives it: -1 takes a new one."""
    return None if seed < 0 else seed & 0xFFFFFFFF


