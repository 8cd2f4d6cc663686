"""From the loop to a client: events as they come, until someone goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Self, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ggmq.server.bodies import ClientGone

T = TypeVar("T")


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
