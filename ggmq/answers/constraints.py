"""Grammars for calls: in a format's own words, with arguments that fit their schemas.

Source: llguidance's docs/syntax.md for the dialect of Lark: `%json` for schemas, `<[7]>` for a token, `[lazy]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ggmq.special import Splitter

Schema = Mapping[str, Any]
_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as models are shown it, and no white space without end."""


@dataclass(frozen=True)
class Forced:
    """A block of calls: `begin`, calls with `between` between them, `end`. A call: `before`, its name, `named`, its
    arguments, `after`.

    Attributes:
        trigger: that beginning of a block by which it is known to be one; empty where it is known only as a whole answer.
        arguments: json; tags, where each has the texts of `tags` before its name, after it and after its value; words, with
            those of `tags` between name and value, between arguments, and around texts, which are JSON's where it is empty.
        numbered: what a call's number stands after, where calls are numbered.
    """

    before: str
    named: str
    after: str
    begin: str = ""
    between: str = ""
    end: str = ""
    trigger: str = ""
    arguments: Literal["json", "tags", "words"] = "json"
    tags: tuple[str, str, str] = ("=", ", ", "")
    numbered: bool = False


def grammar(
    form: Forced,
    tools: Mapping[str, Any],
    required: bool,
    parallel: bool,
    splitter: Splitter,
    opened: str,
    thoughts: Sequence[tuple[str, str]],
    noise: Sequence[str],
) -> str:
    """A Lark grammar for answers with calls of these tools.

    `required`: nothing but calls, after thoughts; otherwise text, in which what begins as a call is one. `parallel`: more
    than one call. `splitter`: splits control tokens out of a text, which no pattern matches. `opened`: what ends the
    thoughts that the prompt has begun.
    """
    lark = _Lark(splitter)
    call = lark.rule("call", " | ".join(lark.call(form, name, schema) for name, schema in tools.items()))
    first = form.begin + form.before
    more = f" ({lark.text(form.between + form.before)} {call})*" if parallel else ""
    if required:
        before = f"{lark.until(opened)} WS " if opened else ""
        if not opened and thoughts:
            before = "(" + " | ".join(f"{lark.text(b)} {lark.until(e)} WS" for b, e in thoughts) + ")? "
        start = f"{before}{lark.text(first)} {call}{more} {lark.text(form.end)}"
    else:
        start = lark.lazy(form, first, f"{call}{more if form.begin or form.end else ''} {lark.text(form.end)}", parallel)
        controls = [lark.text(n) for n in noise if lark.is_token(n)]
        for begin, end in thoughts:
            if lark.is_token(end):
                before = lark.until(end) if opened == end else f"({lark.text(begin)} {lark.until(end)})?"
                start = f"{before} {start}"
        end = "end: " + (f"(ANY | {' | '.join(controls)})*" if controls else "ANY")
        lark.lines.append(end)
    return "\n".join([f"start: {start}", *lark.lines, r"ANY: /(.|\n)*/", r"WS: /[ \n]{0,4}/", ""])


