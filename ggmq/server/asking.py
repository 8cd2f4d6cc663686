"""What all APIs have in common: prompts are asked of a model, and their answers come as pieces, by choice.

An API turns its body into `Wanted`s, reads pieces from `Answers`, and writes them in its own words.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

from ggmq.answers import Answer, Reasoning
from ggmq.answers import Piece as Part
from ggmq.feed import Feed
from ggmq.grammar import Grammar
from ggmq.sampling import SamplingParams
from ggmq.server.errors import ApiError, of_ggmq
from ggmq.server.models import ServedModel
from ggmq.server.sampling import for_choice
from ggmq.service import CLOSING, Delta, Done, Failed, Job, Request, Token, Usage
from ggmq.texts import PlainReader, Reader
from protocol.errors import GgmqError, Unavailable

NUMBERS: ContextVar[list[int]] = ContextVar("numbers")
"""The numbers that the jobs of the request have which is being answered, for the log."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A prompt, and how it is to be answered.

    Attributes:
        n: answers to it.
        grammar: what an answer must be.
        reader: makes what takes an answer apart.
    """

    model: ServedModel
    tokens: list[int]
    params: SamplingParams
    n_predict: int = -1
    stop: tuple[str, ...] = ()
    n_probs: int = -1
    n: int = 1
    preserved: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    reader: Callable[[], Reader] = PlainReader


class Piece(NamedTuple):
    """Some more of an answer: what it says, and the tokens that it was."""

    parts: list[Part]
    tokens: tuple[Token, ...]


class End(NamedTuple):
    """An answer has ended. `reason` is OpenAI's finish_reason."""

    reason: str
    done: Done


class Alive(NamedTuple):
    """Nothing has come for a while."""


@dataclass(slots=True)
class Whole:
    """An answer that is complete."""

    said: Answer = field(default_factory=Answer)
    tokens: list[Token] = field(default_factory=list)
    end: End | None = None

    def add(self, piece: Piece) -> None:
        self.tokens += piece.tokens
        self.said.add(piece.parts)

    @property
    def reason(self) -> str:
        return self.end.reason if self.end is not None else ""


class Registry:
    """Answers that are being made, so that a server that ends can end them. Attributes: closing."""

    def __init__(self) -> None:
        self._feeds: set[Feed] = set()
        self.closing = asyncio.Event()

    def add(self, feed: Feed) -> None:
        if self.closing.is_set():
            raise ApiError(503, CLOSING, "unavailable", retry_s=2)
        self._feeds.add(feed)

    def remove(self, feed: Feed) -> None:
        self._feeds.discard(feed)

    def close(self) -> None:
        """End all of them with an error. From the loop's thread."""
        self.closing.set()
        for feed in self._feeds:
            feed.emit_as(0)(Failed(Unavailable(CLOSING)))


