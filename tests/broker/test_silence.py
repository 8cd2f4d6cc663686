"""When a worker is silent: within 1.5 s of its last word, whatever it does, and never for what its link takes long over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.events import FromWorker, LinkCarried, Tick, ToClient, ToWorker
from broker.state import BrokerState
from protocol import limits
from protocol import messages as m
from protocol.frames import Message, encode
from protocol.messages import Command
from tests.broker.test_state import A, ask, client, devices, hello

TICK_S = 0.1
CHUNK = 1 << 20
Way = deque[tuple[float, int, Any]]


class Wire:
    """A broker and a worker with a link of a rate and a delay between them, in steps of a hundredth of a second.

    All that goes one way is one queue, whichever channel it is of; what the link has taken, the sender's TCP knows of.
    Attributes:
        alive: whether the worker answers. One that does not has `room` for what comes, as a kernel has.
        carried: bytes that have arrived, either way; told: whether the broker's loop says so.
    """

    def __init__(self, bytes_per_s: float = 1e12, delay_s: float = 0.0, told: bool = True) -> None:
        self.state = BrokerState("t", 10)
        hello(self.state, A)
        self.session = client(self.state)
        self.rate, self.delay_s, self.told = bytes_per_s, delay_s, told
        self.now, self.carried, self.alive, self.room = 0.0, 0, True, 1 << 17
        self.there, self.back = Way(), Way()
        self._credit = {id(self.there): 0.0, id(self.back): 0.0}
        self.flying: list[tuple[float, Callable[[], None]]] = []
        self.computes: list[Message] = []
        self.answers: list[ToClient] = []
        self._ticked_s = 0.0

    def do(self, out: list[Any]) -> None:
        for i in out:
            if isinstance(i, ToWorker):
                self.there.append((self.now, sum(len(f) for f in encode(i.message)), i))
            elif isinstance(i, ToClient) and i.message.reply:
                self.answers.append(i)

    def _move(self, way: Way, arrived: Callable[[Any], None]) -> None:
        """What the link takes of one direction in a step."""
        self._credit[id(way)] = min(self._credit[id(way)] + self.rate / 100, self.rate / 10)
        while way and self._credit[id(way)] > 0 and (self.alive or self.room > 0):
            since, left, what = way.popleft()
            n = min(left, int(self._credit[id(way)]) + 1)
            self._credit[id(way)] -= n
            self.carried += n
            self.room -= 0 if self.alive else n
            if left > n:
                way.appendleft((since, left - n, what))
            else:
                self.flying.append((self.now + self.delay_s, lambda what=what: arrived(what)))

    def _at_worker(self, sent: ToWorker) -> None:
        h, message = sent.message.header, sent.message
        if not self.alive or isinstance(h, m.Hello):
            return
        if isinstance(h, m.StageCompute):
            self.computes.append(message)
        else:
            answer = message.answer(h if isinstance(h, m.Ping) else m.Ok())
            self.back.append((self.now, sum(len(f) for f in encode(answer)), (answer, sent.bulk)))

    def _at_broker(self, came: tuple[Message, bool]) -> None:
        self.do(self.state.handle(FromWorker(A, came[0], self.now, came[1])))

    def go(self, seconds: float) -> None:
        for _ in range(round(100 * seconds)):
            self.now = round(self.now + 0.01, 2)
            self._move(self.there, self._at_worker)
            self._move(self.back, self._at_broker)
            due = [act for at, act in self.flying if at <= self.now]
            self.flying = [(at, act) for at, act in self.flying if at > self.now]
            for act in due:
                act()
            if self.now - self._ticked_s >= TICK_S - 1e-9:
                self._ticked_s = self.now
                if self.told and self.state.workers[A].awaited:
                    self.state.handle(LinkCarried(A, self.carried, 2 * self.delay_s, self.now))
                self.do(self.state.handle(Tick(self.now)))

    @property
    def silent(self) -> bool:
        return bool(self.state.workers[A].silent)

    def until_silent(self, within_s: float) -> float:
        start = self.now
        while not self.silent:
            assert self.now - start < within_s, "it is not suspected"
            self.go(0.01)
        return self.now - start


def upload(wire: Wire, n_chunks: int) -> Callable[[], None]:
    """Send a weight in chunks under credits. Returns: sends what the answers so far allow."""
    sent = 0

    def more() -> None:
        nonlocal sent
        done = sum(a.message.command == Command.SET_TENSOR for a in wire.answers)
        while sent < min(n_chunks, done + limits.CREDIT_CHUNKS):
            header = m.SetTensor(wire.session, 1, sent * CHUNK, CHUNK)
            wire.do(ask(wire.state, header, 100 + sent, 0, wire.now, bytes(CHUNK)))
            sent += 1

    return more


@given(st.integers(0, 200), st.booleans())
def test_it_is_suspected_within_a_second_and_a_half_wherever_it_stops(hundredths: int, computes: bool) -> None:
    wire = Wire()
    wire.go(1.0)
    if computes:
        wire.do(ask(wire.state, m.GraphCompute(wire.session, b"1" * 16, 0), 1, 0, wire.now))
    wire.go(hundredths / 100)
    wire.alive = False
    assert wire.until_silent(3) <= 1.5
    assert [d.state for d in devices(wire.state)] == ["silent"]
    assert [a.message.header.code for a in wire.answers] == ["worker_lost"] * computes
    for late in wire.computes:
        wire.do(wire.state.handle(FromWorker(A, late.answer(m.ComputeDone(), [b"late"]), wire.now)))
    assert len(wire.answers) == computes, "a late reply counts for nothing"


def test_who_answers_while_it_computes_is_not_suspected_however_long_that_is() -> None:
    wire = Wire(delay_s=0.2)
    wire.do(ask(wire.state, m.GraphCompute(wire.session, b"1" * 16, 0), 1, 0, wire.now))
    for _ in range(30):
        wire.go(1.0)
        assert not wire.silent
    (compute,) = wire.computes
    wire.do(wire.state.handle(FromWorker(A, compute.answer(m.ComputeDone()), wire.now)))
    assert [a.message.header for a in wire.answers] == [m.ComputeDone()]


@pytest.mark.parametrize("mbit_per_s, delay_s", [(10, 0.0), (10, 0.2), (1, 0.05)])
def test_an_upload_over_a_slow_link_is_no_silence(mbit_per_s: float, delay_s: float) -> None:
    wire = Wire(mbit_per_s * 125_000, delay_s)
    more = upload(wire, 12)
    while sum(a.message.command == Command.SET_TENSOR for a in wire.answers) < 12:
        more()
        wire.go(0.1)
        assert not wire.silent and wire.now < 12 * CHUNK / wire.rate + 5
    wire.go(2)
    assert not wire.silent


def test_without_what_tcp_tells_the_same_upload_would_be_one() -> None:
    wire = Wire(125_000, told=False)
    upload(wire, 12)()
    assert wire.until_silent(3) < 2


@pytest.mark.parametrize("mbit_per_s", [10, 10_000])
def test_who_hangs_in_an_upload_is_suspected_when_its_host_takes_no_more(mbit_per_s: float) -> None:
    wire = Wire(mbit_per_s * 125_000)
    more = upload(wire, 50)
    for _ in range(20):
        more()
        wire.go(0.1)
    wire.alive = False
    assert wire.until_silent(5) <= 1.5 + (1 << 17) / wire.rate + TICK_S


def test_a_large_reply_on_its_way_is_no_silence() -> None:
    wire = Wire(1_250_000)
    wire.do(ask(wire.state, m.GraphCompute(wire.session, b"1" * 16, 0), 1, 0, wire.now))
    wire.go(0.5)
    (compute,) = wire.computes
    reply = compute.answer(m.ComputeDone(), [bytes(8 * CHUNK)])
    wire.back.append((wire.now, 8 * CHUNK, (reply, False)))
    while not wire.answers:
        wire.go(0.1)
        assert not wire.silent and wire.now < 10
    assert len(wire.answers[0].message.payload[0]) == 8 * CHUNK


def test_a_slow_network_is_waited_for_and_not_for_ever() -> None:
    wire = Wire(delay_s=0.9)
    wire.go(10)
    assert not wire.silent
    wire.alive = False
    assert wire.until_silent(8) <= 1.5 + limits.NETWORK_MOST_S
