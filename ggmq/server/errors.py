"""Errors as an API tells them: a status, a body in the shape of the API that was asked, and the field that is wrong."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec
from starlette.responses import Response

from protocol.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    FormatError,
    GgmqError,
    InvalidValue,
    OutOfMemory,
    Overloaded,
    Unavailable,
)

RETRY_S = 2
_FITS = re.compile(r"prompt: (\d+) tokens do not fit a context of (\d+)")
_PLACE = re.compile(r" - at `(?:key in )?\$?\.?([^`]*)`$")


class _Kind(NamedTuple):
    openai: str
    anthropic: str


_KINDS = {
    400: _Kind("invalid_request_error", "invalid_request_error"),
    401: _Kind("authentication_error", "authentication_error"),
    403: _Kind("permission_error", "permission_error"),
    404: _Kind("not_found_error", "not_found_error"),
    405: _Kind("invalid_request_error", "invalid_request_error"),
    408: _Kind("timeout_error", "timeout_error"),
    413: _Kind("invalid_request_error", "request_too_large"),
    415: _Kind("invalid_request_error", "invalid_request_error"),
    429: _Kind("rate_limit_error", "rate_limit_error"),
    500: _Kind("server_error", "api_error"),
    501: _Kind("not_supported_error", "api_error"),
    503: _Kind("unavailable_error", "overloaded_error"),
}


class ApiError(Exception):
    """A request that gets no answer.

    Attributes:
        status: of HTTP. code: a stable word for programs. param: the path of the field that is wrong.
        retry_s: when to try again; 0: not said. headers: more of the answer's.
    """

    def __init__(
        self, status: int, message: str, code: str = "", param: str = "", retry_s: int = 0,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_s, self.headers = retry_s, headers or {}

    def openai(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": _KINDS[self.status].openai, "param": self.param or None,
                          "code": self.code or None}}  # fmt: skip

    def anthropic(self) -> dict[str, Any]:
        where = f"{self.param}: " if self.param and self.param not in self.message else ""
        return {"type": "error", "error": {"type": _KINDS[self.status].anthropic, "message": where + self.message}}

    def body(self, anthropic: bool) -> dict[str, Any]:
        return self.anthropic() if anthropic else self.openai()

    def response(self, anthropic: bool) -> Response:
        headers = dict(self.headers)
        if self.retry_s:
            headers["Retry-After"] = str(self.retry_s)
        return Response(msgspec.json.encode(self.body(anthropic)), self.status, headers, "application/json")


def bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field that is wrong. The message says what was expected."""
    return ApiError(400, f"{param}: {message}" if param else message, code, param)


def too_long(n_prompt: str, n_ctx: int, param: str = "") -> ApiError:
    """A prompt that does not fit, in words by which clients know it."""
    return ApiError(400, f"This model's maximum context length is {n_ctx} tokens, and the prompt has {n_prompt}; make it "
                    "shorter, or start the server with a larger -c", "context_length_exceeded", param)  # fmt: skip


def undecodable(e: msgspec.DecodeError, prefix: str = "") -> ApiError:
    """A body, or the part of it at `prefix`, that is no JSON or has a field of another type or range."""
    text = str(e)
    place = _PLACE.search(text)
    inner = place[1] if place else ""
    missing = re.search(r"missing required field `([^`]*)`", text)
    if missing:
        inner = f"{inner}.{missing[1]}" if inner else missing[1]
    param = prefix + (inner if not prefix or not inner or inner.startswith("[") else f".{inner}")
    what = text[: place.start()] if place else text
    what = what.replace("`", "")
    if not isinstance(e, msgspec.ValidationError):
        return ApiError(400, f"the body is no JSON: {what}", "invalid_json")
    return bad(param, what[:1].lower() + what[1:])


def of_ggmq(e: GgmqError) -> ApiError:
    """What an error of ggmq's own is over HTTP."""
    text = str(e)
    if isinstance(e, InvalidValue):
        return ApiError(400, text, e.code, e.param)
    if isinstance(e, FormatError):
        if fits := _FITS.match(text):
            return too_long(fits[1], int(fits[2]))
        return ApiError(400, text, "invalid_value")
    if isinstance(e, Overloaded):
        return ApiError(429, text, "queue_full", retry_s=RETRY_S)
    if isinstance(e, (Unavailable, DeadlineExceeded, Cancelled, OutOfMemory)):
        return ApiError(503, text, e.code, retry_s=RETRY_S)
    if isinstance(e, ConfigError):
        return ApiError(400, text, e.code)
    if e.retryable:
        return ApiError(503, text, e.code, retry_s=RETRY_S)
    return ApiError(500, text, e.code)
