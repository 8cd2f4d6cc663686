"""When GRAPH_COMPUTEs of a client pass through the broker, for clients that asked to know it. Pure: times are passed in."""

from __future__ import annotations

from collections.abc import Sequence

from broker.events import ClientLost, Event, FromClient, FromWorker, Instruction, Link, ToClient, ToWorker
from protocol import limits
from protocol import messages as m
from protocol.errors import Overloaded
from protocol.tracing import Noted, TracedHop


class Trace:
    """Of one client.

    Attributes:
        n_left: computes that are still to be noted.
    """

    def __init__(self, rid: bytes, n_computes: int) -> None:
        self.n_left, self.noted = n_computes, Noted()
        self._rid = rid
        self._devices: dict[int, list[int]] = {}
        self._sent: dict[tuple[Link, int], int] = {}

    def passed(self, event: Event, out: Sequence[Instruction], begun_ns: int, ended_ns: int) -> None:
        """An event was handled, and what followed was sent."""
        if isinstance(event, FromClient):
            message, h = event.message, event.message.header
            if event.rid != self._rid or not isinstance(h, m.GraphCompute):
                return
            if not self.n_left:
                self.noted.n_dropped += 1
                return
            self.n_left -= 1
            seq = message.seq
            self._devices[seq] = [message.device, *(s.device for s in h.route)]
        elif isinstance(event, FromWorker) and not event.bulk and (event.link, event.message.seq) in self._sent:
            seq = self._sent.pop((event.link, event.message.seq))
        else:
            return
        went, left = [], self._devices.get(seq, [])
        for i in out:
            if isinstance(i, ToWorker) and isinstance(i.message.header, m.StageCompute) and left:
                self._sent[i.link, i.message.seq] = seq
                went.append(left.pop(0))
        replied = any(isinstance(i, ToClient) and i.rid == self._rid and i.message.seq == seq for i in out)
        if replied:
            self._devices.pop(seq, None)
        self.noted.hops.append(TracedHop(seq, isinstance(event, FromClient), went, replied, begun_ns, ended_ns))


class Traces:
    """By client. False while nobody asks, so that a message asks nothing else."""

    def __init__(self) -> None:
        self._clients: dict[bytes, Trace] = {}

    def __bool__(self) -> bool:
        return bool(self._clients)

    def ask(self, rid: bytes, n_computes: int) -> Noted:
        """Note the next computes of a client. Returns: what was noted before. Errors: Overloaded."""
        before = self._clients.pop(rid, None)
        if n_computes:
            if len(self._clients) >= limits.MAX_TRACES:
                raise Overloaded(f"TRACE: {limits.MAX_TRACES} clients are traced; end one first")
            self._clients[rid] = Trace(rid, n_computes)
        return before.noted if before is not None else Noted()

    def passed(self, event: Event, out: Sequence[Instruction], begun_ns: int, ended_ns: int) -> None:
        """An event was handled, and what followed was sent."""
        if isinstance(event, ClientLost):
            self._clients.pop(event.rid, None)
        for trace in self._clients.values():
            trace.passed(event, out, begun_ns, ended_ns)
