"""The broker's state machine by rules: whatever is lost or late, every request is answered once."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.events import (
    ClientLost,
    CloseLink,
    FromClient,
    FromWorker,
    LinkCarried,
    LinkLost,
    LinkOpened,
    Redial,
    Tick,
    ToClient,
    ToWorker,
    Unreached,
    WorkerEnded,
)
from broker.state import BrokerState
from protocol import PROTOCOL_VERSION, limits
from protocol import messages as m
from protocol.frames import Message, decode, encode
from protocol.messages import Command

DEVICE = m.DeviceInfo("CPU", "cpu", total_bytes=100, free_bytes=100)
A, B = "tcp://a:1", "tcp://b:2"
CLIENT = b"c"


def hello(state: BrokerState, link: str, now: float = 0.0, n: int = 1) -> None:
    """Take a listening worker through its handshake."""
    (first,) = state.handle(LinkOpened(link, now))
    assert isinstance(first, ToWorker) and isinstance(first.message.header, m.Hello)
    answered(state, first, now, n)


def answered(state: BrokerState, asked: ToWorker, now: float, n: int = 1, instance: bytes = b"") -> list[Any]:
    """A worker answers HELLO on both of its channels."""
    answer = m.Hello(PROTOCOL_VERSION, "worker", instance, devices=[DEVICE] * n)
    (bulk,) = state.handle(FromWorker(asked.link, asked.message.answer(answer), now))
    assert isinstance(bulk, ToWorker) and bulk.bulk
    return state.handle(FromWorker(asked.link, bulk.message.answer(answer), now, True))


def client(state: BrokerState, rid: bytes = CLIENT) -> int:
    (reply,) = state.handle(FromClient(rid, Message(Command.HELLO, m.Hello(PROTOCOL_VERSION, "client")), 0.0))
    assert isinstance(reply, ToClient) and isinstance(reply.message.header, m.Hello)
    return reply.message.header.session


def ask(state: BrokerState, header: m.Header, seq: int, device: int = 0, now: float = 1.0, *payload: bytes) -> list[Any]:
    return state.handle(FromClient(CLIENT, Message(m.COMMAND_OF[type(header)], header, payload, False, device, 0, seq), now))


def test_a_route_passes_through_here_and_answers_once() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    hello(state, B)
    session = client(state)
    route = [m.RouteStep(1, b"2" * 16, 1)]
    (first,) = ask(state, m.GraphCompute(session, b"1" * 16, 1, route), 5, 0, 1.0, b"in", b"mask")
    assert first.link == A and first.message.payload == (b"in",)
    assert first.message.header == m.StageCompute(session, b"1" * 16, 1)
    (second,) = state.handle(FromWorker(A, first.message.answer(m.ComputeDone(0.5, 3), [b"hidden"]), 1.1))
    assert second.link == B and second.message.payload == (b"hidden", b"mask")
    assert (second.message.header.spent_s, second.message.header.spent_nodes) == (0.5, 3)
    (last,) = state.handle(FromWorker(B, second.message.answer(m.ComputeDone(0.75, 5), [b"logits"]), 1.2))
    assert last == ToClient(CLIENT, Message(Command.GRAPH_COMPUTE, m.ComputeDone(0.75, 5), (b"logits",), True, 0, 0, 5))
    assert not state.pending


def link(state: BrokerState, session: int, seq: int = 2, found: bool = True) -> Any:
    """Take A and B through a client's LINK; returns what the client hears."""
    (listen,) = ask(state, m.Link(session, [0, 1]), seq)
    assert listen.link == B and isinstance(listen.message.header, m.PeerListen)
    (dial,) = state.handle(FromWorker(B, listen.message.answer(m.PeerAddress("", b"instance")), 1.0))
    assert dial.link == A and (dial.message.header.endpoint, dial.message.header.instance) == (B, b"instance")
    (answer,) = state.handle(FromWorker(A, dial.message.answer(m.Found(found)), 1.0))
    assert isinstance(answer, ToClient)
    return answer.message.header


