"""JSON that comes in pieces: how far a value reaches, without waiting for its end."""

from __future__ import annotations

import re

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]*")
_SCALARS = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_SPACES = " \t\n\r"
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
MAX_DEPTH = 128


class JsonScanner:
    """Follows one JSON value.

    Control characters in a string, which models write and JSON forbids, come out escaped.

    Attributes: done: the value is whole. broken: what came is no JSON.
    """

    def __init__(self) -> None:
        self.done = self.broken = False
        self._stack: list[str] = []
        self._expects = "value"
        self._key = False
        self._scalar = ""

    def feed(self, text: str, at: int = 0) -> tuple[str, int]:
        """What of the text belongs to the value, as JSON, and where the rest begins."""
        out: list[str] = []
        while at < len(text) and not self.done and not self.broken:
            c = text[at]
            if self._expects == "string":
                if plain := _PLAIN.match(text, at):
                    out.append(plain[0])
                    at = plain.end()
                    continue
                at += 1
                out.append(c if c >= " " else _ESCAPES.get(c, f"\\u{ord(c):04x}"))
                if c == "\\":
                    self._expects = "escape"
                elif c == '"':
                    self._string_ended()
            elif self._expects == "scalar":
                more = _SCALAR.match(text, at)
                assert more is not None  # it matches nothing too
                self._scalar += more[0]
                out.append(more[0])
                at = more.end()
                if at < len(text):
                    self._scalar_ended()
            elif self._expects in ("escape", "u1", "u2", "u3", "u4"):
                self._escaped(c)
                out.append(c)
                at += 1
            elif c in _SPACES:
                out.append(c)
                at += 1
            else:
                at = self._structure(c, at, out)
        return "".join(out), at

    def end(self) -> None:
        """Nothing more comes: a number is whole by that."""
        if self._expects == "scalar" and not self.done:
            self._scalar_ended()

    def _structure(self, c: str, at: int, out: list[str]) -> int:
        expects = self._expects
        if expects in ("value", "value or end") and c not in "]},:":
            if c == '"':
                self._expects, self._key = "string", False
            elif c in "{[":
                self._stack.append(c)
                self._expects = "key or end" if c == "{" else "value or end"
                self.broken = len(self._stack) > MAX_DEPTH
            elif c in "-tfn" or c.isdigit():
                self._expects, self._scalar = "scalar", ""
                return at
            else:
                self.broken = True
                return at
        elif expects in ("key", "key or end") and c == '"':
            self._expects, self._key = "string", True
        elif expects == "colon" and c == ":":
            self._expects = "value"
        elif expects == "comma or end" and c == ",":
            self._expects = "key" if self._stack[-1] == "{" else "value"
        elif self._stack and expects.endswith("or end") and c == ("}" if self._stack[-1] == "{" else "]"):
            self._stack.pop()
            self._value_ended()
        else:
            self.broken = True
            return at
        out.append(c)
        return at + 1

    def _string_ended(self) -> None:
        if self._key:
            self._expects = "colon"
        else:
            self._value_ended()

    def _escaped(self, c: str) -> None:
        if self._expects == "escape":
            self._expects = "u1" if c == "u" else "string"
            self.broken = c not in '"\\/bfnrtu'
        else:
            self._expects = {"u1": "u2", "u2": "u3", "u3": "u4", "u4": "string"}[self._expects]
            self.broken = c not in "0123456789abcdefABCDEF"

    def _scalar_ended(self) -> None:
        self.broken = _SCALARS.fullmatch(self._scalar) is None
        self._value_ended()

    def _value_ended(self) -> None:
        self._expects = "comma or end"
        self.done = not self._stack
