"""Clients who ask for much and who ask for little at one broker: times are numbers here."""

from __future__ import annotations

import pytest

from broker.pacing import (
    BURST_S,
    MESSAGE_S,
    PATIENCE,
    PRESENT_S,
    SHARE_OF_CORE,
    STRANGERS_PATIENCE,
    WINDOW,
    Client,
    Pacing,
)
from protocol import limits
from protocol import messages as m
from protocol.frames import Message
from protocol.messages import Command

HASTY, CALM = (0, b"hasty"), (0, b"calm")
N_CORES = 2
EACH_S = MESSAGE_S / (SHARE_OF_CORE * N_CORES)
"""So often a small request of a hasty client goes on."""


def ping(seq: int) -> Message:
    return Message(Command.PING, m.Ping(0), seq=seq)


def compute(seq: int) -> Message:
    return Message(Command.STAGE_COMPUTE, m.StageCompute(1, bytes(32), 0), seq=seq)


class Broker:
    """Answers at once, but for the client whose requests are `under_way`."""

    def __init__(self) -> None:
        self.pacing = Pacing(N_CORES)
        self.done: dict[Client, list[int]] = {HASTY: [], CALM: []}
        self.under_way = 0

    def asked(self, who: Client, seq: int, now_s: float, n_bytes: int = 0) -> None:
        message = compute(seq) if who == CALM else ping(seq)
        if self.pacing.goes_on(who, message, n_bytes, now_s):
            self.done[who].append(seq)

    def release(self, now_s: float) -> None:
        for who, message in self.pacing.released(lambda who: self.under_way, now_s):
            self.done[who].append(message.seq)


def flood(broker: Broker, n: int, begin_s: float = 0.0) -> None:
    for seq in range(n):
        broker.asked(HASTY, seq, begin_s)


def test_alone_nobody_waits() -> None:
    broker = Broker()
    flood(broker, 5000)
    assert broker.done[HASTY] == list(range(5000)) and broker.pacing.wait_s(0.0) == float("inf")


def test_beside_another_one_a_flood_has_its_share_and_keeps_its_order() -> None:
    broker, n, now = Broker(), 1000, 100.0
    broker.asked(CALM, 0, now)
    flood(broker, n, now)
    at_once = len(broker.done[HASTY])
    assert at_once == pytest.approx(BURST_S / EACH_S, abs=2)
    for step in range(500):  # a millisecond each
        now += 0.001
        if not step % 20:
            broker.asked(CALM, step, now)
            assert broker.done[CALM][-1] == step, "who asks for little never waits"
        broker.release(now)
    assert len(broker.done[HASTY]) - at_once == pytest.approx(0.5 / EACH_S, rel=0.05)
    assert broker.done[HASTY] == list(range(len(broker.done[HASTY])))


@pytest.mark.parametrize(("per_s", "counts"), [(200, False), (500, True)])
def test_nobody_is_held_up_for_one_who_only_looks(per_s: int, counts: bool) -> None:
    pacing, now, seq = Pacing(N_CORES), 100.0, 0
    while now < 103.0:
        now += 1 / per_s
        pacing.tick(now)
        assert pacing.goes_on(CALM, ping(0), 0, now)
    for seq in range(1000):
        if not pacing.goes_on(HASTY, ping(seq), 1 << 20, now):
            break
    assert (seq < 999) is counts


def test_bytes_count() -> None:
    broker, now = Broker(), 100.0
    broker.asked(CALM, 0, now)
    for seq in range(100):
        broker.asked(HASTY, seq, now, 1 << 20)
    assert 5 < len(broker.done[HASTY]) < 20


def test_few_of_a_flood_are_under_way_at_once() -> None:
    broker, now = Broker(), 100.0
    broker.asked(CALM, 0, now)
    flood(broker, 1000, now)
    before = len(broker.done[HASTY])
    broker.under_way = WINDOW
    broker.release(now + 0.5)
    assert len(broker.done[HASTY]) == before
    broker.under_way = WINDOW - 1
    broker.release(now + 0.5)
    assert len(broker.done[HASTY]) > before


def test_when_the_other_has_gone_all_that_waited_goes_on() -> None:
    broker, now, n = Broker(), 100.0, 900
    broker.asked(CALM, 0, now)
    flood(broker, n, now)
    later = now + PRESENT_S + 0.1
    while broker.pacing.wait_s(later) < float("inf"):
        broker.release(later)
    assert broker.done[HASTY] == list(range(n))


def test_what_is_held_is_bounded_and_forgotten_with_its_client() -> None:
    broker, now = Broker(), 100.0
    broker.asked(CALM, 0, now)
    seq = 0
    while not broker.pacing.full(HASTY):
        broker.asked(HASTY, seq, now)
        seq += 1
    assert seq - len(broker.done[HASTY]) == limits.MAX_INFLIGHT_PER_CLIENT
    before = list(broker.done[HASTY])
    broker.pacing.forget(HASTY)
    broker.release(now + 10)
    assert broker.done[HASTY] == before and not broker.pacing.full(HASTY)


def test_two_floods_do_not_hold_each_other_back() -> None:
    broker, now = Broker(), 100.0
    for seq in range(2000):
        broker.asked(HASTY, seq, now)
        broker.asked(CALM, seq, now)
    later = now + PRESENT_S + 0.1
    while broker.pacing.wait_s(later) < float("inf"):
        broker.release(later)
    assert broker.done == {HASTY: list(range(2000)), CALM: list(range(2000))}


@pytest.mark.parametrize(("known", "patience"), [(True, PATIENCE), (False, STRANGERS_PATIENCE)])
def test_who_sends_on_though_he_is_refused_is_cut_off_once(known: bool, patience: int) -> None:
    pacing = Pacing(N_CORES)
    now = 100.0
    pacing.tick(now)
    assert not any(pacing.cut(HASTY, known, now) for _ in range(patience)) and not pacing.is_cut(HASTY, now)
    assert pacing.cut(HASTY, known, now) and pacing.is_cut(HASTY, now)
    assert not pacing.is_cut(CALM, now) and not pacing.cut(CALM, known, now)


def test_a_refusal_now_and_then_costs_nobody_his_connection() -> None:
    pacing = Pacing(N_CORES)
    for second in range(20):
        for _ in range(PATIENCE // 2):
            assert not pacing.cut(HASTY, True, 100.0 + second)
        pacing.tick(100.0 + second + 1.01 * PRESENT_S)