def linked_route(state: BrokerState, session: int) -> tuple[ToWorker, ToWorker]:
    """A compute over both workers, whose parts go out at once."""
    route = [m.RouteStep(1, b"2" * 16, 1)]
    first, second = ask(state, m.GraphCompute(session, b"1" * 16, 1, route), 5, 0, 1.0, b"in", b"mask")
    return first, second


def two_workers() -> tuple[BrokerState, int]:
    state = BrokerState("t", 10)
    hello(state, A)
    hello(state, B)
    return state, client(state)


def test_over_a_link_every_stage_gets_its_part_at_once_and_the_last_answers() -> None:
    state, session = two_workers()
    assert link(state, session) == m.Found(True)
    first, second = linked_route(state, session)
    give, take = first.message.header.give, second.message.header.take
    assert give.ticket == take and len(take) == 16 and first.message.payload == (b"in",)
    assert second.link == B and second.message.payload == (b"mask",) and second.message.header.give is None
    (answer,) = state.handle(FromWorker(B, second.message.answer(m.ComputeDone(0.75, 5), [b"logits"]), 1.2))
    assert answer == ToClient(CLIENT, Message(Command.GRAPH_COMPUTE, m.ComputeDone(0.75, 5), (b"logits",), True, 0, 0, 5))
    assert state.handle(FromWorker(A, first.message.answer(m.ComputeDone(0.5, 3)), 1.3)) == []
    assert not state.pending and state.clients[CLIENT].n_inflight == 0
    again = linked_route(state, session)[0].message.header.give
    assert again.ticket != give.ticket and again.link == give.link


def test_without_a_link_a_route_passes_through_here() -> None:
    state, session = two_workers()
    assert link(state, session, found=False) == m.Found(False)
    (only,) = ask(state, m.GraphCompute(session, b"1" * 16, 1, [m.RouteStep(1, b"2" * 16, 0)]), 5, 0, 1.0, b"in")
    assert only.link == A and only.message.header.give is None


def test_a_fetch_goes_over_the_link_of_its_two_devices_whatever_a_client_says() -> None:
    state, session = two_workers()
    link(state, session)
    first = linked_route(state, session)[0].message.header.give
    fetch = m.FetchTensor(session, 1, 0, 0, (1, 1, 1, 1), m.Weight(bytes(32), 4), 1, link=77)
    (sent,) = ask(state, fetch, 6, 0)
    assert (sent.link, sent.bulk, sent.message.header) == (A, True, msgspec.structs.replace(fetch, link=first.link))
    (answer,) = state.handle(FromWorker(A, sent.message.answer(m.Found(False, 3)), 1.0, True))
    assert answer.message.header == m.Found(False, 3)
    (answer,) = ask(state, msgspec.structs.replace(fetch, source=9), 7, 0)
    assert answer.message.header.code == "handle"
    (sent,) = ask(state, m.HaveWeights([m.Weight(bytes(32), 4)]), 8, 1)
    assert sent.link == B


def test_a_link_is_one_clients() -> None:
    state, session = two_workers()
    link(state, session)
    other = client(state, b"d")
    header = m.GraphCompute(other, b"1" * 16, 0, [m.RouteStep(1, b"2" * 16, 0)])
    (only,) = state.handle(FromClient(b"d", Message(Command.GRAPH_COMPUTE, header, seq=1), 1.0))
    assert only.link == A


@pytest.mark.parametrize("fails", [A, B])
def test_an_error_of_any_stage_is_the_answer_and_the_others_are_cancelled(fails: str) -> None:
    state, session = two_workers()
    link(state, session)
    parts = {sent.link: sent for sent in linked_route(state, session)}
    other = parts[A if fails == B else B]
    refused = parts[fails].message.answer(m.Error("kernel", "no"), (), Command.ERROR)
    answer, cancel = state.handle(FromWorker(fails, refused, 1.1))
    assert isinstance(answer, ToClient) and answer.message.header.code == "kernel"
    assert cancel.link == other.link and cancel.message.header == m.Cancel(session, other.message.seq)
    late = other.message.answer(m.Error("cancelled", "it was"), (), Command.ERROR)
    assert state.handle(FromWorker(other.link, late, 1.2)) == [] and not state.pending
    assert linked_route(state, session), "an error of a graph says nothing of the link"


