"""Links from this worker to others, over which a stage's outputs are handed on, and weights fetched. Pure: time and tokens
are passed in.

A broker has a link dialled and names it; it is up when the other end has answered HELLO as the very worker that was meant.
What is handed over is acknowledged by the other end, and only then is the compute that gave it answered: a broken link
becomes an ordinary error reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from protocol import PROTOCOL_VERSION, limits
from protocol import messages as m
from protocol.errors import Overloaded, ProtocolError, Unavailable
from protocol.frames import Frame, Message
from protocol.messages import Command
from workers.fetches import Fetches
from workers.state import WorkerState
from workers.work import Compute, Dial, HangUp, LinkInstruction, Name, Send, ToPeer

EPOCH = 1
STUCK_S = 1.0
"""A link over which nothing came for so long is dialled anew when it is wanted: where a network was broken, TCP tries ever
more seldom."""


@dataclass(frozen=True, slots=True)
class _Given:
    """A compute whose outputs are on their way, and what it is answered with when they have arrived."""

    work: Compute
    done: m.ComputeDone
    due_s: float


@dataclass(slots=True)
class _Link:
    """`asked`: who waits to hear whether it is up. `given`: by seq."""

    dial: m.PeerDial
    asked: list[tuple[bytes, Message]]
    due_s: float
    up: bool = False
    seq: int = 0
    pinged_s: float = 0.0
    heard_s: float = 0.0
    given: dict[int, _Given] = field(default_factory=dict)

    def stuck(self, now_s: float) -> bool:
        """Whether nothing may come over it for a while, though its other end can be reached by a new connection."""
        return self.up and now_s - self.heard_s > STUCK_S


class Links:
    """Attributes:
    state: answers the computes whose outputs were handed over.
    fetches: weights that come over links.
    now_s: time of the last tick.
    """

    def __init__(self, state: WorkerState) -> None:
        self.state = state
        self.links: dict[Name, _Link] = {}
        self.fetches = Fetches(state, self._read)
        self.now_s = 0.0

    def dial(self, rid: bytes, message: Message, token: bytes, now_s: float) -> Sequence[LinkInstruction]:
        """PEER_DIAL of a broker. `token` names this end to the other; it is new for each link.

        Errors: ProtocolError, Overloaded.
        """
        h = message.header
        assert isinstance(h, m.PeerDial)  # the command has this header
        name = (self.state.broker_of(rid, "PEER_DIAL"), h.link)
        known = self.links.get(name)
        if known is not None and known.dial == h and not known.stuck(now_s):
            if known.up:
                return [Send(rid, message.answer(m.Found(True)))]
            known.asked.append((rid, message))
            return []
        if not h.endpoint.startswith(("tcp://", "ipc://")):
            raise ProtocolError(f"PEER_DIAL: expected an endpoint tcp://HOST:PORT or ipc://PATH, got {h.endpoint!r}")
        if len(self.links) >= limits.MAX_LINKS:
            raise Overloaded(f"PEER_DIAL: this worker has {limits.MAX_LINKS} links")
        out = self._break(name, "it was dialled again") if known is not None else []
        self.links[name] = _Link(h, [(rid, message)], now_s + limits.DIAL_S)
        return [*out, Dial(name, h.endpoint, h.key), self._send(name, m.Hello(PROTOCOL_VERSION, "peer", token, EPOCH))]

    def _send(self, name: Name, header: m.Header, payload: tuple[Frame, ...] = ()) -> ToPeer:
        link = self.links[name]
        link.seq += 1
        return ToPeer(name, Message(m.COMMAND_OF[type(header)], header, payload, False, link.dial.device, EPOCH, link.seq))

    def _read(self, name: Name, h: m.ReadWeight) -> ToPeer | None:
        """Ask the worker at the other end for a chunk of a weight."""
        link = self.links.get(name)
        return self._send(name, h) if link is not None and link.up else None

    def can_give(self, work: Compute, give: m.Give) -> None:
        """Errors: Unavailable when the link that a compute names is not up; better known before the work than after."""
        link = self.links.get((work.key[0], give.link))
        if link is None or not link.up:
            raise Unavailable(f"STAGE_COMPUTE: link {give.link} to the next worker is down; activations can go through "
                              "the broker")  # fmt: skip

    def give(
        self, work: Compute, give: m.Give, done: m.ComputeDone, payload: tuple[Frame, ...]
    ) -> Sequence[LinkInstruction]:
        """Hand a compute's outputs over; its reply follows the acknowledgement."""
        name = (work.key[0], give.link)
        try:
            self.can_give(work, give)
        except Unavailable as e:
            return self.state.failed(work, e)
        out = self._send(name, m.HandOver(give.ticket, len(payload), done.compute_s, done.n_nodes), payload)
        self.links[name].given[out.message.seq] = _Given(work, done, self.now_s + limits.HAND_OVER_S)
        return [out]

    def received(self, name: Name, message: Message, now_s: float) -> Sequence[LinkInstruction]:
        """Something came back over a link."""
        link = self.links.get(name)
        if link is None or not message.reply:
            return []
        h, link.heard_s = message.header, now_s
        if self.fetches.waits_for(name, message.seq):
            return self.fetches.received(name, message, now_s)
        if isinstance(h, m.Error):
            return self._break(name, str(h.error()))
        if isinstance(h, m.Hello):
            if h.token != link.dial.instance:
                return self._break(name, "another worker answers there")
            link.up = True
            asked, link.asked = link.asked, []
            return [Send(rid, request.answer(m.Found(True))) for rid, request in asked]
        if message.command == Command.HAND_OVER:
            given = link.given.pop(message.seq, None)
            return self.state.done(given.work, given.done) if given is not None else []
        return []

    def lost(self, name: Name, reason: str) -> Sequence[LinkInstruction]:
        """The connection is of no more use."""
        return self._break(name, reason) if name in self.links else []

    def _break(self, name: Name, reason: str) -> list[LinkInstruction]:
        link = self.links.pop(name)
        out: list[LinkInstruction] = [HangUp(name)]
        out += [Send(rid, request.answer(m.Found(False))) for rid, request in link.asked]
        for given in link.given.values():
            out += self.state.failed(given.work, Unavailable(f"activations for {link.dial.endpoint}: {reason}"))
        return [*out, *self.fetches.lost(name)]

    def tick(self, now_s: float) -> Sequence[LinkInstruction]:
        """Deadlines, and PINGs that keep an idle link known at its other end."""
        self.now_s = now_s
        out: list[LinkInstruction] = [*self.fetches.tick(now_s)]
        for name, link in list(self.links.items()):
            if any(now_s > given.due_s for given in link.given.values()):
                out += self._break(name, f"not acknowledged within {limits.HAND_OVER_S:.0f} s")
            elif not link.up and now_s > link.due_s:
                out += self._break(name, f"no answer within {limits.DIAL_S:.0f} s")
            elif link.up and now_s - link.heard_s > limits.PEER_SILENCE_S:
                out += self._break(name, f"silent for {limits.PEER_SILENCE_S:.0f} s")
            elif link.up and now_s - link.pinged_s > limits.LINK_PING_S:
                link.pinged_s = now_s
                out.append(self._send(name, m.Ping(link.seq)))
        return out

    def drop(self, broker: bytes) -> Sequence[LinkInstruction]:
        """Close what a broker that is gone had asked for."""
        return [i for name in list(self.links) if name[0] == broker for i in self._break(name, "the broker is gone")]
