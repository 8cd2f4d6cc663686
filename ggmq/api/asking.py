"""From a prompt or a conversation with its options to a request of a service."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from ggmq.answers import AnswerReader
from ggmq.api.answers import Asked, Gathered
from ggmq.api.options import ChatOptions, GenerateOptions, checked, converted
from ggmq.conversation import ChatMessage, Tool, continues, messages_of, tools_of, wrong
from ggmq.grammar import Grammar
from ggmq.sampling import SamplingParams
from ggmq.service import Request, Service
from ggmq.texts import Kind, PlainReader, Reader, Talk, Texts

Prompt = str | Sequence[int] | npt.NDArray[np.integer[Any]]
"""A text, or its tokens."""
Messages = str | Sequence[Mapping[str, Any]]
"""What the user says, or a conversation as OpenAI's chat completions have it."""

_PARAMS = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "presence_penalty",
           "frequency_penalty")  # fmt: skip
_MESSAGES = Annotated[list[ChatMessage], Meta(min_length=1)]


class Asker:
    """Of one model. Threads: any."""

    def __init__(self, service: Service) -> None:
        self._service, self.texts = service, Texts(service.vocabulary)

    def tokens_of(self, prompt: Prompt, path: str = "prompt", parse_special: bool = True) -> list[int]:
        """Errors: InvalidValue for what is neither a text nor tokens."""
        if isinstance(prompt, str):
            return self.texts.vocabulary.encode(prompt, parse_special=parse_special)
        numbers = np.asarray(prompt)
        if numbers.ndim != 1 or (numbers.size and not np.issubdtype(numbers.dtype, np.integer)):
            raise wrong(path, f"expected a text or its tokens, got {type(prompt).__name__}")
        return [int(t) for t in numbers]

    def generate(self, prompt: Prompt, options: Mapping[str, Any]) -> Asked:
        """A text that goes on. Errors: InvalidValue, FormatError."""
        said = checked(GenerateOptions, options, "generate")
        grammar, _ = self._form(said)
        return self._asked(self.tokens_of(prompt), said, PlainReader, grammar)

    def chat(self, messages: Messages, options: Mapping[str, Any]) -> Asked:
        """A conversation that goes on. Errors: InvalidValue, FormatError for what the template refuses."""
        said = checked(ChatOptions, options, "chat")
        talk = self._talk(messages, said)
        grammar, path = self._form(said)
        reader: Callable[[], Reader] | None = None
        if grammar is not None:  # it is of the whole answer: there is no place for thoughts, nor for calls
            if talk.offered and talk.choice != "auto":
                raise wrong("tool_choice", f"a call is wanted, and {path} wants another answer; leave one of them out")
            talk.thinking, reader = False, PlainReader
        prompt = self.texts.render(talk.messages, {
            "add_generation_prompt": not talk.continues, "tools": talk.offered, "enable_thinking": talk.thinking,
            "extra": talk.extra, "continue_final": talk.continues})  # fmt: skip
        tokens = self.texts.vocabulary.encode(prompt)
        if reader is not None:
            return self._asked(tokens, said, reader, grammar)
        spoken = self.texts.spoken(talk, prompt)
        if spoken.lark is not None:
            grammar = self.texts.grammars.lark(spoken.lark, spoken.path)
        return self._asked(tokens, said, spoken.reader, grammar, spoken.preserved)

    def _talk(self, messages: Messages, said: Mapping[str, Any]) -> Talk:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        given = messages_of(converted(list(messages), _MESSAGES, "messages"))
        tools = tools_of(converted(list(said.get("tools", ())), list[Tool], "tools"))
        talk = Talk(given, tools, said.get("tool_choice", "auto"), said.get("parallel_tool_calls", True),
                    said.get("enable_thinking", True), dict(said.get("chat_template_kwargs", {})),
                    continues(given, said.get("continue_final_message"), None))  # fmt: skip
        talk.check()
        return talk

    def _form(self, said: Mapping[str, Any]) -> tuple[Grammar | None, str]:
        """What the answer must be, and the option that says so. Errors: InvalidValue for one that is none, or for two."""
        named = [name for name in ("grammar", "json_schema", "regex", "choices") if said.get(name) not in (None, False, "")]
        if not named:
            return None, ""
        if len(named) > 1:
            raise wrong(named[1], f"the form of the answer is given by {named[0]} already")
        name, source = named[0], said[named[0]]
        kind: Kind = "grammar"
        if name == "json_schema":
            kind = "json_object" if source is True else "json_schema"
        elif name == "choices":
            kind, source = "regex", "|".join(map(re.escape, source))
        elif name == "regex":
            kind = "regex"
        return self.texts.form(kind, source, name), name

    def _asked(
        self, tokens: list[int], said: Mapping[str, Any], reader: Callable[[], Reader | AnswerReader],
        grammar: Grammar | None, preserved: frozenset[int] = frozenset(),
    ) -> Asked:  # fmt: skip
        taken = {name: said.get(name) for name in _PARAMS}
        taken["seed"] = said["seed"] if said.get("seed", -1) >= 0 else None
        bias = {str(token): added for token, added in said.get("logit_bias", {}).items()}
        params = self.texts.params(SamplingParams(), taken, said.get("ignore_eos", False), bias)
        n_probs = said.get("logprobs", False)
        n_probs = -1 if n_probs is False else int(n_probs) if n_probs is not True else 0
        request = Request(tokens, params, said.get("max_tokens", -1), self._stops(said), n_probs, "", preserved, grammar)
        self._service.check(tokens)
        return Asked(lambda emit: self._service.submit(request, emit), Gathered(reader(), n_probs >= 0))

    @staticmethod
    def _stops(said: Mapping[str, Any]) -> tuple[str, ...]:
        stop = said.get("stop", ())
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stops:
            raise wrong("stop", "expected a text that is not empty")
        return stops
