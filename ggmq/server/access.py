"""Who may ask: API keys, pages of other origins, names that lead here by a trick. Headers that every answer has.

A server that asks for no key and listens on this host alone answers only to its own names (DNS rebinding: a page elsewhere
whose name was made to lead here has that name as its Host), and only to its own pages (Origin).
"""

from __future__ import annotations

import hmac
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ggmq.server.context import ERROR
from ggmq.server.errors import ApiError
from ggmq.server.options import ServerOptions, digest_of, is_loopback

OPEN = frozenset({"/", "/health", "/v1/health"})
"""Paths for which no key is asked: the page asks for it itself."""
_SAFE = {
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}  # fmt: skip
_ALLOWED_HEADERS = "Authorization, Content-Type, X-Api-Key, Anthropic-Version, Anthropic-Beta"


def is_anthropic(path: str) -> bool:
    """Whether errors have Anthropic's shape there."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


class Access:
    """The outermost layer: lets a request through, or answers it."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        origin = headers.get("origin", "")
        cross = self._may_cross(origin)

        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = MutableHeaders(scope=message)
                for name, value in _SAFE.items():
                    more.setdefault(name, value)
                if cross:
                    more["Access-Control-Allow-Origin"] = origin
                    more["Access-Control-Expose-Headers"] = "Retry-After"
                    more["Cross-Origin-Resource-Policy"] = "cross-origin"
                    more.add_vary_header("Origin")
            await send(message)

        try:
            self._check_names(headers, origin, cross)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await self._preflight(cross)(scope, receive, send_with)
                return
            scope["ggmq.key"] = self._key(scope, headers, path)
        except ApiError as e:
            scope[ERROR] = e.code
            await e.response(is_anthropic(path))(scope, receive, send_with)
            return
        await self._app(scope, receive, send_with)

    def _may_cross(self, origin: str) -> bool:
        return bool(origin) and ("*" in self._options.cors_origins or origin in self._options.cors_origins)

    def _check_names(self, headers: Headers, origin: str, cross: bool) -> None:
        host = headers.get("host", "")
        if not self._options.guarded:
            return
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if not is_loopback(name):
            raise ApiError(403, f"Host {host[:256]!r}: this server listens on this host alone and answers to its names only;"
                           " ask it as 127.0.0.1 or localhost, or start it with --api-key", "forbidden_host")  # fmt: skip
        if origin and not cross and origin.partition("://")[2] != host:
            raise ApiError(403, f"Origin {origin[:256]!r}: pages of other origins may not ask; start the server with "
                           "--cors-origin to let one", "forbidden_origin")  # fmt: skip

    def _preflight(self, cross: bool) -> Response:
        if not cross:
            return ApiError(403, "pages of this origin may not ask; start the server with --cors-origin to let them",
                            "forbidden_origin").response(False)  # fmt: skip
        return Response(status_code=204, headers={
            "Access-Control-Allow-Methods": "GET, POST, DELETE", "Access-Control-Allow-Headers": _ALLOWED_HEADERS,
            "Access-Control-Max-Age": "600"})  # fmt: skip

    def _key(self, scope: Scope, headers: Headers, path: str) -> str:
        """Whose turn a request takes: a name made of the API key, or the address it comes from. Errors: 401."""
        client: Any = scope.get("client")
        address = client[0] if client else ""
        if not self._options.keys or path in OPEN or path.startswith("/web/"):
            return address
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        said = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not said:
            raise ApiError(401, "no API key: send Authorization: Bearer KEY, or x-api-key: KEY", "invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        digest, known = digest_of(said), False
        for key in self._options.keys:
            known |= hmac.compare_digest(digest, key)
        if not known:
            raise ApiError(401, "the API key is not one of this server's", "invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        return digest.hex()[:16]
