"""How fast a broker takes up what a client asks for who asks for more than a share of it while others compute. Pure.

Queues on the way to workers and back are in the order in which things came: what one client has in them all others wait for.
So a hasty client's requests are held here, and go on at the pace of his share, few at a time. What he sends beyond that is
refused, and is not read faster than a busy client would send: it waits on his side of the connection. Who goes on all the
same waits for no answer, and is cut off; so is who asks for something without HELLO.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from protocol import limits
from protocol.frames import Message
from protocol.messages import Command

SHARE_OF_CORE, MOST_SHARE = 0.1, 0.5
"""Of a core's time, for what one client asks while others ask too: so much for each core that there is, up to a half."""
MESSAGE_S, BYTE_S = 300e-6, 1.8e-9
"""What a request costs a broker, its threads together: to read, forward and answer it; and each byte of it."""
BURST_S = 0.1
"""For so long a client may ask as fast as he can."""
WINDOW = 8
"""So many requests of a hasty client are under way at once."""
PRESENT_S = 1.0
"""Who computed within this time is there, or asked for more than who only looks."""
LOOKS_S = 0.1
"""Who takes less than this of the broker in that time only looks: nobody is held up for him."""
PAUSE_S = 0.0003
"""For so long the loop reads nothing when it has read two messages of a client that it has to refuse."""
PATIENCE, STRANGERS_PATIENCE = 256, 16
"""So many refusals in PRESENT_S, of requests beyond those that may wait, or without HELLO, and their sender is cut off."""
MAX_RELEASED = 64
"""At once, so that others get their turn."""

COMPUTES = (Command.STAGE_COMPUTE, Command.GRAPH_COMPUTE)

Client = tuple[int, bytes]
"""A listener, and a routing id there."""


class Pacing:
    """Requests that wait, in the order in which each client sent them."""

    def __init__(self, n_cores: int) -> None:
        self._ticked_s = 0.0
        self._share = min(MOST_SHARE, SHARE_OF_CORE * n_cores)
        self._paid_until_s: dict[Client, float] = {}
        self._patient: dict[Client, float] = {}
        self._took_s: dict[Client, float] = {}
        self._held: dict[Client, deque[tuple[Message, int]]] = {}
        self._n_refused: dict[Client, int] = {}
        self._cut_s: dict[Client, float] = {}

    def goes_on(self, who: Client, message: Message, n_bytes: int, now_s: float) -> bool:
        """A request of so many bytes came. Whether it may be handled now; if not, it is held."""
        is_hasty = self._hasty(who, now_s)
        if who in self._held or (is_hasty and self._others(who, now_s)):
            self._held.setdefault(who, deque()).append((message, n_bytes))
            return False
        self._charge(who, n_bytes, now_s)
        if not is_hasty and (message.command in COMPUTES or self._took_s[who] >= LOOKS_S):
            self._patient[who] = now_s
        return True

    def full(self, who: Client) -> bool:
        """Whether no more of a client is held."""
        return len(self._held.get(who, ())) >= limits.MAX_INFLIGHT_PER_CLIENT

    def released(self, n_inflight: Callable[[Client], int], now_s: float) -> Iterator[tuple[Client, Message]]:
        """What was held and may be handled now, each when that before it has been. n_inflight: how many of a client's are
        under way."""
        for who in list(self._held):
            for _ in range(MAX_RELEASED):
                held = self._held.get(who)
                if not held or (self._others(who, now_s) and (self._hasty(who, now_s) or n_inflight(who) >= WINDOW)):
                    break
                message, n_bytes = held.popleft()
                self._charge(who, n_bytes, now_s)
                if not held:
                    del self._held[who]
                yield who, message

    def wait_s(self, now_s: float) -> float:
        """How long nothing that is held can go on by the time alone; infinite where nothing is held."""
        return min((max(0.0, self._paid_until_s.get(who, 0.0) - now_s) for who in self._held), default=float("inf"))

    def is_cut(self, who: Client, now_s: float) -> bool:
        """Whether a message is of one who was cut off: what had come of him before that is thrown away."""
        if who in self._cut_s:
            self._cut_s[who] = now_s
        return who in self._cut_s

    def cut(self, who: Client, known: bool, now_s: float) -> bool:
        """A request was refused for what its sender is to know. known: he said HELLO. Returns: whether he is cut off now."""
        self._n_refused[who] = self._n_refused.get(who, 0) + 1
        if self._n_refused[who] <= (PATIENCE if known else STRANGERS_PATIENCE):
            return False
        self._cut_s[who] = now_s
        return True

    def forget(self, who: Client) -> None:
        """Nobody waits for its answers any more."""
        self._held.pop(who, None)

    def tick(self, now_s: float) -> None:
        """Forget who asks for nothing."""
        if now_s - self._ticked_s >= PRESENT_S:
            self._ticked_s = now_s
            self._n_refused.clear()
            self._took_s.clear()
            self._cut_s = {who: s for who, s in self._cut_s.items() if now_s - s < limits.RETURN_S}
        self._paid_until_s = {who: s for who, s in self._paid_until_s.items() if now_s - s < PRESENT_S}
        self._patient = {who: s for who, s in self._patient.items() if now_s - s < PRESENT_S}

    def _hasty(self, who: Client, now_s: float) -> bool:
        return self._paid_until_s.get(who, 0.0) > now_s

    def _others(self, who: Client, now_s: float) -> bool:
        """Whether others are there, and have had less than their share."""
        return any(now_s - s < PRESENT_S for other, s in self._patient.items() if other != who and other not in self._held)

    def _charge(self, who: Client, n_bytes: int, now_s: float) -> None:
        cost_s = MESSAGE_S + BYTE_S * n_bytes
        self._took_s[who] = self._took_s.get(who, 0.0) + cost_s
        until_s = max(self._paid_until_s.get(who, 0.0), now_s - BURST_S) + cost_s / self._share
        self._paid_until_s[who] = min(until_s, now_s + BURST_S)
