"""Answers as programs take them: whole, or in pieces while they are made."""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

import msgspec

from ggmq.answers import Answer, Content, Piece
from ggmq.chat import Message
from ggmq.conversation import wrong
from ggmq.feed import Feed
from ggmq.service import Delta, Done, Emit, Event, Failed, Job, Token, Usage
from ggmq.texts import Reader
from protocol.errors import Cancelled

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class ToolCall(NamedTuple):
    """A call that a model wants made. `arguments`: JSON, as it was written."""

    id: str
    name: str
    arguments: str

    @property
    def parsed(self) -> Any:
        """The arguments as Python has them. Errors: InvalidValue where the answer was cut within them."""
        try:
            return msgspec.json.decode(self.arguments or "{}")
        except msgspec.DecodeError as e:
            raise wrong(f"arguments of {self.name}", f"expected JSON: {e}; was the answer cut?") from None


@dataclass(frozen=True, slots=True)
class Result:
    """What a model wrote; `str` gives its text.

    Attributes:
        text: the answer, without what stopped it.
        tokens: those whose text it is.
        finish_reason: stop (the model ended it, or a stop text), length (max_tokens, or the context is full), tool_calls,
            cancelled (the stream was closed).
        usage: tokens and seconds.
        logprobs: each token with its log-probability and the most likely ones, natural logarithms; None unless asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[Token] | None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ChatResult(Result):
    """Attributes:
    reasoning: what the model thought first, apart from the text.
    tool_calls: what it wants called.
    """

    reasoning: str
    tool_calls: list[ToolCall]

    @property
    def message(self) -> Message:
        """The answer as a message, to be put behind the others when the conversation goes on."""
        out: Message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            out["reasoning_content"] = self.reasoning
        if self.tool_calls:
            out["tool_calls"] = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                                 for c in self.tool_calls]  # fmt: skip
        return out


R = TypeVar("R", bound=Result)


class Gathered:
    """What has come of an answer."""

    def __init__(self, reader: Reader, with_probs: bool) -> None:
        self._reader, self._with_probs = reader, with_probs
        self._said, self._tokens = Answer(), list[Token]()
        self._end: Done | None = None

    def take(self, event: Event) -> list[Piece]:
        """What an event says. Errors: what the answer failed with."""
        pieces: list[Piece] = []
        match event:
            case Delta(text, tokens):
                self._tokens += tokens
                pieces = self._reader.feed(text)
            case Done():
                self._end = event
                pieces = self._reader.finish()
            case Failed(error):
                raise error
        self._said.add(pieces)
        return pieces

    def result(self, job: Job) -> Result:
        """Of a text."""
        said, tokens = self._said, self._tokens
        return Result(said.content, [t.id for t in tokens], self._reason, self._usage(job), self._logprobs)

    def chat_result(self, job: Job) -> ChatResult:
        """Of a conversation."""
        said, calls = self._said, [ToolCall(c.id, c.name, c.arguments) for c in self._said.calls]
        return ChatResult(said.content, [t.id for t in self._tokens], self._reason, self._usage(job), self._logprobs,
                          said.reasoning, calls)  # fmt: skip

    def _usage(self, job: Job) -> Usage:
        return self._end.usage if self._end is not None else job.usage()

    @property
    def _logprobs(self) -> list[Token] | None:
        return self._tokens if self._with_probs else None

    @property
    def _reason(self) -> FinishReason:
        if self._end is None:
            return "cancelled"
        if self._end.reason in ("length", "context"):
            return "length"
        return "tool_calls" if self._reader.has_calls else "stop"


class Asked(NamedTuple):
    """A request that is ready: `ask` has it answered, `gathered` takes what comes. `owner`: what must live until then."""

    ask: Callable[[Emit], Job]
    gathered: Gathered
    owner: object = None


Finish = Callable[[Gathered, Job], R]


def _keeper(early: deque[Event], events: queue.SimpleQueue[Event | None]) -> Emit:
    """Nobody looks before the end: waking him for each token would take the time to make it. It holds no stream, so that one
    that nobody holds is gone at once."""

    def keep(event: Event) -> None:
        early.append(event)
        if not isinstance(event, Delta):
            events.put(None)

    return keep


class Stream(Generic[R]):
    """An answer while it is made: iterating gives its text in pieces.

    Closing it, leaving its `with` block, or an exception while it is waited for (Ctrl-C) cancels the answer, and the model
    goes on to others. Errors: those of the model while it is iterated. Threads: use from one; `close` from any.
    """

    def __init__(self, asked: Asked, finish: Finish[R], eager: bool = True) -> None:
        self._asked, self._gathered, self._finish = asked, asked.gathered, finish
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._early: deque[Event] = deque()
        self._pending: deque[Piece] = deque()
        self._over = False
        self._job = asked.ask(self._events.put if eager else _keeper(self._early, self._events))

    def _fetch(self) -> bool:
        """Wait for more. Returns: whether there may be."""
        if self._over:
            return False
        try:
            event = self._events.get()
            for e in self._early if event is None else (event,):
                self._over |= not isinstance(e, Delta)
                self._pending += self._gathered.take(e)
        except BaseException:
            self.close()
            raise
        return True

    def pieces(self) -> Iterator[Piece]:
        """What comes, typed: Content, Reasoning, and ToolCallPiece, whose `arguments` come in pieces too."""
        while self._pending or self._fetch():
            while self._pending:
                yield self._pending.popleft()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while self._pending or self._fetch():
            while self._pending:
                piece = self._pending.popleft()
                if isinstance(piece, Content):
                    return piece.text
        raise StopIteration

    @property
    def result(self) -> R:
        """All of the answer; what has not come yet is waited for. After `close`, what had come until then."""
        while self._fetch():
            pass
        return self._finish(self._gathered, self._job)

    def close(self) -> None:
        """Cancel what has not been made. Idempotent."""
        if not self._over:
            self._over = True
            self._job.cancel()
            self._events.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_job"):
            self.close()


class AsyncStream(Generic[R]):
    """An answer while it is made, for `async for`: its text in pieces. It is asked for when it is first waited for.

    Closing it, leaving its `async with` block, or cancelling the task that waits for it cancels the answer.
    Errors: as `Stream`'s. Threads: use from the event loop's.
    """

    def __init__(self, prepare: Callable[[], Asked], finish: Finish[R], eager: bool = True) -> None:
        """prepare: takes its time, and is called in another thread."""
        self._prepare, self._finish, self._eager = prepare, finish, eager
        self._asked: Asked | None = None
        self._feed: Feed | None = None
        self._job: Job | None = None
        self._pending: deque[Piece] = deque()
        self._over = False

    async def _fetch(self) -> bool:
        """Wait for more. Returns: whether there may be."""
        if self._over:
            return False
        try:
            if self._asked is None or self._feed is None:
                self._asked = await asyncio.to_thread(self._prepare)
                self._feed = Feed(self._eager)
                self._job = self._asked.ask(self._feed.emit_as(0))
            for _, event in await self._feed.take():
                self._over |= not isinstance(event, Delta)
                self._pending += self._asked.gathered.take(event)
        except BaseException:
            self.close()
            raise
        return True

    async def pieces(self) -> AsyncIterator[Piece]:
        """As `Stream.pieces`."""
        while self._pending or await self._fetch():
            while self._pending:
                yield self._pending.popleft()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while self._pending or await self._fetch():
            while self._pending:
                piece = self._pending.popleft()
                if isinstance(piece, Content):
                    return piece.text
        raise StopAsyncIteration

    async def result(self) -> R:
        """All of the answer, as `Stream.result`. Errors: Cancelled where it was closed before it was asked for."""
        while await self._fetch():
            pass
        if self._asked is None or self._job is None:
            raise Cancelled("the answer was closed before it was asked for")
        return self._finish(self._asked.gathered, self._job)

    def close(self) -> None:
        """Cancel what has not been made. Idempotent."""
        if not self._over:
            self._over = True
            if self._job is not None:
                self._job.cancel()

    async def aclose(self) -> None:
        """As `close`."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_over"):
            self.close()
