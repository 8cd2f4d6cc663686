"""What a broker has to say, a line an event. Nobody fills a disk by knocking."""

from __future__ import annotations

from collections.abc import Callable

NOTED_S, MAX_NOTES = 10.0, 100
"""In so many seconds at most so many."""


class Notes:
    """Attributes: tell: is given each line that is not one too many."""

    def __init__(self) -> None:
        self.tell: Callable[[str], None] = lambda text: None
        self._n, self._since_s = 0, 0.0

    def say(self, text: str) -> None:
        self._n += 1
        if self._n <= MAX_NOTES:
            self.tell(text)

    def tick(self, now_s: float) -> None:
        """Say how many were too many."""
        if now_s - self._since_s > NOTED_S:
            if self._n > MAX_NOTES:
                self.tell(f"{self._n - MAX_NOTES} more came and went")
            self._n, self._since_s = 0, now_s
