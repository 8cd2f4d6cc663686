"""What happens to a token, from the engine to the kernels and back: noted by all who take part, on one clock.

`Tracing` has the broker and the workers note the next computes of a model, and an engine of its own note what it does
itself. Clocks are set beside each other by round trips: the answer to the fastest of some questions was given halfway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy.typing as npt

from ggmq.engine import Engine, Made
from ggmq.model import Model
from ggmq.runner import Rows, Runner, UnderWay
from protocol import messages as m
from protocol.tracing import Noted, TracedCompute, TracedHop, TracedStep, decode_noted

ROUND_TRIPS = 12


class Span(NamedTuple):
    """Something that the main host did. Units: nanoseconds of its monotonic clock."""

    name: str
    begun_ns: int
    ended_ns: int


class Sent(NamedTuple):
    """A batch that was sent: the seq of its GRAPH_COMPUTE, and when its answer was there (0: not yet)."""

    under_way: UnderWay
    decodes: bool
    begun_ns: int
    ended_ns: int
    answered_ns: int


class Clock(NamedTuple):
    """What to add to another's times to have ours, and how far that may be off. Units: nanoseconds."""

    ahead_ns: int
    error_ns: int


class Trace(NamedTuple):
    """All that was noted, by the main host's clock.

    Attributes:
        spans: what the engine did; sent: its batches, in order.
        hops: through the broker; computes: of each stage, a batch each, in the order of `sent`.
        clocks: of the broker, then of each stage.
    """

    spans: list[Span]
    sent: list[Sent]
    hops: list[TracedHop]
    computes: list[list[TracedCompute]]
    clocks: list[Clock]
    n_dropped: int


class NotedRunner(Runner):
    """A runner that notes what it sends and waits for."""

    def __init__(self, runner: Runner, spans: list[Span], sent: list[Sent]) -> None:
        vars(self).update(vars(runner))
        self._spans, self._sent = spans, sent

    def submit(self, parts: Sequence[Rows], n_stages: int = 0) -> UnderWay:
        begun = time.monotonic_ns()
        under_way = super().submit(parts, n_stages)
        ended = time.monotonic_ns()
        self._spans.append(Span("submit", begun, ended))
        decodes = all(len(p.tokens) == 1 and len(p.outputs) for p in parts)
        self._sent.append(Sent(under_way, decodes, begun, ended, 0))
        return under_way

    def wait(self, sent: UnderWay) -> list[npt.NDArray[Any]]:
        begun = time.monotonic_ns()
        out = super().wait(sent)
        ended = time.monotonic_ns()
        self._spans.append(Span("wait", begun, ended))
        for i, s in enumerate(self._sent):
            if s.under_way.seq == sent.seq:
                self._sent[i] = s._replace(answered_ns=ended)
        return out


class NotedEngine(Engine):
    """An engine that notes what its steps are made of."""

    spans: list[Span]

    def note_to(self, spans: list[Span]) -> None:
        self.spans = spans

    def step(self) -> list[Made]:
        return self._noted("step", super().step)

    def _schedule(self) -> None:
        self._noted("schedule", super()._schedule)

    def _sample(self, *args: Any) -> list[Made]:
        return list(self._noted("sample", lambda: super(NotedEngine, self)._sample(*args)))

    def _noted(self, name: str, do: Callable[[], Any]) -> Any:
        begun = time.monotonic_ns()
        try:
            return do()
        finally:
            self.spans.append(Span(name, begun, time.monotonic_ns()))


class Tracing:
    """Notes the next computes of a loaded model. Threads: those of the model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.spans: list[Span] = []
        self.sent: list[Sent] = []
        self._devices = [s.assignment.device for s in model.stages]
        self._clocks: list[Clock] = []
        self._runner = model.runner

    def engine(self, n_batch: int) -> NotedEngine:
        engine = NotedEngine(self.model, n_batch=n_batch)
        engine.note_to(self.spans)
        return engine

    def begin(self, n_computes: int) -> None:
        """Have everyone note so many, when nothing is under way. Errors: what they report."""
        self._clocks = [self._clock(None), *(self._clock(d) for d in self._devices)]
        for device in (None, *self._devices):
            self._ask(device, n_computes)
        self.spans.clear()
        self.sent.clear()
        self.model.runner = NotedRunner(self._runner, self.spans, self.sent)

    def end(self) -> Trace:
        """What was noted; nobody notes anything after it. Errors: what they report."""
        self.model.runner = self._runner
        noted = [self._ask(device, 0)[1] for device in (None, *self._devices)]
        for n, clock in zip(noted, self._clocks, strict=True):
            n.hops = [_shifted_hop(h, clock.ahead_ns) for h in n.hops]
            for c in n.computes:
                _shift(c, clock.ahead_ns)
        return Trace(self.spans, self.sent, noted[0].hops, [n.computes for n in noted[1:]], self._clocks,
                     sum(n.n_dropped for n in noted))  # fmt: skip

    def _ask(self, device: int | None, n_computes: int) -> tuple[int, Noted]:
        """The clock, and what was noted. device: None is the broker."""
        client = self.model.client
        query = m.TraceQuery(client.session, n_computes, device is None)
        reply = client.request(query, device=device or 0)
        assert isinstance(reply.header, m.Traced)  # the decoder gives TRACE's reply this type
        return reply.header.now_ns, decode_noted(reply.payload)

    def _clock(self, device: int | None) -> Clock:
        """Processes of one host have one clock: what is less than can be known is no difference."""
        best = Clock(0, 1 << 62)
        for _ in range(ROUND_TRIPS):
            asked = time.monotonic_ns()
            theirs, _ = self._ask(device, 0)
            answered = time.monotonic_ns()
            if (answered - asked) // 2 < best.error_ns:
                best = Clock((asked + answered) // 2 - theirs, (answered - asked) // 2)
        return best if abs(best.ahead_ns) > best.error_ns else best._replace(ahead_ns=0)


def _shifted_hop(h: TracedHop, ns: int) -> TracedHop:
    return TracedHop(h.seq, h.from_client, h.devices, h.replied, h.begun_ns + ns, h.ended_ns + ns)


def _shift(c: TracedCompute, ns: int) -> None:
    for name in ("arrived_ns", "handed_ns", "begun_ns", "ran_ns", "ended_ns", "sent_ns"):
        at = getattr(c, name)
        setattr(c, name, at + ns if at else 0)
    c.steps = [TracedStep(s.title, s.node, s.begun_ns + ns, s.ended_ns + ns) for s in c.steps]
