"""How models write calls: each syntax reads one block of calls, from after its opening marker.

A reader of a syntax returns False as long as what it read may as well be text, and then the text is given back; once a
call has its name it is a call, whatever becomes of it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ggmq.answers.stream import Reading, Stream

_NAME = re.compile(r"[\w.:/$-]{1,256}")
_NAMES, _ARGUMENTS, _IDS = ("name", "tool_name"), ("arguments", "parameters"), ("id", "tool_call_id", "call_id")


class Calls(Protocol):
    """What a syntax reads from and tells of calls.

    Attributes: tools: the parameters' schemas of what may be called, by name.
    """

    stream: Stream
    tools: Mapping[str, Any]

    def begin(self, name: str, id: str = "") -> None:
        """A call begins."""

    def argue(self, text: str) -> None:
        """More of its arguments."""


class Syntax(Protocol):
    """Attributes: openers: what a block of calls begins with. noise: markers around it that mean nothing alone."""

    @property
    def openers(self) -> tuple[str, ...]: ...

    @property
    def noise(self) -> tuple[str, ...]: ...

    def read(self, calls: Calls, opener: str) -> Reading[bool]:
        """Read on after an opener; False when it is no call."""


def is_name(text: str) -> bool:
    """Whether a tool may be called so."""
    return _NAME.fullmatch(text) is not None


def _close(stream: Stream, close: tuple[str, ...], openers: tuple[str, ...]) -> Reading[None]:
    """Read the end of a block, and what is wrong before it; nothing where it does not come."""
    if not close:
        return
    begin = stream.at
    yield from stream.spaces()
    if (yield from stream.literal(*close)):
        return
    _, marker = yield from stream.until(*close, *openers)
    if marker not in close:
        stream.at = begin if not marker else stream.at - len(marker)


# -- JSON that holds the name too --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonCalls:
    """{"name": ..., "arguments": {...}}, or a list of such.

    `wrapped`: also {"tool_calls": [...]}, and {"response": ...} for an answer in words. `known_only`: JSON that is no call
    of a tool which is there is text. `keyed`: {name: arguments}.
    """

    openers: tuple[str, ...]
    close: tuple[str, ...] = ()
    noise: tuple[str, ...] = ()
    wrapped: bool = False
    known_only: bool = False
    keyed: bool = False

    def read(self, calls: Calls, opener: str) -> Reading[bool]:
        stream = calls.stream
        if opener.startswith("{"):  # the opener is, or ends with, the beginning of the JSON
            stream.at -= len(opener)
        elif opener[-1:] == "[":
            stream.at -= 1
        read = False
        while True:
            yield from stream.spaces()
            first = yield from stream.peek()
            if first not in ("{", "[") or not ((yield from (self._list if first == "[" else self._object)(calls))):
                break
            read = True
            if not self.close:
                break
        if read:
            yield from _close(stream, self.close, self.openers)
        return read

    def _list(self, calls: Calls) -> Reading[bool]:
        stream, any_read = calls.stream, False
        yield from stream.literal("[")
        while True:
            yield from stream.spaces()
            if not (yield from self._object(calls)):
                return any_read
            any_read = True
            yield from stream.spaces()
            if not (yield from stream.literal(",")):
                yield from stream.literal("]")
                return True

    def _object(self, calls: Calls) -> Reading[bool]:
        found = _Found(calls, self.known_only)
        whole = yield from self._fields(calls, found, "{")
        return found.end(whole)

    def _fields(self, calls: Calls, found: _Found, opening: str) -> Reading[bool]:
        """The fields of an object; False where it breaks off, or is no call."""
        stream = calls.stream
        if not (yield from stream.literal(opening)):
            return False
        while True:
            yield from stream.spaces()
            key: list[str] = []
            if (yield from stream.peek()) != '"' or not (yield from stream.json(key.append)):
                return bool((yield from stream.literal("}")))
            yield from stream.spaces()
            if not (yield from stream.literal(":")):
                return False
            yield from stream.spaces()
            if not (yield from self._field(calls, found, loaded("".join(key)))):
                return False
            yield from stream.spaces()
            if not (yield from stream.literal(",")):
                return bool((yield from stream.literal("}")))

    def _field(self, calls: Calls, found: _Found, key: str) -> Reading[bool]:
        stream = calls.stream
        first = yield from stream.peek()
        if self.keyed and first == "{" and found.named(key):
            return (yield from stream.json(found.argue))
        if key in _NAMES or (key == "function" and first == '"'):
            name: list[str] = []
            whole = yield from stream.json(name.append)
            return whole and found.named(loaded("".join(name)))
        if key in _ARGUMENTS:
            if first == "{":
                return (yield from stream.json(found.argue))
            other: list[str] = []
            whole = yield from stream.json(other.append)
            found.given("".join(other))
            return whole
        if key == "function" and first == "{":
            return (yield from self._fields(calls, found, "{"))
        if self.wrapped and key in ("tool_calls", "tool_call") and not found.name:
            if first == "[":
                found.inner = yield from self._list(calls)
            else:
                found.inner = yield from self._object(calls)
            return found.inner
        if self.known_only and key not in ("type", *_IDS):
            return False
        value: list[str] = []
        whole = yield from stream.json(value.append)
        if key in _IDS:
            id = loaded("".join(value))
            found.id = id if isinstance(id, str) else str(id)
        return whole


class _Found:
    """A call of which fields come in any order."""

    def __init__(self, calls: Calls, known_only: bool) -> None:
        self._calls, self._known_only = calls, known_only
        self.name = self.id = ""
        self.inner = self._begun = False
        self._held: list[str] = []

    def named(self, name: Any) -> bool:
        if not isinstance(name, str) or not is_name(name) or (self._known_only and name not in self._calls.tools):
            return False
        self.name = name
        return True

    def argue(self, text: str) -> None:
        if not self.name:
            self._held.append(text)
            return
        self._begin()
        self._calls.argue(text)

    def given(self, text: str) -> None:
        """Arguments that are no object: a text that holds one, or nothing."""
        value = loaded(text)
        self.argue(value if isinstance(value, str) and isinstance(loaded(value), dict) else "{}")

    def end(self, whole: bool) -> bool:
        if self.name and whole and not self._begun:
            self.argue("" if self._held else "{}")
        return self._begun or self.inner

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._calls.begin(self.name, self.id)
            for text in self._held:
                self._calls.argue(text)


def loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# -- a name, then JSON -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedCalls:
    """A name, a marker, and the arguments in JSON.

    `name_ends`: what comes after the name. `skips`: what may come before the arguments. `kinds`: words in the place of the
    name, which then comes after it, on a line of its own. `id_marker`: what may come after the name, and an id then.
    `ids_have_names`: an id stands for the name, as functions.name:0. `lists`: or a list of calls in JSON.
    """

    openers: tuple[str, ...]
    name_ends: tuple[str, ...]
    close: tuple[str, ...] = ()
    noise: tuple[str, ...] = ()
    skips: tuple[str, ...] = ()
    id_marker: str = ""
    ids_have_names: bool = False
    lists: bool = False
    kinds: tuple[str, ...] = ()
    known_only: bool = False

    def read(self, calls: Calls, opener: str) -> Reading[bool]:
        stream, id = calls.stream, ""
        if self.lists and (yield from stream.peek()) == "[":
            return (yield from JsonCalls(self.openers, self.close).read(calls, opener))
        name, end = yield from stream.until(*self.name_ends, *((self.id_marker,) if self.id_marker else ()), limit=512)
        if name.strip() in self.kinds and end:
            name, end = yield from stream.until("\n", limit=512)
        if self.id_marker and end == self.id_marker:
            id, end = yield from stream.until(*self.name_ends, limit=512)
        name = name.strip()
        if self.ids_have_names:  # functions.name:0
            id, name = name, name.rpartition(":")[0].removeprefix("functions.") or name
        if not end or not is_name(name) or (self.known_only and name not in calls.tools):
            return False
        if end == "{":
            stream.at -= 1
        yield from stream.spaces()
        for text in self.skips:
            yield from stream.literal(text)
            yield from stream.spaces()
        if (yield from stream.peek()) not in ("{", ""):
            return False
        calls.begin(name, id.strip())
        yield from stream.json(calls.argue)
        yield from _close(stream, self.close, self.openers)
        return True


# -- parameters in tags ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaggedCalls:
    """A tag for each parameter, whose value is text, or JSON where the schema wants no text.

    `function`: what the name stands between. `key`, `value`: what a parameter's name, and its value, stand between.
    `end`: after the parameters. `trims`: a line break after a value's tag, and one before its end, are not part of it.
    """

    openers: tuple[str, ...]
    function: tuple[str, tuple[str, ...]]
    key: tuple[str, tuple[str, ...]]
    value: tuple[str, str]
    end: str = ""
    close: tuple[str, ...] = ()
    noise: tuple[str, ...] = ()
    trims: bool = False

    def read(self, calls: Calls, opener: str) -> Reading[bool]:
        stream = calls.stream
        before, ends = self.function
        bare = opener == before
        any_read = False
        while True:
            if not bare:
                yield from stream.spaces()
                if before and not (yield from stream.literal(before)):
                    break
            name, end = yield from stream.until(*ends, limit=512)
            name = name.strip()
            if not end or not is_name(name) or (bare and name not in calls.tools):
                break
            if end in (self.key[0], *self.close):
                stream.at -= len(end)
            calls.begin(name)
            calls.argue("{")
            if not (yield from self._parameters(calls, calls.tools.get(name))):
                return True  # it breaks off
            calls.argue("}")
            any_read, bare = True, False
            if not before:
                break
        if any_read:
            yield from _close(stream, self.close, self.openers)
        return any_read

    def _parameters(self, calls: Calls, schema: Any) -> Reading[bool]:
        """All parameters; False when the text ends before theirs does."""
        stream, n = calls.stream, 0
        ends = (self.end,) if self.end else self.close
        while True:
            _, marker = yield from stream.until(self.key[0], *ends)
            if marker in ends:
                stream.at -= 0 if self.end else len(marker)
            if marker != self.key[0]:
                return bool(marker)
            key, end = yield from stream.until(*self.key[1], limit=512)
            if not end:
                return False
            if self.value[0]:
                yield from stream.spaces()
                if not (yield from stream.literal(self.value[0])):
                    continue
            kinds = _types(schema, key.strip(' "\n'))
            if end.endswith(('"true">', '"false">')):
                kinds = {"string"} if end.endswith('"true">') else set()
            calls.argue((", " if n else "") + json.dumps(key.strip(' "\n'), ensure_ascii=False) + ": ")
            n += 1
            if not (yield from self._value(calls, kinds)):
                return False

    def _value(self, calls: Calls, kinds: set[str]) -> Reading[bool]:
        stream = calls.stream
        if kinds == {"string"}:
            text = _Quoted(calls.argue, self.trims)
            whole = bool((yield from stream.flow((self.value[1],), text.add)))
            text.end(whole)
            return whole
        raw, end = yield from stream.until(self.value[1])
        if not end:
            return False
        value = loaded(raw)
        if value is None and kinds <= {"array", "object"}:
            value = _literal(raw)
        fits = value is not None or raw.strip() == "null"
        if fits and "string" in kinds and type(value).__name__ in ("int", "float", "bool", "NoneType"):
            fits = bool(kinds & _JSON_TYPES[type(value)])
        if self.trims:
            raw = raw.removeprefix("\n").removesuffix("\n")
        calls.argue(json.dumps(value, ensure_ascii=False) if fits else json.dumps(raw, ensure_ascii=False))
        return True


_JSON_TYPES: dict[type, set[str]] = {int: {"integer", "number"}, float: {"number"}, bool: {"boolean"}, type(None): {"null"}}


def _literal(text: str) -> Any:
    """A value in Python's words, as some templates print lists and mappings."""
    try:
        value = ast.literal_eval(text.strip()) if len(text) < _MAX_LITERAL_CHARS else None
        json.dumps(value, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, (list, dict)) else None