def test_a_process_that_is_reached_at_two_addresses_is_lost_at_both() -> None:
    """Both have its devices, which go with the first that is lost; what waits at the other is answered all the same."""
    state = BrokerState("t", 10)
    for link in (A, B):
        (asked,) = state.handle(LinkOpened(link, 0.0))
        answered(state, asked, 0.0, instance=b"one")
        if link == A:
            client(state)
            ask(state, m.StatsQuery(), 1)
    state.handle(LinkLost(B, "gone", 1.0))
    out = state.handle(LinkLost(A, "gone", 1.0))
    assert [i.message.header.code for i in out if isinstance(i, ToClient)] == ["worker_lost"] and not state.pending


@pytest.mark.parametrize("gone", [A, B])
def test_losing_a_stage_of_a_relay_answers_and_cancels(gone: str) -> None:
    state, session = two_workers()
    link(state, session)
    linked_route(state, session)
    out = state.handle(LinkLost(gone, "gone", 1.1))
    (answer,) = [i for i in out if isinstance(i, ToClient)]
    assert answer.message.header.code == "worker_lost"
    assert [i.link for i in out if isinstance(i, ToWorker)] == [B if gone == A else A]


def test_a_link_that_breaks_sends_the_next_compute_through_here() -> None:
    state, session = two_workers()
    link(state, session)
    first, _ = linked_route(state, session)
    state.handle(FromWorker(A, first.message.answer(m.Error("unavailable", "link 3 is down", True), (), Command.ERROR), 1.1))
    (only,) = ask(state, m.GraphCompute(session, b"1" * 16, 0, [m.RouteStep(1, b"2" * 16, 0)]), 6)
    assert only.link == A and only.message.header.give is None


def test_what_only_brokers_and_workers_say_is_refused_of_a_client() -> None:
    state, session = two_workers()
    give = m.Give(1, b"t" * 16)
    for header in (m.PeerListen(), m.PeerDial(1, "tcp://victim:1", b"", 0), m.HandOver(b"t" * 16, 0),
                   m.StageCompute(session, b"1" * 16, 0, take=b"t" * 16),
                   m.StageCompute(session, b"1" * 16, 0, give=give)):  # fmt: skip
        (answer,) = ask(state, header, 1)
        assert answer.message.header.code == "protocol"


def test_links_are_not_changed_under_running_computes() -> None:
    state, session = two_workers()
    ask(state, m.GraphCompute(session, b"1" * 16, 0), 1)
    (answer,) = ask(state, m.Link(session, [0, 1]), 2)
    assert answer.message.header.code == "protocol"


def test_losing_the_second_stage_answers_the_client() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    hello(state, B)
    session = client(state)
    (first,) = ask(state, m.GraphCompute(session, b"1" * 16, 0, [m.RouteStep(1, b"2" * 16, 0)]), 5)
    state.handle(LinkLost(B, "gone", 1.0))
    (answer,) = state.handle(FromWorker(A, first.message.answer(m.ComputeDone(), [b"x"]), 1.1))
    assert isinstance(answer, ToClient) and answer.message.header.code == "worker_lost"


@pytest.mark.parametrize("kind", ["drain", "link", "compute"])
def test_what_was_asked_before_a_second_hello_is_nobodys(kind: str) -> None:
    """A client may say HELLO again at any time, in the middle of whatever it asked for."""
    state = BrokerState("t", 10)
    hello(state, A)
    hello(state, B)
    session = client(state)
    ask(state, m.AllocBuffer(session, 1, 60), 1)
    asked = {"drain": m.Drain(session), "link": m.Link(session, [0, 1]), "compute": m.GraphCompute(session, b"1" * 16, 0)}
    (sent,) = ask(state, asked[kind], 2)
    state.handle(FromClient(CLIENT, Message(Command.HELLO, m.Hello(PROTOCOL_VERSION, "client")), 1.0))
    made = {"drain": m.Ok(), "link": m.PeerAddress("tcp://x:1", b"i"), "compute": m.ComputeDone()}
    out = state.handle(FromWorker(sent.link, sent.message.answer(made[kind]), 1.0))
    assert not [i for i in out if isinstance(i, ToClient)] and state.clients[CLIENT].n_inflight == 0