class Answers:
    """Answers to prompts, from when they are asked until all have ended or nobody wants them any more.

    `async with Answers(...) as answers` asks; leaving the block cancels what has not ended. Choices are numbered through:
    first those of the first prompt.

    Attributes:
        n_reasoning: tokens that were thoughts.
    Errors: ApiError, when it is asked, and while pieces come.
    """

    def __init__(self, registry: Registry, key: str, wanted: Iterable[Wanted], eager: bool = False) -> None:
        """eager: pieces are wanted as they come, and not only in the end."""
        self._registry, self._key = registry, key
        self._choices = [(w, number) for w in wanted for number in range(w.n)]
        self._feed = Feed(eager)
        self._jobs: list[Job | None] = []
        self._readers = [w.reader() for w, _ in self._choices]
        self.usages: list[Usage] = []
        self.n_reasoning = 0
        self._thinks = [False] * len(self._choices)

    async def __aenter__(self) -> Self:
        self._registry.add(self._feed)
        try:
            for i, (w, number) in enumerate(self._choices):
                request = Request(w.tokens, for_choice(w.params, number), w.n_predict, w.stop, w.n_probs, self._key,
                                  w.preserved, w.grammar)  # fmt: skip
                job = w.model.service.submit(request, self._feed.emit_as(i))
                self._jobs.append(job)
                NUMBERS.get([]).append(job.number)
        except GgmqError as e:
            self._cancel()
            raise of_ggmq(e) from e
        except BaseException:
            self._cancel()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._cancel()

    def _cancel(self) -> None:
        self._registry.remove(self._feed)
        for i, job in enumerate(self._jobs):
            if job is not None:
                self._jobs[i] = None
                job.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | End | Alive]]:
        """What comes, with the number of its choice; for each choice an End comes last."""
        while any(self._jobs):
            events = await self._feed.take()
            if not events:
                yield 0, Alive()
            for i, event in _merged(events):
                match event:
                    case Delta(text, tokens):
                        parts = self._readers[i].feed(text)
                        self._thinks[i] = isinstance(parts[0], Reasoning) if parts else self._thinks[i]
                        self.n_reasoning += len(tokens) * self._thinks[i]
                        if parts or tokens:
                            yield i, Piece(parts, tokens)
                    case Done():
                        self._jobs[i] = None
                        self.usages.append(event.usage)
                        if parts := self._readers[i].finish():
                            yield i, Piece(parts, ())
                        yield i, End(self._reason(i, event), event)
                    case Failed(error):
                        raise of_ggmq(error)

    async def whole(self) -> list[Whole]:
        """All answers, once they are complete."""
        answers = [Whole() for _ in self._choices]
        async for i, event in self.pieces():
            if isinstance(event, Piece):
                answers[i].add(event)
            elif isinstance(event, End):
                answers[i].end = event
        return answers

    def _reason(self, i: int, done: Done) -> str:
        if done.reason in ("length", "context"):
            return "length"
        return "tool_calls" if self._readers[i].has_calls else "stop"

    @property
    def usage(self) -> Usage:
        """Of all that have ended; a prompt counts once, however many answers there are to it."""
        total = Usage(sum(len(w.tokens) for w, number in self._choices if not number),
                      min((u.n_cached for u in self.usages), default=0))  # fmt: skip
        for u in self.usages:
            total.n_made += u.n_made
            total.n_drafted += u.n_drafted
            total.n_accepted += u.n_accepted
            total.prompt_s = max(total.prompt_s, u.prompt_s)
            total.made_s = max(total.made_s, u.made_s)
            total.waited_s = max(total.waited_s, u.waited_s)
        return total


def _merged(events: Sequence[tuple[int, object]]) -> list[tuple[int, object]]:
    """Texts of one choice that have come together are one text: who is late gets more at once."""
    out: list[tuple[int, object]] = []
    last: dict[int, int] = {}
    for i, event in events:
        at = last.get(i)
        if isinstance(event, Delta) and at is not None and isinstance(before := out[at][1], Delta):
            out[at] = i, Delta(before.text + event.text, before.tokens + event.tokens)
        else:
            last[i] = len(out)
            out.append((i, event))
    return out


def timings_of(usage: Usage) -> dict[str, float]:
    """llama-server's figures of an answer. Units: tokens, milliseconds, tokens a second."""
    n_read = usage.n_prompt - usage.n_cached

    def rate(n: int, seconds: float) -> float:
        return n / seconds if seconds > 0 else 0.0

    return {"cache_n": usage.n_cached, "prompt_n": n_read, "prompt_ms": usage.prompt_s * 1000,
            "prompt_per_second": rate(n_read, usage.prompt_s), "predicted_n": usage.n_made,
            "predicted_ms": usage.made_s * 1000, "predicted_per_second": rate(max(0, usage.n_made - 1), usage.made_s),
            "draft_n": usage.n_drafted, "draft_n_accepted": usage.n_accepted}  # fmt: skip


def openai_usage(answers: Answers) -> dict[str, object]:
    usage = answers.usage
    return {"prompt_tokens": usage.n_prompt, "completion_tokens": usage.n_made,
            "total_tokens": usage.n_prompt + usage.n_made, "prompt_tokens_details": {"cached_tokens": usage.n_cached},
            "completion_tokens_details": {"reasoning_tokens": answers.n_reasoning}}  # fmt: skip
