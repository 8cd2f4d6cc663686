"""Lines about peers that are refused, so few of them that no stranger can fill a log. Pure: time is passed in."""

from __future__ import annotations

PERIOD_S = 60.0
N_ADDRESSES = 20


class Refusals:
    """One line for an address and minute, and for some addresses a minute; the others are counted.

    Threads: use from one.
    """

    def __init__(self) -> None:
        self._since_s = float("-inf")
        self._said: set[str] = set()
        self._n_more = 0

    def line(self, address: str, reason: str, now_s: float) -> str:
        """What to print of a refusal; empty: nothing. `address` empty: it is not known; only said when nobody was named."""
        if now_s - self._since_s >= PERIOD_S:
            self._since_s = now_s
            self._said.clear()
        if address in self._said or len(self._said) >= N_ADDRESSES or (not address and self._said):
            self._n_more += 1
            return ""
        self._said.add(address)
        more = f" ({self._n_more} more were refused before)" if self._n_more else ""
        self._n_more = 0
        return f"refused {address or 'a peer that was gone too soon to tell its address'}: {reason}{more}"
