"""Each request has an id, is counted, and has a line in the log."""

from __future__ import annotations

import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ggmq.log import Level, Log
from ggmq.server.asking import NUMBERS
from ggmq.server.context import ERROR, ROUTE, new_id
from ggmq.server.counts import Metrics

_ASKED_OFTEN = frozenset({"/health", "/metrics", "/slots", "/cluster", "/props", "/v1/models", "other"})


class Watched:
    """The outermost layer."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: Log) -> None:
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        numbers = list[int]()
        NUMBERS.set(numbers)
        id, start, status = new_id("req_"), time.monotonic(), 499  # the client has gone before it had an answer

        async def send_with(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["Request-Id"] = headers["X-Request-Id"] = id  # Anthropic's name, and OpenAI's
            await send(message)

        try:
            await self._app(scope, receive, send_with)
        finally:
            route, error = scope.get(ROUTE, "other"), scope.get(ERROR)
            self._metrics.answered(route, status)
            client = scope.get("client")
            self._log.event(_level(route, status), "answered" if status < 400 else "refused", id=id, route=route,
                            request=",".join(map(str, numbers)) or None, status=status, error=error,
                            seconds=time.monotonic() - start, client=client[0] if client else None)  # fmt: skip


def _level(route: str, status: int) -> Level:
    if status >= 500:
        return "error" if status == 500 else "warning"
    if status >= 400:
        return "warning" if route != "other" or status in (401, 403) else "debug"
    return "debug" if route in _ASKED_OFTEN else "info"
