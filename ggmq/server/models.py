"""Served models as requests find them: by name, with the thread in which their templates and texts are worked on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ggmq.chat import Message
from ggmq.server.errors import ApiError, of_ggmq, too_long
from ggmq.service import Service
from ggmq.texts import Texts
from ggmq.tokenizer import Vocabulary
from protocol.errors import GgmqError

T = TypeVar("T")


class ServedModel:
    """A model and what is known of it. Rendering and tokenizing take their time in a thread, a request after the other."""

    def __init__(self, name: str, service: Service) -> None:
        self.name, self.service, self.created = name, service, int(time.time())
        self._thread = ThreadPoolExecutor(1, f"texts of {name}")
        self.texts = Texts(service.vocabulary)
        self._longest = max(len(self.vocabulary.piece(i, True)) for i in range(len(self.vocabulary.tokens)))

    @property
    def vocabulary(self) -> Vocabulary:
        return self.service.vocabulary

    @property
    def n_ctx(self) -> int:
        return self.service.model.n_ctx

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def aside(self, work: Callable[[], T]) -> T:
        """Something that takes its time, in this model's thread. Errors: ApiError for what ggmq finds wrong."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except GgmqError as e:
            raise of_ggmq(e) from e

    async def encode(
        self, text: str, add_special: bool = True, parse_special: bool = True, path: str = ""
    ) -> list[int]:
        """Tokens of a text. Errors: ApiError 400 for one that cannot fit, where `path` says which field it is."""
        if path:
            self._check(text, path)
        return await self.aside(lambda: self.vocabulary.encode(text, add_special, parse_special))

    async def render(self, messages: Sequence[Message], **how: Any) -> str:
        """The prompt of a conversation, as `ChatTemplate.render` makes it."""
        return await self.aside(lambda: self.texts.render(messages, how))

    async def encode_chat(self, messages: Sequence[Message], **how: Any) -> tuple[list[int], str]:
        """Tokens of a conversation's prompt, and its text. Errors: ApiError 400."""
        for message in messages:
            if isinstance(content := message.get("content"), str):
                self._check(content, "messages")

        def work() -> tuple[list[int], str]:
            text = self.texts.render(messages, how)
            self._check(text, "messages")
            return self.vocabulary.encode(text), text

        return await self.aside(work)

    def _check(self, text: str, path: str) -> None:
        """Refuse at once what is so long that it has too many tokens, however it is divided."""
        n_least = len(text.encode("utf-8", "replace")) // self._longest
        if n_least > self.n_ctx:
            raise too_long(f"at least {n_least}", self.n_ctx, path)


class Models:
    """The models of a server, by name."""

    def __init__(self, services: Mapping[str, Service]) -> None:
        self.by_name = {name: ServedModel(name, service) for name, service in services.items()}

    def find(self, name: str) -> ServedModel:
        """The model of a name; where there is one only it has every name, as clients send all kinds.

        Errors: ApiError 404.
        """
        if len(self.by_name) == 1:
            return next(iter(self.by_name.values()))
        if name not in self.by_name:
            said = f"there is no model {name[:256]!r}" if name else "no model is named, and there are several"
            raise ApiError(404, f"{said}; expected one of {', '.join(self.by_name)}", "model_not_found", "model")
        return self.by_name[name]

    def close(self) -> None:
        for model in self.by_name.values():
            model.close()
