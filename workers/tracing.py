"""When computes came, waited and ran, for sessions that asked to know it. Pure: times are passed in, and bounds are kept."""

from __future__ import annotations

from msgspec import Struct, field

from protocol import limits
from protocol import messages as m
from protocol.errors import Overloaded
from protocol.frames import Message
from protocol.tracing import Noted, TracedCompute
from workers.work import Key


class Trace(Struct, eq=False):
    """Attributes:
    n_left: computes that are still to be noted.
    coming: those that have come and not gone, by their seq, each with the ticket that it takes.
    """

    n_left: int
    noted: Noted = field(default_factory=Noted)
    coming: dict[int, tuple[TracedCompute, bytes]] = field(default_factory=dict)
    n_steps: int = 0


class Traces:
    """By session. False while nobody asks, so that a compute asks nothing else."""

    def __init__(self) -> None:
        self._sessions: dict[Key, Trace] = {}
        self._handed: dict[bytes, int] = {}

    def __bool__(self) -> bool:
        return bool(self._sessions)

    def ask(self, key: Key, n_computes: int) -> Noted:
        """Note the next computes of a session. Returns: what was noted before. Errors: Overloaded."""
        before = self._sessions.pop(key, None)
        if n_computes:
            if len(self._sessions) >= limits.MAX_TRACES:
                raise Overloaded(f"TRACE: {limits.MAX_TRACES} sessions are traced; end one first")
            self._sessions[key] = Trace(n_computes)
        self.forget_handed()
        return before.noted if before is not None else Noted()

    def drop(self, key: Key) -> None:
        self._sessions.pop(key, None)
        self.forget_handed()

    def forget_handed(self) -> None:
        if not self._sessions:
            self._handed.clear()

    # -- a compute's way -----------------------------------------------------------------------------------------------

    def arrived(self, key: Key, message: Message, now_ns: int) -> None:
        """A message has come: a compute of the session, or activations."""
        h = message.header
        if isinstance(h, m.HandOver):
            self._handed[h.ticket] = now_ns
            if len(self._handed) > limits.MAX_INFLIGHT_PER_CLIENT:
                del self._handed[next(iter(self._handed))]
        trace = self._sessions.get(key)
        if trace is None or not isinstance(h, m.StageCompute):
            return
        if not trace.n_left or trace.n_steps >= limits.MAX_TRACED_STEPS:
            trace.noted.n_dropped += 1
            return
        trace.n_left -= 1
        trace.coming[message.seq] = TracedCompute(h.digest, now_ns), h.take

    def begun(self, key: Key, request: Message, now_ns: int) -> TracedCompute | None:
        """Its turn has come. Returns: what is noted of it, if anything is."""
        trace = self._sessions.get(key)
        if trace is None or request.seq not in trace.coming:
            return None
        compute, ticket = trace.coming[request.seq]
        compute.begun_ns, compute.handed_ns = now_ns, self._handed.pop(ticket, 0)
        compute.n_in_bytes = sum(len(f) for f in request.payload)
        return compute

    def sent(self, key: Key, seq: int, now_ns: int) -> None:
        """What came of it is on its way."""
        trace = self._sessions.get(key)
        if trace is None or seq not in trace.coming:
            return
        compute, _ = trace.coming.pop(seq)
        compute.sent_ns = now_ns
        trace.n_steps += len(compute.steps)
        trace.noted.computes.append(compute)
