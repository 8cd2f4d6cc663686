"""Text that comes in pieces, read by generators: they yield where they need more of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

from ggmq.answers.jsontext import JsonScanner

T = TypeVar("T")
Reading = Generator[None, None, T]
SPACES = " \t\n\r"


class Stream:
    """Attributes: text, at: what is there, and how much of it was read. ended: no more comes."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False

    def more(self) -> Reading[bool]:
        """Wait; False when nothing more comes."""
        n = len(self.text)
        while len(self.text) == n and not self.ended:
            yield
        return len(self.text) > n

    def peek(self) -> Reading[str]:
        """The next character, empty at the end."""
        while self.at == len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def spaces(self) -> Reading[str]:
        """White space, which is read."""
        begin = self.at
        while (yield from self.peek()) and self.text[self.at] in SPACES:
            self.at += 1
        return self.text[begin : self.at]

    def literal(self, *texts: str) -> Reading[str]:
        """The first of these texts that comes next, which is read; empty, and nothing is read, when none does."""
        for text in texts:
            while len(self.text) - self.at < len(text) and text.startswith(self.text[self.at :]):
                if not (yield from self.more()):
                    break
            if self.text.startswith(text, self.at):
                self.at += len(text)
                return text
        return ""

    def until(self, *markers: str, limit: int = 1 << 20) -> Reading[tuple[str, str]]:
        """The text before the first marker, and the marker, which are read; an empty marker when none comes.

        `limit`: characters after which none is looked for any more; so many are read then.
        """
        begin = look = self.at
        pattern, longest = _pattern(markers)
        while True:
            found = pattern.search(self.text, look)
            if found and found.start() - begin <= limit:
                self.at = found.end()
                return self.text[begin : found.start()], found[0]
            if found or len(self.text) - begin > limit + longest:
                self.at = begin + limit
                return self.text[begin : self.at], ""
            look = max(begin, len(self.text) - longest + 1)
            if not (yield from self.more()):
                self.at = len(self.text)
                return self.text[begin:], ""

    def flow(self, markers: tuple[str, ...], sink: Callable[[str], None]) -> Reading[str]:
        """Pass text on as it comes, up to the first marker, which is read; empty at the end."""
        pattern, longest = _pattern(markers)
        while True:
            found = pattern.search(self.text, self.at)
            n = found.start() if found else len(self.text) - _n_begun(self.text, self.at, markers, longest)
            if found and not self.ended and len(self.text) - n < longest:
                rest = self.text[n:]
                if any(m.startswith(rest) and m != found[0] for m in markers):
                    found = None  # it may yet be a longer one
            if n > self.at:
                sink(self.text[self.at : n])
            if found:
                self.text, self.at = self.text[n:], len(found[0])
                return found[0]
            self.text, self.at = self.text[n:], 0
            if not (yield from self.more()):
                if self.text:
                    sink(self.text)
                self.text = ""
                return ""

    def json(self, sink: Callable[[str], None]) -> Reading[bool]:
        """Pass one JSON value on as it comes; False when it is none, or not whole."""
        scanner = JsonScanner()
        while not scanner.done and not scanner.broken:
            out, self.at = scanner.feed(self.text, self.at)
            if out:
                sink(out)
            if not scanner.done and not scanner.broken and not (yield from self.more()):
                scanner.end()
                break
        return scanner.done and not scanner.broken


@lru_cache(256)
def _pattern(markers: tuple[str, ...]) -> tuple[re.Pattern[str], int]:
    ordered = sorted(markers, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)"), max(map(len, markers), default=0)


def _n_begun(text: str, at: int, markers: tuple[str, ...], longest: int) -> int:
    """Characters at the end that may be the beginning of a marker."""
    for n in range(min(longest - 1, len(text) - at), 0, -1):
        end = text[-n:]
        if any(m.startswith(end) for m in markers):
            return n
    return 0
