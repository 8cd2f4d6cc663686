"""What a model's texts need besides the model: its chat template, the format of its answers, the forms they may have."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

from ggmq.answers import AnswerFormat, AnswerReader, Content
from ggmq.answers import Piece as Part
from ggmq.chat import ChatTemplate, Message
from ggmq.conversation import wrong
from ggmq.grammar import Grammar, Grammars
from ggmq.sampling import SamplingParams
from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError

Kind = Literal["json_object", "json_schema", "regex", "grammar"]
"""What gives the form of an answer."""


@dataclass(slots=True)
class Talk:
    """A conversation that is to go on.

    Attributes:
        messages, tools: as OpenAI's chat completions have them.
        choice: "none", "auto", "required", or the name of the tool that is to be called.
        parallel: several tools may be called at once.
        thinking: the model is to think first, if its template can choose; extra: more variables of the template.
        continues: the last message is an answer that goes on.
        paths: of messages and tools in what was asked, for errors.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    choice: str = "auto"
    parallel: bool = True
    thinking: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    continues: bool = False
    paths: tuple[str, str] = ("messages", "tools")

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Tools that the model is told of."""
        return self.tools if self.choice != "none" else []

    def check(self) -> None:
        """Errors: InvalidValue for tools that come twice or are chosen and not there."""
        names = [t["function"]["name"] for t in self.tools]
        if len(set(names)) != len(names):
            raise wrong(self.paths[1], "expected a name of its own for each tool")
        if self.choice == "required" and not names:
            raise wrong("tool_choice", "expected tools where one is required")
        if self.choice not in ("none", "auto", "required", *names):
            known = ", ".join(names) or "none"
            raise wrong("tool_choice", f"there is no tool {self.choice[:64]!r}; expected one of {known}")


class Reader(Protocol):
    """Takes an answer's text apart as it comes."""

    @property
    def has_calls(self) -> bool: ...

    def feed(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...


class PlainReader:
    """All text is content."""

    has_calls = False

    def feed(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def finish(self) -> list[Part]:
        return []


class Spoken(NamedTuple):
    """How an answer of a conversation is written: control tokens that are part of its text, what takes it apart, and the
    Lark grammar that holds its calls to their form, where there is one; `path`: the argument that it comes from."""

    preserved: frozenset[int]
    reader: Callable[[], AnswerReader]
    lark: str | None
    path: str


class Texts:
    """Of one vocabulary. Threads: any; templates are rendered one at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.grammars = vocabulary, Grammars(vocabulary)
        self._lock = threading.Lock()
        self._template: ChatTemplate | None = None
        self._formats: dict[str, AnswerFormat] = {}

    def format(self, with_tools: bool) -> AnswerFormat:
        """How answers are written; by some models otherwise where there are tools."""
        v = self.vocabulary
        source = (with_tools and v.tool_template) or v.chat_template
        known = self._formats.get(source)
        if known is None:
            known = self._formats[source] = AnswerFormat.of(source, v)
        return known

    def render(self, messages: Sequence[Message], how: Mapping[str, Any]) -> str:
        """The prompt of a conversation, as `ChatTemplate.render` makes it."""
        with self._lock:
            if self._template is None:
                self._template = ChatTemplate(self.vocabulary)
            return self._template.render(messages, **how)

    def form(self, kind: Kind, source: Any, path: str) -> Grammar:
        """What an answer must be. Errors: InvalidValue for a form that is none."""
        try:
            match kind:
                case "json_object":
                    return self.grammars.json_object(path)
                case "json_schema":
                    return self.grammars.json_schema(source, path)
                case "regex":
                    return self.grammars.regex(source, path)
                case "grammar":
                    return self.grammars.any(source, path)
        except FormatError as e:
            raise wrong(path, str(e).removeprefix(f"{path}: ")) from None

    def spoken(self, talk: Talk, prompt: str) -> Spoken:
        """How the answer to a conversation is written, whose prompt ends in this text."""
        written, tools = self.format(bool(talk.offered)), talk.offered
        thoughts = talk.continues and "reasoning_content" in talk.messages[-1] and not talk.messages[-1].get("content")
        lark = written.constraint(tools, talk.choice, talk.parallel, prompt, thoughts) if tools else None
        path = "tool_choice" if talk.choice != "auto" else talk.paths[1]
        return Spoken(written.preserved, lambda: written.reader(tools, True, prompt, thoughts), lark, path)

    def params(
        self, base: SamplingParams, said: Mapping[str, Any], ignore_eos: bool, bias: Mapping[str, float | bool]
    ) -> SamplingParams:
        """How tokens are taken.

        said: fields of SamplingParams in place of `base`'s, where they are not None. bias: what is added to logits, by
        token; False: it is never taken. Errors: InvalidValue for a token that there is not.
        """
        v, biases = self.vocabulary, []
        banned = v.suppressed | (v.end_ids if ignore_eos else frozenset())
        for token, added in bias.items():
            if not token.isdecimal() or not int(token) < len(v.tokens):
                raise wrong("logit_bias", f"expected tokens of 0 to {len(v.tokens) - 1}, got {token[:32]}")
            if added is False:
                banned |= {int(token)}
            elif added:
                biases.append((int(token), float(added)))
        given: dict[str, Any] = {k: x for k, x in said.items() if x is not None}
        if given.get("seed") is not None:
            given["seed"] &= 0xFFFFFFFF
        return replace(base, banned=banned, logit_bias=tuple(biases), **given)
