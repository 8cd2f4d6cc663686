"""Texts that end an answer, found in a stream of pieces; nothing that may be the beginning of one is shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Attributes:
    found: the text that was found; empty while none was. What comes after it is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._longest = max(map(len, self._stops), default=0)
        self._kept = ""
        self.found = ""

    def feed(self, text: str) -> str:
        """The text that can be shown now."""
        if not self._stops or self.found:
            return "" if self.found else text
        text = self._kept + text
        places = [(at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if places:
            at, self.found = min(places, key=lambda place: (place[0], -len(place[1])))
            self._kept = ""
            return text[:at]
        n_kept = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._begins(text[-n:])), 0)
        self._kept = text[len(text) - n_kept :]
        return text[: len(text) - n_kept]

    def finish(self) -> str:
        """What was held back: the text has ended, and it was no stop text."""
        text, self._kept = self._kept, ""
        return text

    def _begins(self, end: str) -> bool:
        return any(s.startswith(end) for s in self._stops)