_MAX_LITERAL_CHARS = 1 << 16


def _types(schema: Any, key: str) -> set[str]:
    """The types that a parameter's schema names; none where it says nothing, or nothing sensible."""
    try:
        return _types_of(schema["properties"][key])
    except (KeyError, TypeError, IndexError):
        return set()


def _types_of(schema: Any, depth: int = 0) -> set[str]:
    if not isinstance(schema, dict) or depth > 8:
        return set()
    if "type" in schema:
        return set(schema["type"]) if isinstance(schema["type"], list) else {str(schema["type"])}
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return {"string"} if all(isinstance(v, str) for v in values) else set()
    found: set[str] = set()
    for part in schema.get("anyOf") or schema.get("oneOf") or ():
        found |= _types_of(part, depth + 1)
    return found


class _Quoted:
    """Text as it comes, as a JSON string."""

    def __init__(self, argue: Callable[[str], None], trims: bool) -> None:
        self._argue, self._trims = argue, trims
        self._first, self._held = True, ""
        argue('"')

    def add(self, text: str) -> None:
        if self._trims:
            if self._first and text:
                text = text.removeprefix("\n")
                self._first = False
            text = self._held + text
            self._held = "\n" if text.endswith("\n") else ""
            text = text.removesuffix("\n")
        if text:
            self._argue(json.dumps(text, ensure_ascii=False)[1:-1])

    def end(self, whole: bool) -> None:
        if whole:
            self._argue('"')
