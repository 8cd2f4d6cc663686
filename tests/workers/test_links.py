"""Activations from worker to worker: real processes linked, and what a peer, a stranger or a dead one may cause."""

from __future__ import annotations

import random
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol import messages as m
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import HandleError, Overloaded, ProtocolError, Unavailable
from protocol.frames import Message
from protocol.graph import Graph
from protocol.messages import Command
from tests.support.attacker import SESSION, Attacker, X, listening_worker
from tests.support.strategies import leaf
from workers.arrivals import Arrivals

TICKET = b"0123456789abcdef"
Started = tuple[int, subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Started, Started]]:
    with listening_worker() as a, listening_worker() as b:
        yield a, b


@pytest.fixture
def brokers(pair: tuple[Started, Started]) -> Iterator[tuple[Attacker, Attacker]]:
    """One broker's connections to both workers; each has a graph that squares its input."""
    token = random.randbytes(16)
    both = [Attacker(port, token) for port, _ in pair]
    for a in both:
        a.ask(m.GraphPut(SESSION, DIGEST), FRAME)
    try:
        yield both[0], both[1]
        assert all(p.poll() is None for _, p in pair), "a worker died"
    finally:
        for a in both:
            a.ask(m.Drain(SESSION))
            a.close()


@pytest.fixture
def peer(pair: tuple[Started, Started]) -> Iterator[Attacker]:
    """Another worker's connection to the second one."""
    p = Attacker(pair[1][0], random.randbytes(16), role="peer")
    yield p
    p.close()


SQUARE = replace(leaf(0, (32, 2, 1, 1)), op="SQR", src=(0,))
FRAME = encode_graph(Graph((leaf(0, (32, 2, 1, 1)), SQUARE), (0,), (1,)))
DIGEST = graph_digest(FRAME)


def dial(a: Attacker, port: int, instance: bytes, link: int = 1) -> bool:
    reply = a.ask(m.PeerDial(link, f"tcp://127.0.0.1:{port}", instance, 0))
    assert isinstance(reply.header, m.Found), reply.header
    return reply.header.found


def compute(take: bytes = b"", give: m.Give | None = None, n: int = 0) -> m.StageCompute:
    return m.StageCompute(SESSION, DIGEST, n, take=take, give=give)


@pytest.mark.parametrize("second_first", [False, True])
def test_outputs_cross_once_and_come_out_the_same(
    brokers: tuple[Attacker, Attacker], pair: tuple[Started, Started], second_first: bool
) -> None:
    first, second = brokers
    assert dial(first, pair[1][0], second.instance)
    sent = (X * X).nbytes
    before = first.ask(m.StatsQuery()).header
    for i in range(3):
        ticket = TICKET[:-1] + bytes([i])
        if second_first:
            taking = second.send(compute(take=ticket))
            done = first.ask(compute(give=m.Give(1, ticket), n=1), X.tobytes())
        else:
            done = first.ask(compute(give=m.Give(1, ticket), n=1), X.tobytes())
            taking = second.send(compute(take=ticket))
        assert isinstance(done.header, m.ComputeDone) and not done.payload
        result = second.wait(taking)
        assert isinstance(result.header, m.ComputeDone) and result.header.n_nodes == 2
        assert np.array_equal(np.frombuffer(result.payload[0], np.float32).reshape(X.shape), X**4)
    after = first.ask(m.StatsQuery()).header
    assert isinstance(before, m.Stats) and isinstance(after, m.Stats)
    assert 3 * sent <= after.handed_out_bytes - before.handed_out_bytes < 3 * (sent + 200)


def test_only_the_instance_that_was_meant_is_a_peer(
    brokers: tuple[Attacker, Attacker], pair: tuple[Started, Started]
) -> None:
    first, _ = brokers
    assert not dial(first, pair[1][0], b"somebody else", 2)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        assert not dial(first, s.getsockname()[1], b"nobody", 3)
    for link in (2, 3, 99):
        assert first.code(compute(give=m.Give(link, TICKET), n=1), X.tobytes()) == "unavailable"
    for endpoint in ("ipc:///tmp/socket", "inproc://x", "udp://1.2.3.4:5", "tcp://", ""):
        assert first.code(m.PeerDial(4, endpoint, b"", 0)) in ("protocol", "ok")
    assert first.code(m.PeerDial(5, "ipc:///tmp/socket", b"", 0)) == "protocol"