def stages_of(out: list[Any]) -> list[str]:
    return [i.link for i in out if isinstance(i, ToWorker) and i.message.command == Command.STAGE_COMPUTE]


def test_computes_pass_through_here_until_links_are_up_and_nothing_is_overtaken_then() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    hello(state, B)
    session = client(state)
    compute = m.GraphCompute(session, b"1" * 16, 0, [m.RouteStep(1, b"2" * 16, 0)])
    (listen,) = ask(state, m.Link(session, [0, 1]), 1)
    (dial,) = state.handle(FromWorker(B, listen.message.answer(m.PeerAddress("tcp://x:1", b"i")), 1.0))
    (first,) = ask(state, compute, 2)
    assert stages_of([first]) == [A], "nobody waits for a dial"
    (answer,) = state.handle(FromWorker(A, dial.message.answer(m.Found(True)), 1.0))
    assert (answer.message.seq, answer.message.header) == (1, m.Found(True))
    (early,) = ask(state, compute, 3)
    assert stages_of([early]) == [A], "what is handed over would overtake the one before"
    (second,) = state.handle(FromWorker(A, first.message.answer(m.ComputeDone(), [b"x"]), 1.0))
    state.handle(FromWorker(B, second.message.answer(m.ComputeDone()), 1.0))
    (late,) = ask(state, compute, 4)
    assert stages_of([late]) == [A], "there is still one on its way"
    for passing in (early, late):
        (then,) = state.handle(FromWorker(A, passing.message.answer(m.ComputeDone(), [b"x"]), 1.0))
        state.handle(FromWorker(B, then.message.answer(m.ComputeDone()), 1.0))
    assert stages_of(ask(state, compute, 5)) == [A, B]


def test_a_link_that_nobody_waits_for_is_answered_at_once_and_used_when_it_is_up() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    hello(state, B)
    session = client(state)
    (listen,) = ask(state, m.Link(session, [0, 1]), 1)
    (dial,) = state.handle(FromWorker(B, listen.message.answer(m.PeerAddress("tcp://x:1", b"i")), 1.0))
    told = [i.message for i in ask(state, m.Cancel(session, 1), 2) if isinstance(i, ToClient)]
    assert {(t.seq, t.header) for t in told} == {(1, m.Found(False)), (2, m.Ok())}
    assert state.clients[CLIENT].n_inflight == 0
    assert state.handle(FromWorker(A, dial.message.answer(m.Found(True)), 1.0)) == [], "it has its answer"
    compute = m.GraphCompute(session, b"1" * 16, 0, [m.RouteStep(1, b"2" * 16, 0)])
    assert stages_of(ask(state, compute, 3)) == [A, B]


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


def hellos(out: list[Any]) -> dict[str, ToWorker]:
    return {i.link: i for i in out if isinstance(i, ToWorker) and i.message.command == Command.HELLO}


def test_a_silent_worker_is_asked_again_whether_it_computes_or_not() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    hello(state, B)
    session = client(state)
    ask(state, m.GraphCompute(session, b"1" * 16, 0), 1, 0, 0.0)
    state.handle(Tick(1.0))
    assert not hellos(state.handle(Tick(1.0 + limits.PING_DEADLINE_S)))
    out = state.handle(Tick(1.0 + limits.PING_DEADLINE_S + 0.1))
    assert list(hellos(out)) == [A, B] and [d.state for d in devices(state)] == ["silent", "silent"]
    (answer,) = [i for i in out if isinstance(i, ToClient)]
    assert answer.message.seq == 1 and answer.message.header.code == "worker_lost"


