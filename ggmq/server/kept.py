"""Responses that later ones may go on from, in memory and within bounds."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from ggmq.chat import Message
from ggmq.server.errors import ApiError

MAX_RESPONSES = 1024
MAX_CHARS = 64 << 20


class Kept(NamedTuple):
    """A response, whose it is, and the conversation with it."""

    key: str
    response: dict[str, Any]
    messages: list[Message]
    n_chars: int


class Responses:
    """What was used last stays; what was not is forgotten when there are too many, or too much text."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_chars: int = MAX_CHARS) -> None:
        self._max_responses, self._max_chars = max_responses, max_chars
        self._by_id: OrderedDict[str, Kept] = OrderedDict()
        self._n_chars = 0

    def keep(self, key: str, response: dict[str, Any], messages: list[Message]) -> None:
        n_chars = sum(len(str(value)) for m in messages for value in m.values())
        self._by_id[response["id"]] = Kept(key, response, messages, n_chars)
        self._n_chars += n_chars
        while len(self._by_id) > self._max_responses or self._n_chars > self._max_chars:
            self._n_chars -= self._by_id.popitem(last=False)[1].n_chars

    def find(self, key: str, id: str, param: str = "") -> Kept:
        """Errors: ApiError 404 for one that is not there, or another's. With `param` it is 400."""
        kept = self._by_id.get(id)
        if kept is None or kept.key != key:
            where = f"{param}: " if param else ""
            raise ApiError(400 if param else 404, f"{where}there is no response {id[:64]!r} any more; send the whole "
                           "conversation as input", "previous_response_not_found" if param else "not_found",
                           param)  # fmt: skip
        self._by_id.move_to_end(id)
        return kept

    def forget(self, key: str, id: str) -> None:
        """Errors: as `find`'s."""
        self._n_chars -= self.find(key, id).n_chars
        del self._by_id[id]