def test_a_peer_may_hand_over_and_nothing_else(brokers: tuple[Attacker, Attacker], peer: Attacker) -> None:
    _, second = brokers
    for header in (m.AllocBuffer(SESSION, 1, 8), m.Drain(SESSION), m.StatsQuery(), m.StageCompute(SESSION, DIGEST, 0),
                   m.PeerListen(), m.PeerDial(1, "tcp://127.0.0.1:1", b"", 0), m.HaveWeights([]),
                   m.FetchTensor(SESSION, 1, 0, 0, (32, 1, 1, 1), m.Weight(bytes(32), 128), 0, 1)):  # fmt: skip
        assert peer.code(header) == "protocol"
    assert peer.code(m.HandOver(TICKET, 1), X.tobytes()) == "ok"
    assert peer.code(m.HandOver(TICKET, 1), X.tobytes()) == "protocol"
    assert second.code(m.HandOver(TICKET, 0)) == "protocol"
    reply = second.ask(compute(take=TICKET))
    assert bytes(reply.payload[0]) == (X * X).tobytes()


def test_routes_end_at_the_broker(brokers: tuple[Attacker, Attacker]) -> None:
    for route in ([], [m.RouteStep(1, DIGEST, 0)]):
        assert brokers[0].code(m.GraphCompute(SESSION, DIGEST, 0, route)) == "protocol"


def test_what_is_handed_over_is_checked_like_any_input(brokers: tuple[Attacker, Attacker], peer: Attacker) -> None:
    _, second = brokers
    for i, payload in enumerate([(), (b"short",), (X.tobytes(), X.tobytes())]):
        ticket = TICKET[:-1] + bytes([100 + i])
        taking = second.send(compute(take=ticket))
        assert peer.code(m.HandOver(ticket, len(payload)), *payload) == "ok"
        refused = second.wait(taking).header
        assert isinstance(refused, m.Error) and refused.code == "handle"
    assert second.code(compute(take=b"short")) == "handle"


def test_computes_run_in_the_order_in_which_they_were_asked(brokers: tuple[Attacker, Attacker], peer: Attacker) -> None:
    """Whether activations come before their computes, after them or in between: a prompt's pieces build on each other."""
    _, second = brokers
    rng = random.Random(3)
    for _ in range(300):
        tickets = [rng.randbytes(16) for _ in range(4)]
        asked = [second.send(compute(take=t)) for t in tickets]
        for _ in range(rng.randrange(2000)):
            pass
        handed = [peer.send(m.HandOver(t, 1), X.tobytes()) for t in tickets]
        assert [second.reply().seq for _ in asked] == asked
        for seq in handed:
            peer.wait(seq)


def test_what_waits_for_activations_is_cancelled_or_drained(brokers: tuple[Attacker, Attacker]) -> None:
    _, second = brokers
    waiting = second.send(compute(take=TICKET[:-1] + b"1"))
    second.send(m.Cancel(SESSION, waiting))
    refused = second.wait(waiting).header
    assert isinstance(refused, m.Error) and refused.code == "cancelled"
    waiting = second.send(compute(take=TICKET[:-1] + b"2"))
    drained = second.send(m.Drain(SESSION))
    refused = second.wait(waiting).header
    assert isinstance(refused, m.Error) and refused.code == "cancelled"
    assert isinstance(second.wait(drained).header, m.Ok)


def test_a_peer_that_was_killed_is_an_error_within_the_deadline(pair: tuple[Started, Started]) -> None:
    with listening_worker() as (port, victim):
        first = Attacker(pair[0][0], random.randbytes(16))
        try:
            first.ask(m.GraphPut(SESSION, DIGEST), FRAME)
            asked = Attacker(port, random.randbytes(16))
            asked.close()
            assert dial(first, port, asked.instance)
            victim.kill()
            victim.wait()
            assert first.code(compute(give=m.Give(1, TICKET), n=1), X.tobytes()) == "unavailable"
            assert first.code(compute(give=m.Give(1, TICKET), n=1), X.tobytes()) == "unavailable"
            reply = first.ask(compute(n=1), X.tobytes())
            assert bytes(reply.payload[0]) == (X * X).tobytes()
        finally:
            first.ask(m.Drain(SESSION))
            first.close()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=30))
