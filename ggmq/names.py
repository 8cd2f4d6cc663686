"""What pages are called: by the tokens that they hold and all before them. Which page of a window holds which.

A full page's name stands for all tokens up to its end, so it is what the pages behind it are named after. A page that is not
full has one too. Nothing here counts or moves pages.

Threads: use from one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from ggmq.archs.memory import PAGE

TOKEN_BYTES = 4
PAGE_BYTES = PAGE * TOKEN_BYTES
ROOT = b""
"""The name of what is before the first page."""
N_NEAR = 8
"""Pages behind one name that are looked at, at most: those whose tokens are the most alike."""


class Content(NamedTuple):
    """What a page holds: `tokens`, as bytes, behind the page of the name `before`."""

    before: bytes
    tokens: bytes

    @property
    def n(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    @property
    def name(self) -> bytes:
        return name_of(self.before, self.tokens)


def name_of(before: bytes, tokens: bytes) -> bytes:
    """The name of a page of these tokens behind the page of the name `before`."""
    return blake2b(before + tokens, digest_size=16).digest()


def as_bytes(tokens: Sequence[int]) -> bytes:
    """Tokens as names are made of them."""
    return np.asarray(tokens, "<i4").tobytes()


def n_alike(a: bytes, b: bytes) -> int:
    """Tokens with which both begin."""
    n = min(len(a), len(b)) // TOKEN_BYTES
    differ = np.flatnonzero(np.frombuffer(a, "<i4", n) != np.frombuffer(b, "<i4", n))
    return int(differ[0]) if differ.size else n


class Shelf:
    """Contents by what they stand behind, so that the one that is the most like some tokens is found."""

    def __init__(self) -> None:
        self._behind: dict[bytes, list[bytes]] = {}

    def put(self, content: Content) -> None:
        insort(self._behind.setdefault(content.before, []), content.tokens)

    def drop(self, content: Content) -> None:
        behind = self._behind[content.before]
        del behind[bisect_left(behind, content.tokens)]
        if not behind:
            del self._behind[content.before]

    def near(self, before: bytes, tokens: bytes) -> Iterator[tuple[Content, int]]:
        """Contents that begin as `tokens`, and for how many of them: the most alike first, of several the shortest."""
        behind = self._behind.get(before, [])
        at = bisect_left(behind, tokens)  # in ascending order those that are the most alike stand next to it
        found = [(n, held) for held in behind[max(0, at - N_NEAR // 2) : at + N_NEAR // 2] if (n := n_alike(held, tokens))]
        for n, held in sorted(found, key=lambda f: (-f[0], len(f[1]))):
            yield Content(before, held), n


class Names:
    """The named pages of each window; one page at most has a name there."""

    def __init__(self) -> None:
        self._page_of: dict[tuple[int, bytes], int] = {}
        self._content_of: dict[tuple[int, int], Content] = {}
        self._n_windows: dict[bytes, int] = {}
        self._shelf = Shelf()

    def __len__(self) -> int:
        return len(self._page_of)

    def page(self, window: int, name: bytes) -> int | None:
        return self._page_of.get((window, name))

    def content(self, window: int, page: int) -> Content | None:
        return self._content_of.get((window, page))

    def near(self, before: bytes, tokens: bytes) -> Iterator[tuple[Content, int]]:
        """As `Shelf.near`, of pages of any window."""
        return self._shelf.near(before, tokens)

    def give(self, window: int, page: int, content: Content, name: bytes) -> bool:
        """Name a page, unless it has a name that says more, or another page has this one. Returns: whether it has it now."""
        known = self._content_of.get((window, page))
        if known is not None and known.before == content.before and known.tokens.startswith(content.tokens):
            return False
        if (window, name) in self._page_of:
            return False
        self.drop(window, page)
        self._page_of[window, name] = page
        self._content_of[window, page] = content
        n = self._n_windows[name] = self._n_windows.get(name, 0) + 1
        if n == 1:
            self._shelf.put(content)
        return True

    def drop(self, window: int, page: int) -> None:
        """A page will hold something else."""
        content = self._content_of.pop((window, page), None)
        if content is None:
            return
        name = content.name
        del self._page_of[window, name]
        self._n_windows[name] -= 1
        if not self._n_windows[name]:
            del self._n_windows[name]
            self._shelf.drop(content)

    def clear(self) -> None:
        """No page holds anything any more."""
        for named in (self._page_of, self._content_of, self._n_windows):
            named.clear()
        self._shelf = Shelf()