def devices(state: BrokerState) -> list[m.ListedDevice]:
    (answer,) = state.handle(FromClient(CLIENT, Message(Command.DEVICE_INFO, m.DeviceQuery(), seq=99), state.traffic.now_s))
    return answer.message.header.devices


def test_a_worker_that_answers_again_has_its_devices_and_sessions_under_a_new_epoch() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    session = client(state)
    (sent,) = ask(state, m.AllocBuffer(session, 1, 60), 1)
    state.handle(FromWorker(A, sent.message.answer(m.Ok()), 1.0))
    (sent,) = ask(state, m.StatsQuery(), 2)
    state.handle(Tick(2.0))
    out = state.handle(Tick(4.0))
    again = hellos(out)[A]
    assert again.message.epoch > sent.message.epoch and again.message.header.session == 1, "sessions go on"
    (refused,) = ask(state, m.StatsQuery(), 3)
    assert refused.message.header.code == "worker_lost"
    assert state.handle(FromWorker(A, sent.message.answer(m.Stats()), 4.0)) == [], "a late reply counts for nothing"
    answered(state, again, 4.5)
    assert [(d.state, d.free_bytes) for d in devices(state)] == [("ready", 100)]
    (sent,) = ask(state, m.StatsQuery(), 4)
    assert sent.message.epoch == again.message.epoch


def test_a_worker_is_ready_when_what_was_sent_before_was_read() -> None:
    """That lies before HELLO in the bulk channel, however long it takes there, as long as it moves."""
    state = BrokerState("t", 10)
    hello(state, A)
    session = client(state)
    ask(state, m.AllocBuffer(session, 1, 60), 1)
    state.handle(Tick(2.0))
    again = hellos(state.handle(Tick(4.0)))[A]
    answer = again.message.answer(m.Hello(PROTOCOL_VERSION, "worker", devices=[DEVICE]))
    (bulk,) = state.handle(FromWorker(A, answer, 4.0))
    for second in range(5, 30):
        state.handle(LinkCarried(A, 10_000 * second, 0.0, second))
        assert state.handle(FromWorker(A, answer, second)) == [], "it has answered that"
        assert Redial(A) not in state.handle(Tick(second))
        (refused,) = ask(state, m.StatsQuery(), 2, 0, second)
        assert refused.message.header.code == "worker_lost" and devices(state)[0].state == "silent"
    state.handle(FromWorker(A, bulk.message.answer(m.Hello(PROTOCOL_VERSION, "worker")), 30.0, True))
    assert devices(state)[0].state == "ready"


def test_a_worker_that_does_not_answer_on_its_bulk_channel_is_dialled_afresh() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    state.handle(Tick(2.0))
    again = hellos(state.handle(Tick(4.0)))[A]
    state.handle(FromWorker(A, again.message.answer(m.Hello(PROTOCOL_VERSION, "worker", devices=[DEVICE])), 5.0))
    state.handle(LinkCarried(A, 10_000, 0.0, 5.1))
    state.handle(LinkCarried(A, 10_500, 0.0, 8.0))
    assert Redial(A) not in state.handle(Tick(4.9 + limits.RECONNECT_S))
    assert Redial(A) in state.handle(Tick(5.1 + limits.RECONNECT_S))


def test_what_a_device_can_run_it_is_asked_itself() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    client(state)
    (sent,) = ask(state, m.DeviceQuery(abilities=True), 1)
    assert (sent.link, sent.message.header) == (A, m.DeviceQuery(abilities=True))
    told = m.DeviceList([m.ListedDevice("CPU", "cpu", fast_ops=["ADD"], slow_types=[0])], 1)
    (reply,) = state.handle(FromWorker(A, sent.message.answer(told), 1.0))
    assert reply.message.header == told


