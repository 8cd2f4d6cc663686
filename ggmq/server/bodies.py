"""What a client sends: read within bounds of size and time, and decoded into the type that is expected."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from ggmq.server.errors import ApiError, bad, undecodable

T = TypeVar("T")
MAX_TOGETHER = 16
"""Bodies of the largest size that may be in memory at once."""


class Bodies:
    """Reads bodies. All that are being read together take MAX_TOGETHER times the bound of one at most."""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._n_bytes = 0

    async def decoded(self, request: Request, kind: type[T]) -> T:
        """Errors: ApiError 400, 408, 413, 415, 503."""
        said = request.headers.get("content-type", "")
        media = said.partition(";")[0].strip().lower()
        if media and media != "application/json" and not media.endswith("+json"):
            raise ApiError(415, f"Content-Type {media[:64]!r}: expected application/json; with curl: -H 'Content-Type: "
                           "application/json'", "unsupported_media_type")  # fmt: skip
        return decode(await self._read(request), kind)

    async def _read(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                async for piece in request.stream():
                    self._n_bytes += len(piece)
                    body += piece
                    if len(body) > self._max_bytes:
                        raise self._too_large()
                    if self._n_bytes > MAX_TOGETHER * self._max_bytes:
                        raise ApiError(503, "too many large requests at once; try again", "overloaded", retry_s=1)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._timeout_s:g} s", "request_timeout",
                           headers={"Connection": "close"}) from None  # fmt: skip
        except ClientDisconnect:
            raise ClientGone from None
        finally:
            self._n_bytes -= len(body)
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._max_bytes} bytes; start the server with a larger --max-body",
                        "request_too_large", headers={"Connection": "close"})  # fmt: skip


class ClientGone(Exception):
    """Whoever asked is not there any more."""


def decode(body: bytes, kind: type[T]) -> T:
    """Errors: ApiError 400 with the path of the field that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as e:
        raise undecodable(e) from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is no UTF-8", "invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body nests too deep", "invalid_json") from None


def convert(value: Any, kind: type[T], path: str) -> T:
    """A part of a body as the type that is expected there. Errors: as `decode`'s."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise undecodable(e, path) from None
    except RecursionError:
        raise bad(path, "nests too deep") from None
