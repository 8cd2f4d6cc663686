"""From the engine's threads to the loop, and from there to a client: events as they come, until someone goes away."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Self, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ggmq.server.bodies import ClientGone
from ggmq.service import Delta, Event

T = TypeVar("T")
PACE_S = 0.004
QUIET_S = 15.0
"""After so long without an event a stream says that it is alive."""


class Feed:
    """Events of several jobs, by number, in the order in which they came.

    Small models make thousands of tokens a second, and waking the loop for each would take the time to make them. So what
    comes within PACE_S of what was taken last is taken with what follows; and where nobody looks before the end, only the
    end wakes it.
    Threads: `emit` may be called from any.
    """

    def __init__(self, eager: bool = True) -> None:
        """eager: text is wanted as it comes."""
        self._loop, self._eager = asyncio.get_running_loop(), eager
        self._events: deque[tuple[int, Event]] = deque()
        self._there = asyncio.Event()
        self._woken, self._ended = False, False
        self._taken_s = 0.0

    def emit_as(self, number: int) -> Callable[[Event], None]:
        """What a job is given to emit with."""

        def emit(event: Event) -> None:
            self._events.append((number, event))
            ends = not isinstance(event, Delta)
            self._ended |= ends
            if not self._woken and (ends or self._eager):  # at worst it is woken twice
                self._woken = True
                self._loop.call_soon_threadsafe(self._there.set)

        return emit

    async def take(self) -> list[tuple[int, Event]]:
        """All events that are there, once there is one; none after QUIET_S."""
        try:
            async with asyncio.timeout(QUIET_S):
                while not self._events or not (self._eager or self._ended):
                    self._there.clear()
                    await self._there.wait()
        except TimeoutError:
            return []
        wait_s = self._taken_s + PACE_S - self._loop.time()
        if wait_s > 0 and not self._ended:
            await asyncio.sleep(wait_s)
        self._taken_s = self._loop.time()
        self._woken = self._ended = False  # before the events are taken: what comes after it wakes again
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What comes of some work; it is cancelled when the client goes away. Errors: ClientGone, and those of the work."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for t in (task, gone):
            t.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. What makes them is closed when it has ended or the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, pieces: AsyncGenerator[bytes]) -> None:
        self.status_code, self.background = 200, None
        self._first, self._pieces = first, pieces
        self.init_headers({"X-Accel-Buffering": "no"})

    @classmethod
    async def begun(cls, pieces: AsyncGenerator[bytes]) -> Self:
        """A stream whose first piece is there. Errors: what came before that, which is told as an answer of its own."""
        return cls(await anext(pieces), pieces)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._write(send))
        except ClientGone:
            pass
        finally:
            await self._pieces.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def data(value: Any) -> bytes:
    """An event without a name, as OpenAI's streams have them."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def named(value: dict[str, Any]) -> bytes:
    """An event whose name is its type, as Anthropic's streams and responses have them."""
    return b"event: " + str(value["type"]).encode() + b"\n" + data(value)


DONE = b"data: [DONE]\n\n"
ALIVE = b": alive\n\n"