def test_why_a_worker_is_not_reached_is_kept_until_it_is() -> None:
    state = BrokerState("t", 10)
    state.handle(LinkOpened(A, 0.0))
    assert state.handle(Unreached(A, "connection refused", 3.0)) == [], "it is dialled on"
    assert state.workers[A].lost == "connection refused"
    assert state.handle(Tick(limits.RECONNECT_S + 0.1)) == [Redial(A)]
    assert state.workers[A].lost == "connection refused"
    hello(state, A, 7.0)
    client(state)
    state.handle(Unreached(A, "late news", 7.5))
    assert state.workers[A].lost == "" and devices(state)[0].state == "ready"
    assert state.handle(Unreached(B, "of nobody", 8.0)) == []


def test_what_ends_while_a_worker_is_away_is_ended_when_it_is_back() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    session = client(state)
    ask(state, m.AllocBuffer(session, 1, 60), 1)
    state.handle(Tick(2.0))
    out = state.handle(Tick(4.0))
    assert [i.message.header for i in ask(state, m.Drain(session), 2) if isinstance(i, ToClient)] == [m.Ok()]
    out = answered(state, hellos(out)[A], 5.0)
    assert [i.message.header for i in out if i.message.command == Command.DRAIN] == [m.Drain(session)]


def dialled(state: BrokerState, link: str, instance: bytes, now: float = 0.0) -> list[Any]:
    """A worker dials in on both channels."""
    hello = m.Hello(PROTOCOL_VERSION, "worker", instance, devices=[DEVICE])
    out = state.handle(FromWorker(link, Message(Command.HELLO, hello), now))
    bulk = m.Hello(PROTOCOL_VERSION, "worker-bulk", instance)
    return [*out, *state.handle(FromWorker(link, Message(Command.HELLO, bulk), now, True))]


def test_a_hello_that_is_replayed_changes_nothing() -> None:
    state = BrokerState("t", 10)
    channels = [Message(Command.HELLO, m.Hello(PROTOCOL_VERSION, role, b"i" * 16, session=3, devices=[DEVICE] * (not bulk)))
                for bulk, role in enumerate(("worker", "worker-bulk"))]  # fmt: skip
    for bulk, message in enumerate(channels):
        state.handle(FromWorker("dial/1", message, 0.0, bool(bulk)))
    session = client(state)
    assert [d.state for d in devices(state)] == ["ready"]
    ask(state, m.AllocBuffer(session, 1, 1), 1)
    assert state.handle(FromWorker("dial/1", channels[0], 1.0)) == []
    for i in state.handle(FromWorker("dial/1", channels[1], 1.0, True)):
        assert isinstance(i, ToWorker) and i.message.reply and i.message.command == Command.HELLO
    assert [d.state for d in devices(state)] == ["ready"] and state.pending


def test_a_worker_that_dials_in_again_gets_its_number_back_while_somebody_holds_it() -> None:
    state = BrokerState("t", 10)
    session = client(state)
    for i in (1, 2):
        dialled(state, f"dial/{i}", bytes([i]) * 16)
    ask(state, m.AllocBuffer(session, 1, 1), 1, 1)
    state.handle(LinkLost("dial/1", "gone", 1.0))
    state.handle(LinkLost("dial/2", "gone", 1.0))
    assert [d.state for d in devices(state)] == ["none", "lost"]
    dialled(state, "dial/3", b"3" * 16)
    out = dialled(state, "dial/4", bytes([2]) * 16)
    assert [d.state for d in devices(state)] == ["ready", "ready"]
    assert out[0].message.header.session == 1 and state.devices[1].link == "dial/4"
    dialled(state, "dial/5", bytes([2]) * 16)
    assert CloseLink("dial/4") not in out and state.devices[1].link == "dial/5" and "dial/4" not in state.workers


def test_lives_of_workers_leave_nothing_behind() -> None:
    state = BrokerState("t", 10)
    client(state)
    for i in range(3000):
        dialled(state, f"dial/{i}", i.to_bytes(16), float(i))
        state.handle(LinkLost(f"dial/{i}", "killed", float(i)))
    assert devices(state) == [] and not state.workers and not state.pending


