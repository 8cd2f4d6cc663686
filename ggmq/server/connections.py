"""Connections as uvicorn has them, with bounds: how many, how long a head may take, how long an answer may lie unread."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ggmq.server.options import ServerOptions

MAX_HEAD_BYTES = 64 << 10
KEEP_ALIVE_S = 20
_FULL = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\nConnection: close\r\n"
         b'\r\n{"error":{"message":"too many connections","type":"unavailable_error","param":null,"code":"overloaded"}}')
_GARBAGE = (b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
            b'{"error":{"message":"this is no HTTP request, or its head is too large",'
            b'"type":"invalid_request_error","param":null,"code":"invalid_http"}}')  # fmt: skip


class Connection(H11Protocol):
    """One connection."""

    options: ServerOptions
    _due: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _since_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since_s = self.loop.time()
        if len(self.connections) > self.options.max_connections and not self._displace():
            transport.write(_FULL)
            self._close()
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if not self._waits:
            self._stop(self._due)
            self._due = None
        elif self._due is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._due, self._unread):
            self._stop(timer)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_GARBAGE)
        self._close()  # in the middle of an answer it is the end of that

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self.send_400_response("")

    def shutdown(self) -> None:
        if self._waits:
            self._close()
        else:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        self._since_s = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing():
            self._linger()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._linger()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop(self._unread)
            self._unread = None

    # -- bounds --------------------------------------------------------------------------------------------------------

    @property
    def _waits(self) -> bool:
        """For a request."""
        return self.cycle is None or self.cycle.response_complete

    def _displace(self) -> bool:
        """Make room for this one: of those on which nothing is being answered the oldest goes, of the address that has most
        of them, so that nobody who only holds connections keeps others out."""
        others = [c for c in self.connections if isinstance(c, Connection) and c is not self and c._idle]
        if not others:
            return False
        n_of = Counter(c._address for c in others)
        most = max(others, key=lambda c: (n_of[c._address], -c._since_s))
        most._close()
        self.connections.discard(most)
        return True

    @property
    def _idle(self) -> bool:
        """Nothing is being answered: no request is there, or not all of it."""
        return self._waits or bool(self.cycle.more_body)

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _await_head(self) -> None:
        self._due = self.loop.call_later(self.options.timeout_s, self._close)

    def _linger(self) -> None:
        """What was written is to be read within a time; then the connection ends."""
        if self._unread is None:
            self._unread = self.loop.call_later(self.options.timeout_s, self.transport.abort)

    def _close(self) -> None:
        self.transport.close()
        self._linger()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def connection_type(options: ServerOptions) -> type[asyncio.Protocol]:
    """The class of this server's connections, as uvicorn takes it."""
    return cast(Any, type("Connection", (Connection,), {"options": options}))
