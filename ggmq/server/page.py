"""The page at `/`: files of `web/`, read once, served by name under a strict Content-Security-Policy."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

WEB = Path(__file__).parent / "web"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# A model's text is hostile: whatever it makes the page show, nothing runs and nothing leaves for another host.
# DOMPurify's is the one policy that may turn text into elements.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asked for again each time, and answered by the ETag: a new version is seen at once
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    kind: str
    tag: str


@cache
def _files() -> dict[str, _File]:
    """The page's files by their paths under `web/`; what is not in here is not served."""
    paths = [p for p in sorted(WEB.rglob("*")) if p.suffix in _TYPES]
    bodies = {p: p.read_bytes() for p in paths}
    return {
        p.relative_to(WEB).as_posix(): _File(body, _TYPES[p.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        for p, body in bodies.items()
    }


async def _answer(request: Request) -> Response:
    file = _files().get(request.path_params.get("name", "index.html"))
    if file is None:
        return Response("not a file of the page\n", 404, HEADERS, "text/plain")
    headers = {**HEADERS, "ETag": file.tag}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(None, 304, headers)
    return Response(file.body, 200, headers, file.kind)


def routes() -> list[BaseRoute]:
    """`/` and `/web/...`, for GET and HEAD. They hold no secret, so no key is asked for.

    Threads: any.
    """
    return [Route("/", _answer, methods=["GET"]), Route("/web/{name:path}", _answer, methods=["GET"])]