def test_nothing_is_begun_for_a_client_that_has_gone() -> None:
    state = BrokerState("t", 10)
    for i in (1, 2):
        dialled(state, f"dial/{i}", bytes([i]) * 16)
    session = client(state)
    (first,) = ask(state, m.GraphCompute(session, b"1" * 16, 0, [m.RouteStep(1, b"2" * 16, 0)]), 1)
    state.handle(ClientLost(CLIENT, 1.0))
    assert state.handle(FromWorker(first.link, first.message.answer(m.ComputeDone(), [b"x"]), 1.1)) == []
    for i in (1, 2):
        state.handle(LinkLost(f"dial/{i}", "killed", 2.0))
    client(state)
    assert devices(state) == []


def test_a_long_list_of_devices_comes_in_pages() -> None:
    state = BrokerState("t", 10)
    client(state)
    for i in range(limits.MAX_DEVICES + 5):
        out = dialled(state, f"dial/{i}", i.to_bytes(16))
    assert [i.message.header.code for i in out if isinstance(i, ToWorker)][:1] == ["overloaded"]
    got: list[m.ListedDevice] = []
    while True:
        query = Message(Command.DEVICE_INFO, m.DeviceQuery(len(got)), seq=1)
        (answer,) = state.handle(FromClient(CLIENT, query, 0.0))
        page = decode(encode(answer.message)).header
        assert isinstance(page, m.DeviceList) and page.devices
        got += page.devices
        if len(got) == page.n_devices:
            break
    assert len(got) == limits.MAX_DEVICES


def test_a_worker_that_listens_is_dialled_again() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    session = client(state)
    ask(state, m.AllocBuffer(session, 1, 1), 1)
    out = state.handle(LinkLost(A, "gone", 1.0))
    assert Redial(A) in out
    assert [d.state for d in devices(state)] == ["lost"]
    state.handle(Tick(2.0))
    hello(state, A, 3.0)
    assert [d.state for d in devices(state)] == ["ready"]
    out = state.handle(LinkOpened(B, 3.0))
    assert Redial(B) in state.handle(Tick(3.1 + limits.RECONNECT_S)), "and one that was never there is tried again"