class _Lark:
    """Writes rules."""

    def __init__(self, splitter: Splitter) -> None:
        self.lines: list[str] = []
        self._splitter = splitter

    def rule(self, name: str, body: str) -> str:
        self.lines.append(f"{name}: {body}")
        return name

    def _new(self, kind: str, body: str, option: str = "") -> str:
        name = f"{kind}_{len(self.lines)}"
        self.lines.append(f"{name}{option}: {body}")
        return name

    def text(self, text: str) -> str:
        """Exactly this text; nothing gives an empty expression."""
        return " ".join(f"<[{p}]>" if isinstance(p, int) else json.dumps(p, ensure_ascii=False)
                        for p in self._splitter.split(text))  # fmt: skip

    def is_token(self, text: str) -> bool:
        return [type(p) for p in self._splitter.split(text)] == [int]

    def until(self, text: str) -> str:
        """Anything up to and with this text."""
        pieces = list(self._splitter.split(text))
        if isinstance(pieces[0], int):
            return f"ANY {self.text(text)}"
        rest = text[len(pieces[0]) :]
        return f"{self._new('until', _anything_up_to(pieces[0]), '[lazy]')} {self.text(rest)}".rstrip()

    def lazy(self, form: Forced, first: str, rest: str, parallel: bool) -> str:
        """Text in which calls may be."""
        if not form.trigger:  # a call is the whole answer, which is known by its beginning
            begin = first.rstrip(' "')
            plain = self._new("PLAIN", f"/(?s:.*)/ & ~/[ \\n]*{_escaped(begin)}(?s:.*)/")
            return f"({self.text(first)} {rest} WS | {plain})"
        head = f"{self.until(form.trigger)} {self.text(first[len(form.trigger) :])} {rest}"
        return f"({head})* end" if parallel else f"(end | {head} WS)"

    # -- a call --------------------------------------------------------------------------------------------------------

    def call(self, form: Forced, name: str, schema: Schema) -> str:
        number = "NUMBER " if form.numbered else ""
        if form.numbered and not any(line.startswith("NUMBER:") for line in self.lines):
            self.lines.append("NUMBER: /[0-9]{1,3}/")
        arguments = {"json": self._json_arguments, "tags": self._tags, "words": self._words}[form.arguments](form, schema)
        return " ".join(p for p in (self.text(name), ('":" ' + number).strip() if number else "", self.text(form.named),
                                    arguments, self.text(form.after)) if p)  # fmt: skip

    def _json(self, schema: Schema) -> str:
        return self._new("json", "%json " + json.dumps({**schema, "x-guidance": _FORM}, ensure_ascii=False))

    def _json_arguments(self, form: Forced, schema: Schema) -> str:
        closed = {"type": "object", "properties": {}, "additionalProperties": False}
        composed = schema.keys() & {"$ref", "anyOf", "oneOf", "allOf"}
        return self._json(schema if composed else {**closed, **schema})

    def _parameters(self, schema: Schema) -> list[tuple[str, Schema, bool]]:
        """Names, schemas with what they refer to, and whether they are required."""
        shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
        required, properties = schema.get("required"), schema.get("properties")
        return [(name, {**part, **shared} if isinstance(part, Mapping) else shared,
                 isinstance(required, list) and name in required)
                for name, part in (properties.items() if isinstance(properties, Mapping) else ())]  # fmt: skip

    def _texts(self, part: Schema) -> tuple[bool, list[str]]:
        """Whether a parameter is a text, and the texts that it may be; none: any."""
        values = part.get("enum", [part["const"]] if "const" in part else [])
        values = values if isinstance(values, list) and all(isinstance(v, str) for v in values) else []
        return bool(values) or (part.get("type") == "string" and not part.keys() & {"enum", "const"}), values

    def _text_up_to(self, values: Sequence[str], closing: str) -> str:
        if not values:
            return self.until(closing)
        return "(" + " | ".join(self.text(v) or '""' for v in values) + f") {self.text(closing)}"

    def _tags(self, form: Forced, schema: Schema) -> str:
        out = []
        before, after, closing = form.tags
        for name, part, required in self._parameters(schema):
            is_text, values = self._texts(part)
            value = self._text_up_to(values, closing) if is_text else f"{self._json(part)} {self.text(closing)}"
            key = self.text(before + name + after.replace("%", "true" if is_text else "false"))
            out.append(f"{key} {value}" if required else f"({key} {value})?")
        return " ".join(out)

    def _words(self, form: Forced, schema: Schema) -> str:
        assign, comma, quote = form.tags
        first = more = '""'
        for name, part, required in reversed(self._parameters(schema)):
            is_text, values = self._texts(part)
            quoted = quote and is_text
            value = f"{self.text(quote)} {self._text_up_to(values, quote)}" if quoted else self._json(part)
            word, next_word = f"{self.text(name + assign)} {value}", self.text(comma)
            if required:
                first, more = self._new("words", f"{word} {more}"), self._new("words", f"{next_word} {word} {more}")
            else:
                first, more = (self._new("words", f"{word} {more} | {first}"),
                               self._new("words", f"{next_word} {word} {more} | {more}"))  # fmt: skip
        return first


def _escaped(text: str) -> str:
    return re.escape(text).replace("\\\n", "\\n").replace("\n", "\\n").replace("/", "\\/")


def _anything_up_to(text: str) -> str:
    return f"/(.|\\n)*{_escaped(text)}/"
