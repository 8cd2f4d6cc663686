"""Reads an answer as it comes: content, thoughts and calls, by what the model's format says of their markers."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ggmq.answers.calls import Syntax, loaded
from ggmq.answers.layout import Layout
from ggmq.answers.pieces import Content, Piece, Reasoning, ToolCall
from ggmq.answers.stream import SPACES, Reading, Stream

NewId = Callable[[int], str]
_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def random_id(index: int) -> str:
    """An id for a call that has none: nine letters and digits, which is what the strictest templates take."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class AnswerReader:
    """Text goes in as it is made, pieces come out as soon as it is clear what they are.

    White space between parts is dropped; a text that holds no marker comes out as it is. Nothing that a model writes
    is an error: what is no call is content.

    Attributes: has_calls: a call was found.
    """

    def __init__(
        self,
        layout: Layout,
        tools: Mapping[str, Any],
        reasoning: bool,
        prompt_tail: str,
        thinking: bool,
        new_id: NewId | None = None,
    ) -> None:
        self.stream = Stream()
        self.tools = tools
        self._layout, self._reasoning, self._thinking = layout, reasoning, thinking
        self._syntaxes: Sequence[Syntax] = layout.calls if tools else ()
        self._new_id = new_id or random_id
        self._n_calls = 0
        self._out: list[Piece] = []
        self._kind: type[Content] | type[Reasoning] = Content
        self._held = ""
        self._drops = False
        self._reading: Iterator[None] = self._channels(prompt_tail) if layout.channels else self._parts(prompt_tail)
        next(self._reading, None)

    @property
    def has_calls(self) -> bool:
        return self._n_calls > 0

    def feed(self, text: str) -> list[Piece]:
        """What is known of the answer with more of its text."""
        if text:
            self.stream.text += text
            next(self._reading, None)
        return self._taken()

    def finish(self) -> list[Piece]:
        """The rest: no more text comes."""
        self.stream.ended = True
        for _ in self._reading:
            pass
        if self._held:
            self._put(self._kind(self._held))
            self._held = ""
        return self._taken()

    # -- what a syntax tells -------------------------------------------------------------------------------------------

    def begin(self, name: str, id: str = "") -> None:
        """A call begins: what was held back before it was white space between parts."""
        self._part()
        self._n_calls += 1
        self._put(ToolCall(self._n_calls - 1, id or self._new_id(self._n_calls - 1), name, ""))

    def argue(self, text: str) -> None:
        """More of the last call's arguments."""
        self._put(ToolCall(self._n_calls - 1, "", "", text))

    # -- parts with markers --------------------------------------------------------------------------------------------

    def _parts(self, prompt_tail: str) -> Reading[None]:
        layout, stream = self._layout, self.stream
        if layout.prompt_opens and prompt_tail.endswith(layout.prompt_opens):
            stream.text = layout.prompt_opens
        openers = {o: s for s in self._syntaxes for o in s.openers}
        noise = {n for s in self._syntaxes for n in s.noise} | set(layout.noise if self._reasoning else ())
        think = layout.thoughts if self._reasoning else ()
        begun = layout.begun(prompt_tail, self._thinking) if think else None
        if begun:
            begin, end = begun
            self._part()
            yield from stream.spaces()
            yield from stream.literal(begin)  # some models say it again
            yield from self._thoughts(end, openers)
        fresh = True
        while True:
            if fresh:
                self._say(Content, (yield from stream.spaces()))
                begin = yield from stream.literal(*(b for b, _ in think))
                if begin:
                    self._part()
                    yield from self._thoughts(dict(think)[begin], openers)
                    continue
                if self.tools and (yield from self._bare()):
                    continue
                fresh = False
            marker = yield from stream.flow((*openers, *noise), self._content)
            if not marker:
                return
            if marker in openers:
                fresh = yield from self._called(openers[marker], marker)
                if not fresh:
                    self._say(Content, marker)
            else:
                self._part()
                fresh = True

    def _called(self, syntax: Syntax, opener: str) -> Reading[bool]:
        """Read calls; or nothing, when there are none."""
        at = self.stream.at
        if (yield from syntax.read(self, opener)):
            self._part()
            return True
        self.stream.at = at
        return False

    def _bare(self) -> Reading[bool]:
        """A call without a marker: the answer, or what comes after a call, begins with JSON that names a tool."""
        bare, stream = self._layout.bare, self.stream
        if bare is None:
            return False
        begin = stream.at
        if self._n_calls:
            yield from stream.literal(";")
            yield from stream.spaces()
        fence = yield from stream.literal(*(("```json", "```") if bare.wrapped else ("<|python_tag|>",)))
        yield from stream.spaces()
        if (yield from stream.peek()) in ("{", "["):
            at = stream.at
            if (yield from bare.read(self, "")):
                yield from stream.spaces()
                if fence.startswith("```"):
                    yield from stream.literal("```")
                self._part()
                return True
            stream.at = at
            if bare.wrapped and (yield from self._response()):
                return True
        stream.at = begin
        return False

    def _response(self) -> Reading[bool]:
        """{"response": "..."}: an answer in words from a model that was asked for JSON."""
        stream = self.stream
        for text in ("{", '"response"', ":"):
            yield from stream.spaces()
            if not (yield from stream.literal(text)):
                return False
        yield from stream.spaces()
        value: list[str] = []
        if (yield from stream.peek()) != '"' or not (yield from stream.json(value.append)):
            return False
        yield from stream.spaces()
        if not (yield from stream.literal("}")):
            return False
        self._part()
        self._say(Content, loaded("".join(value)))
        return True

    def _thoughts(self, end: str, openers: Mapping[str, Syntax]) -> Reading[None]:
        """Up to their end, or to a call where a model does not say that they end."""
        calls = tuple(openers) if self._layout.calls_end_thoughts else ()
        while True:
            marker = yield from self.stream.flow((end, *calls), self._thought)
            if marker in calls and not (yield from self._called(openers[marker], marker)):
                self._say(Reasoning, marker)
                continue
            self._part()
            return

    # -- channels ------------------------------------------------------------------------------------------------------

    def _channels(self, prompt_tail: str) -> Reading[None]:
        """<|channel|>NAME to=RECIPIENT<|message|>TEXT<|end|><|start|>assistant, and so on."""
        stream = self.stream
        header, inside, _ = prompt_tail[max(0, prompt_tail.rfind("<|start|>")) :].partition("<|message|>")
        if inside:  # the prompt ends within a message
            yield from self._message(header)
        while True:
            yield from stream.literal("<|start|>assistant", "<|start|>")
            begin = stream.at
            if (yield from stream.literal("<|channel|>", " to=")):
                _, marker = yield from stream.until("<|message|>", limit=1024)
                if marker:
                    self._part()
                    yield from self._message(stream.text[begin : stream.at])
                    continue
                stream.at = begin
            if not (yield from stream.peek()):
                return
            self._say(Content, stream.text[stream.at])
            stream.at += 1
            marker = yield from stream.flow(("<|start|>", "<|channel|>"), self._content)
            stream.at -= len(marker)

    def _message(self, header: str) -> Reading[None]:
        stream = self.stream
        to, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        if to and self.tools and to[1] not in ("assistant", "user", "all"):
            yield from stream.spaces()
            if (yield from stream.peek()) in ("{", ""):
                self.begin(to[1])
                yield from stream.json(self.argue)
                _, marker = yield from stream.until(*_ENDS)
                if marker == "<|start|>":
                    stream.at -= len(marker)
                return
        thinks = self._reasoning and channel is not None and channel[1] == "analysis"
        marker = yield from stream.flow(_ENDS, self._thought if thinks else self._content)
        self._part()
        if marker == "<|start|>":
            stream.at -= len(marker)

    # -- what comes out ------------------------------------------------------------------------------------------------

    def _content(self, text: str) -> None:
        self._say(Content, text)

    def _thought(self, text: str) -> None:
        self._say(Reasoning, text)

    def _say(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        """Text that is shown, but for white space at its end, which may be that between parts."""
        self._kind = kind
        if self._drops:
            text = text.lstrip(SPACES)
            self._drops = not text
        text = self._held + text
        shown = text.rstrip(SPACES)
        self._held = text[len(shown) :]
        if shown:
            self._put(kind(shown))

    def _part(self) -> None:
        """Another part begins."""
        self._held, self._drops = "", True

    def _put(self, piece: Piece) -> None:
        last = self._out[-1] if self._out else None
        if isinstance(piece, ToolCall):
            if isinstance(last, ToolCall) and last.index == piece.index:
                self._out[-1] = ToolCall(last.index, last.id, last.name, last.arguments + piece.arguments)
                return
        elif isinstance(last, Content | Reasoning) and type(last) is type(piece):
            self._out[-1] = type(piece)(last.text + piece.text)
            return
        self._out.append(piece)

    def _taken(self) -> list[Piece]:
        out, self._out = self._out, []
        return out


_RECIPIENT = re.compile(r" ?to=(?:functions\.)?([\w.:/-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_ENDS = ("<|end|>", "<|start|>", "<|call|>", "<|return|>")
