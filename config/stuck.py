"""Whether a peer that says nothing over a connection can be reached by another one.

TCP tries again after ever longer pauses what a broken network swallowed, so a connection may stay mute for as long after the
network is well again as it was ill. Who asks from time to time with a new connection knows within a second or two.
"""

from __future__ import annotations

import contextlib
import threading
from enum import Enum, auto

from config.keys import KeyPair
from config.probe import CURVE, NULL, Finding, Kind, address_of, probe

EVERY_S = 1.0
"""So often a new connection is tried, and so long it is waited for."""
PATIENCE_S = 1.0
"""A peer that was just reached may still answer over the connection that there is."""


class Way(Enum):
    """What is known of the way to a peer: nothing new, that a new connection reaches it, that it is no more."""

    UNKNOWN = auto()
    OPEN = auto()
    REFUSED = auto()


class Stuck:
    """Threads: use from one. Probes run in threads of their own, one at a time, which end by themselves."""

    def __init__(self, endpoint: str, keys: KeyPair | None, now_s: float) -> None:
        self._host, self._port = address_of(endpoint)
        self._mechanism = CURVE if keys is not None else NULL
        self._ask_s = now_s
        self._thread: threading.Thread | None = None
        self._answer: list[Finding] = []

    def look(self, now_s: float) -> Way:
        """Call it some times a second while the peer says nothing."""
        if self._thread is None and self._port and now_s >= self._ask_s:
            self._ask_s = now_s + EVERY_S
            self._thread = threading.Thread(target=self._probe, name="ggmq-probe", daemon=True)
            self._thread.start()
        if self._thread is None or self._thread.is_alive():
            return Way.UNKNOWN
        self._thread = None
        kind = self._answer.pop().kind if self._answer else Kind.NO_ANSWER
        if kind is Kind.REFUSED:
            return Way.REFUSED
        if kind is not Kind.ZEROMQ:
            return Way.UNKNOWN
        self._ask_s = now_s + EVERY_S + PATIENCE_S
        return Way.OPEN

    def _probe(self) -> None:
        with contextlib.suppress(OSError, OverflowError):  # no descriptor left, no port of TCP: nothing is found
            self._answer.append(probe(self._host, self._port, self._mechanism, EVERY_S))