def test_a_child_that_ended_is_lost_at_once_whatever_it_was_doing() -> None:
    state = BrokerState("t", 10)
    session = client(state)
    hello = m.Hello(PROTOCOL_VERSION, "worker", b"i" * 16, devices=[msgspec.structs.replace(DEVICE, worker="local0")])
    for bulk, header in ((False, hello), (True, m.Hello(PROTOCOL_VERSION, "worker-bulk", b"i" * 16))):
        state.handle(FromWorker("dial/1", Message(Command.HELLO, header), 0.0, bulk))
    ask(state, m.GraphCompute(session, b"1" * 16, 0), 1)
    state.handle(Tick(1.0))
    answer, closed = state.handle(WorkerEnded("local0", "killed", 1.1))
    assert answer.message.header.code == "worker_lost" and closed == CloseLink("dial/1")


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
        self.asked: dict[tuple[str, bool], ToWorker] = {}
        self.session = client(self.state)
        for link in (A, B):
            self.connect(link)

    def take(self, out: list[Any]) -> None:
        for i in out:
            if isinstance(i, ToClient) and i.message.reply:
                assert i.message.seq in self.owed, "answered twice, or never asked"
                self.owed.remove(i.message.seq)
            elif isinstance(i, ToWorker):
                assert i.message.command != Command.GRAPH_COMPUTE, "that is a client's"
                if i.message.command == Command.HELLO:
                    self.asked[i.link, i.bulk] = i
                else:
                    self.wire.append(i)
            elif isinstance(i, Redial):
                self.asked = {(link, bulk): hello for (link, bulk), hello in self.asked.items() if link != i.link}
                self.take(self.state.handle(LinkOpened(i.link, self.now)))

    def connect(self, link: str) -> None:
        hello(self.state, link, self.now)

    @rule(link=st.sampled_from([A, B]), bulk=st.booleans(), instance=st.sampled_from([b"", b"same", b"other"]))
    def answer_hello(self, link: str, bulk: bool, instance: bytes) -> None:
        if (link, bulk) in self.asked:
            answer = m.Hello(PROTOCOL_VERSION, "worker", instance, devices=[DEVICE])
            reply = self.asked.pop((link, bulk)).message.answer(answer)
            self.take(self.state.handle(FromWorker(link, reply, self.now, bulk)))

    @rule(device=st.integers(0, 3), kind=st.integers(0, 7))
    def ask(self, device: int, kind: int) -> None:
        self.seq += 1
        self.owed.add(self.seq)
        route = [m.RouteStep(1 - device % 2, b"2" * 16, 0)]
        header: m.Header = [
            m.AllocBuffer(self.session, self.seq, 1), m.GraphCompute(self.session, b"1" * 16, 0, route),
            m.StatsQuery(), m.Drain(self.session), m.Link(self.session, [device % 2, 1 - device % 2]),
            m.Cancel(self.session, self.seq - 1), m.HaveWeights([]),
            m.FetchTensor(self.session, 1, 0, 0, (1, 1, 1, 1), m.Weight(bytes(32), 4), 1 - device % 2),
        ][kind]  # fmt: skip
        self.take(ask(self.state, header, self.seq, device, self.now))

    @rule(data=st.data(), refuse=st.booleans())
    def reply(self, data: st.DataObject, refuse: bool) -> None:
        if not self.wire:
            return
        sent = self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))
        made = {m.Ping: m.Ping(1), m.Found: m.Found(True), m.PeerAddress: m.PeerAddress("tcp://x:1", b"i")}
        kind = m.ANSWER[sent.message.command]
        header = m.Error("kernel", "no", data.draw(st.booleans())) if refuse else made.get(kind) or kind()
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
            left = {seq for seq, linking in self.state.clients[CLIENT].linking.items() if not linking.waited}
            waiting = {p.request.seq for p in self.state.pending.values() if p.rid} - left
            assert waiting == self.owed

    def teardown(self) -> None:
        if hasattr(self, "state"):
            for link in (A, B):
                self.take(self.state.handle(LinkLost(link, "end", self.now)))
            assert not self.owed and not any(e.allocated for e in self.state.devices.entries.values() if not e.holders)
            self.state.handle(ClientLost(CLIENT, self.now))
            assert not self.state.pending


TestBus = pytest.mark.filterwarnings("default")(Bus.TestCase)
TestBus.settings = settings(stateful_step_count=40)


def test_a_device_that_is_to_be_left_is_told_of_and_its_session_ends_with_its_last_buffer() -> None:
    state = BrokerState("t", 10)
    hello(state, A)
    hello(state, B)
    session = client(state)
    state.handle(Tick(0.9))
    (alloc,) = ask(state, m.AllocBuffer(session, 1, 64), 2, device=1)
    state.handle(FromWorker(B, alloc.message.answer(m.Found(False)), 1.0))
    (answer,) = ask(state, m.Retire(True), 3, device=1)
    assert answer.message.header == m.Ok() and state.devices[1].retired
    out = state.handle(Tick(1.1))
    assert [(i.rid, i.message.header) for i in out if isinstance(i, ToClient)] == [(CLIENT, m.DeviceQuery())]
    assert not [i for i in state.handle(Tick(1.2)) if isinstance(i, ToClient)], "it is told once"
    (free,) = ask(state, m.FreeBuffer(session, 1), 4, device=1)
    ok, drain = state.handle(FromWorker(B, free.message.answer(m.Ok()), 1.3))
    assert ok.message.header == m.Ok() and drain.message.header == m.Drain(session) and drain.link == B
    assert not state.devices[1].holders
    assert ask(state, m.Retire(False), 5, device=1) and not state.devices[1].retired
    (refused,) = ask(state, m.Retire(True), 6, device=9)
    assert refused.message.header.code == "handle"
