"""What other workers hand over here, and what waits for it. Pure: time is passed in.

A ticket cannot be guessed, so whoever names it was told it by the broker that the compute came from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from msgspec import structs

from protocol import limits
from protocol import messages as m
from protocol.errors import HandleError, Overloaded, ProtocolError, Unavailable
from protocol.frames import Frame, Message


@dataclass(frozen=True, slots=True)
class _Stashed:
    """Handed over before its compute came."""

    hand: m.HandOver
    payload: tuple[Frame, ...]
    since_s: float


@dataclass(frozen=True, slots=True)
class _Parked:
    """A compute that came before its activations. `token`: its broker's."""

    rid: bytes
    token: bytes
    message: Message
    h: m.StageCompute


class Arrivals:
    """Attributes:
    stashed, parked: what came before the other, by ticket.
    forgotten: tickets of what nobody took for too long, and of computes that will not run; the last ones.
    """

    def __init__(self) -> None:
        self.stashed: dict[bytes, _Stashed] = {}
        self.forgotten: dict[bytes, None] = {}
        self.parked: dict[bytes, _Parked] = {}

    def handed(self, message: Message, now_s: float) -> list[tuple[bytes, Message]]:
        """HAND_OVER of another worker. Returns: the compute that can run now, with its routing id, if it is here.

        Errors: ProtocolError for a ticket that came before, Overloaded.
        """
        h = message.header
        assert isinstance(h, m.HandOver)  # the command has this header
        parked = self.parked.pop(h.ticket, None)
        if parked is not None:
            return [(parked.rid, _completed(parked.message, parked.h, h, message.payload))]
        if h.ticket in self.forgotten:
            return []
        if h.ticket in self.stashed:
            raise ProtocolError("HAND_OVER: this ticket came before")
        held = sum(len(f) for s in self.stashed.values() for f in s.payload)
        coming = sum(len(f) for f in message.payload)
        if held + coming > limits.MAX_HANDED_BYTES or len(self.stashed) >= limits.MAX_INFLIGHT_PER_CLIENT:
            raise Overloaded(f"HAND_OVER: {len(self.stashed)} with {held} bytes wait here for their STAGE_COMPUTE")
        self.stashed[h.ticket] = _Stashed(h, message.payload, now_s)
        return []

    def take(self, rid: bytes, token: bytes, message: Message) -> Message | None:
        """A compute that takes a ticket. Returns: it with all its inputs; None when it must wait.

        Errors: HandleError for a ticket that another compute takes, Unavailable when what it names was here for too long,
            Overloaded.
        """
        h = message.header
        assert isinstance(h, m.StageCompute)  # only a compute takes
        stashed = self.stashed.pop(h.take, None)
        if stashed is not None:
            return _completed(message, h, stashed.hand, stashed.payload)
        if h.take in self.forgotten:
            raise Unavailable(f"STAGE_COMPUTE: its activations waited here for over {limits.HANDED_KEPT_S:.0f} s; "
                              "compute them again")  # fmt: skip
        if len(h.take) != 16 or h.take in self.parked:
            raise HandleError("STAGE_COMPUTE: expected a ticket of 16 bytes that nothing else takes")
        if len(self.parked) >= limits.MAX_INFLIGHT_PER_CLIENT:
            raise Overloaded(f"STAGE_COMPUTE: {len(self.parked)} wait here for activations")
        self.parked[h.take] = _Parked(rid, token, message, h)
        return None

    def unpark(self, token: bytes, session: int, seq: int | None = None) -> list[tuple[bytes, Message]]:
        """Take out what waits in a session: one request, or all. Returns: them with their routing ids; they will not run."""
        out = []
        for ticket, waiting in list(self.parked.items()):
            if waiting.token == token and waiting.h.session == session and seq in (None, waiting.message.seq):
                del self.parked[ticket]
                self._forget(ticket)
                out.append((waiting.rid, waiting.message))
        return out

    def expire(self, now_s: float) -> None:
        """Forget what nobody took: its compute was cancelled, or its broker has gone."""
        for ticket in [t for t, s in self.stashed.items() if now_s - s.since_s > limits.HANDED_KEPT_S]:
            del self.stashed[ticket]
            self._forget(ticket)

    def _forget(self, ticket: bytes) -> None:
        self.forgotten[ticket] = None
        if len(self.forgotten) > limits.MAX_INFLIGHT_PER_CLIENT:
            del self.forgotten[next(iter(self.forgotten))]


def _completed(message: Message, h: m.StageCompute, hand: m.HandOver, payload: tuple[Frame, ...]) -> Message:
    frames = (*payload, *message.payload)
    whole = structs.replace(h, take=b"", n_payload=len(frames), spent_s=hand.spent_s, spent_nodes=hand.spent_nodes)
    return replace(message, header=whole, payload=frames)