def test_every_compute_runs_once_with_what_was_handed_for_it(steps: list[tuple[bool, int]]) -> None:
    arrivals, ran = Arrivals(), dict.fromkeys(range(6), 0)
    taken: set[int] = set()
    given_: set[int] = set()
    for i, (take, n) in enumerate(steps):
        ticket = bytes([n]) * 16
        if take and n not in taken:
            taken.add(n)
            ready = [arrivals.take(b"r", b"t", Message(Command.STAGE_COMPUTE, compute(take=ticket), (), seq=i))]
        elif not take and n not in given_:
            given_.add(n)
            handed = Message(Command.HAND_OVER, m.HandOver(ticket, 1), (bytes([n]),))
            ready = [message for _, message in arrivals.handed(handed, 0.0)]
        else:
            continue
        for message in ready:
            if message is not None:
                ran[n] += 1
                assert message.payload == (bytes([n]),)
    assert {n for n, times in ran.items() if times} == taken & given_
    assert max(ran.values()) <= 1
    assert len(arrivals.parked) == len(taken - given_) and len(arrivals.stashed) == len(given_ - taken)


def test_activations_wait_for_a_broker_as_long_as_its_client_does() -> None:
    """A broker that is suspended between the parts of a compute sends the second when it wakes."""
    arrivals = Arrivals()
    arrivals.handed(Message(Command.HAND_OVER, m.HandOver(TICKET, 1), (b"x",)), 0.0)
    arrivals.expire(limits.RETURN_S + limits.RECONNECT_S)
    whole = arrivals.take(b"r", b"t", Message(Command.STAGE_COMPUTE, compute(take=TICKET)))
    assert whole is not None and list(whole.payload) == [b"x"]


def test_what_comes_for_a_compute_that_was_cancelled_is_dropped() -> None:
    arrivals = Arrivals()
    for i in range(2 * limits.MAX_INFLIGHT_PER_CLIENT):
        ticket = i.to_bytes(16)
        assert arrivals.take(b"r", b"t", Message(Command.STAGE_COMPUTE, compute(take=ticket), (), seq=i)) is None
        assert len(arrivals.unpark(b"t", SESSION, i)) == 1
        assert arrivals.handed(Message(Command.HAND_OVER, m.HandOver(ticket, 1), (bytes(1 << 20),)), 0.0) == []
    assert not arrivals.stashed and not arrivals.parked and len(arrivals.forgotten) == limits.MAX_INFLIGHT_PER_CLIENT


def test_what_nobody_takes_is_bounded_and_forgotten() -> None:
    arrivals = Arrivals()
    large = bytes(limits.MAX_HANDED_BYTES // 2)
    for i in range(2):
        arrivals.handed(Message(Command.HAND_OVER, m.HandOver(bytes([i]) * 16, 1), (large,)), float(i))
    with pytest.raises(Overloaded):
        arrivals.handed(Message(Command.HAND_OVER, m.HandOver(TICKET, 1), (b"x",)), 2.0)
    with pytest.raises(ProtocolError):
        arrivals.handed(Message(Command.HAND_OVER, m.HandOver(bytes(16), 1), (b"x",)), 2.0)
    arrivals.expire(limits.HANDED_KEPT_S + 0.5)
    assert list(arrivals.stashed) == [bytes([1]) * 16]
    with pytest.raises(Unavailable, match="compute them again"):
        arrivals.take(b"r", b"t", Message(Command.STAGE_COMPUTE, compute(take=bytes(16))))
    assert not arrivals.parked
    arrivals.take(b"r", b"t", Message(Command.STAGE_COMPUTE, compute(take=TICKET)))
    with pytest.raises(HandleError):
        arrivals.take(b"r", b"t", Message(Command.STAGE_COMPUTE, compute(take=TICKET)))
