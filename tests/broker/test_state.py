"""The broker's state machine by rules: whatever is lost or late, every request is answered once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.events import ClientLost, CloseLink, FromClient, FromWorker, LinkLost, LinkOpened, Tick, ToClient, ToWorker
from broker.state import BrokerState
from protocol import limits
from protocol import messages as m
from protocol.frames import Message
from protocol.messages import Command

DEVICE = m.DeviceInfo("CPU", "cpu", total_bytes=100, free_bytes=100)
A, B = "tcp://a:1", "tcp://b:2"
CLIENT = b"c"


def hello(state: BrokerState, link: str, now: float = 0.0, n: int = 1) -> None:
    """Take a listening worker through its handshake."""
    (first,) = state.handle(LinkOpened(link, now))
    assert isinstance(first, ToWorker) and isinstance(first.message.header, m.Hello)
    answer = m.Hello(1, "worker", devices=[DEVICE] * n)
    (bulk,) = state.handle(FromWorker(link, first.message.answer(answer), now))
    assert isinstance(bulk, ToWorker) and bulk.bulk


def client(state: BrokerState, rid: bytes = CLIENT) -> int:
    (reply,) = state.handle(FromClient(rid, Message(Command.HELLO, m.Hello(1, "client")), 0.0))
    assert isinstance(reply, ToClient) and isinstance(reply.message.header, m.Hello)
    return reply.message.header.session


def ask(state: BrokerState, header: m.Header, seq: int, device: int = 0, now: float = 1.0, *payload: bytes) -> list[Any]:
    command = next(c for c, kind in m.REQUEST.items() if kind is type(header))
    return state.handle(FromClient(CLIENT, Message(command, header, payload, False, device, 0, seq), now))


def test_a_route_passes_from_worker_to_worker_and_answers_once() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    hello(state, B)
    session = client(state)
    route = [m.RouteStep(1, b"2" * 16, 1)]
    (first,) = ask(state, m.GraphCompute(session, b"1" * 16, 1, route), 5, 0, 1.0, b"in", b"mask")
    assert first.link == A and first.message.payload == (b"in",) and first.message.header.route == []
    (second,) = state.handle(FromWorker(A, first.message.answer(m.ComputeDone(0.5, 3), [b"hidden"]), 1.1))
    assert second.link == B and second.message.payload == (b"hidden", b"mask")
    (last,) = state.handle(FromWorker(B, second.message.answer(m.ComputeDone(0.25, 2), [b"logits"]), 1.2))
    assert last == ToClient(CLIENT, Message(Command.GRAPH_COMPUTE, m.ComputeDone(0.75, 5), (b"logits",), True, 0, 0, 5))
    assert not state.pending


def test_losing_the_second_stage_answers_the_client() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    hello(state, B)
    session = client(state)
    (first,) = ask(state, m.GraphCompute(session, b"1" * 16, 0, [m.RouteStep(1, b"2" * 16, 0)]), 5)
    state.handle(LinkLost(B, "gone", 1.0))
    (answer,) = state.handle(FromWorker(A, first.message.answer(m.ComputeDone(), [b"x"]), 1.1))
    assert isinstance(answer, ToClient) and answer.message.header.code == "worker_lost"


def test_a_foreign_session_and_a_device_that_is_not_there_are_refused() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    session = client(state)
    for header, device in ((m.AllocBuffer(session + 1, 1, 1), 0), (m.AllocBuffer(session, 1, 1), 7)):
        (answer,) = ask(state, header, 1, device)
        assert answer.message.header.code == "handle"


def test_a_late_reply_of_an_earlier_epoch_is_dropped() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    session = client(state)
    (sent,) = ask(state, m.AllocBuffer(session, 1, 1), 1)
    late = Message(Command.ALLOC_BUFFER, m.Ok(), (), True, 0, sent.message.epoch - 1, sent.message.seq)
    assert state.handle(FromWorker(A, late, 1.0)) == []
    again = sent.message.answer(m.Ok())
    assert len(state.handle(FromWorker(A, again, 1.0))) == 1
    assert state.handle(FromWorker(A, again, 1.0)) == []


def test_a_silent_worker_is_lost_and_a_busy_one_is_not() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    hello(state, B)
    session = client(state)
    ask(state, m.GraphCompute(session, b"1" * 16, 0), 1, 0, 0.0)
    state.handle(Tick(1.0))
    out = state.handle(Tick(1.0 + limits.PING_DEADLINE_S + 0.1))
    assert CloseLink(B) in out and CloseLink(A) not in out
    out = state.handle(Tick(1.0 + limits.COMPUTE_STALL_S + 0.1))
    assert CloseLink(A) in out
    (answer,) = [i for i in out if isinstance(i, ToClient) and i.message.seq == 1]
    assert answer.message.header.code == "worker_lost"


def test_too_many_requests_in_flight_are_refused() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    session = client(state)
    for i in range(limits.MAX_INFLIGHT_PER_CLIENT):
        (out,) = ask(state, m.AllocBuffer(session, i + 1, 1), i + 1)
        assert isinstance(out, ToWorker)
    (out,) = ask(state, m.AllocBuffer(session, 99_999, 1), 99_999)
    assert out.message.header.code == "overloaded"


class Bus(RuleBasedStateMachine):
    """Random requests, replies, losses and time over two workers; a ten-line model of what is owed."""

    @initialize()
    def start(self) -> None:
        self.state = BrokerState("t", 10)
        self.now, self.seq, self.epochs = 0.0, 0, 0
        self.owed: set[int] = set()
        self.wire: list[ToWorker] = []
        self.up = {A: False, B: False}
        self.session = client(self.state)
        for link in (A, B):
            self.connect(link)

    def take(self, out: list[Any]) -> None:
        for i in out:
            if isinstance(i, ToClient) and i.message.reply:
                assert i.message.seq in self.owed, "answered twice, or never asked"
                self.owed.remove(i.message.seq)
            elif isinstance(i, ToWorker):
                self.wire.append(i)
            elif isinstance(i, CloseLink):
                self.up[i.link] = False

    def connect(self, link: str) -> None:
        hello(self.state, link, self.now)
        self.up[link] = True

    @rule(device=st.integers(0, 3), kind=st.integers(0, 3))
    def ask(self, device: int, kind: int) -> None:
        self.seq += 1
        self.owed.add(self.seq)
        route = [m.RouteStep(1 - device % 2, b"2" * 16, 0)]
        header: m.Header = [
            m.AllocBuffer(self.session, self.seq, 1), m.GraphCompute(self.session, b"1" * 16, 0, route),
            m.StatsQuery(), m.Drain(self.session),
        ][kind]  # fmt: skip
        self.take(ask(self.state, header, self.seq, device, self.now))

    @rule(data=st.data(), refuse=st.booleans())
    def reply(self, data: st.DataObject, refuse: bool) -> None:
        if not self.wire:
            return
        sent = self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))
        kind = m.ANSWER[sent.message.command]
        header = m.Error("kernel", "no") if refuse else (m.Ping(1) if kind is m.Ping else kind())
        command = Command.ERROR if refuse else None
        answer = sent.message.answer(header, (), command)
        self.take(self.state.handle(FromWorker(sent.link, answer, self.now, sent.bulk)))

    @rule(link=st.sampled_from([A, B]))
    def lose(self, link: str) -> None:
        self.take(self.state.handle(LinkLost(link, "test", self.now)))

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.state.handle(Tick(self.now)))

    @invariant()
    def what_is_owed_is_pending(self) -> None:
        if hasattr(self, "state"):
            waiting = {p.request.seq for p in self.state.pending.values() if p.rid}
            assert waiting == self.owed

    def teardown(self) -> None:
        if hasattr(self, "state"):
            for link in (A, B):
                self.take(self.state.handle(LinkLost(link, "end", self.now)))
            assert not self.owed
            self.state.handle(ClientLost(CLIENT, self.now))
            assert not self.state.pending


TestBus = pytest.mark.filterwarnings("default")(Bus.TestCase)
TestBus.settings = settings(stateful_step_count=40)
