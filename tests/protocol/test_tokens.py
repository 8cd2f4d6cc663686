"""Tokens of HELLO: what proves that somebody belongs to a cluster, and what does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.events import CloseLink, FromClient, FromWorker, ToClient, ToWorker
from broker.state import BrokerState
from protocol import PROTOCOL_VERSION, tokens
from protocol import messages as m
from protocol.frames import Message
from protocol.messages import Command

ID = st.binary(min_size=16, max_size=16)
OURS, THEIRS, NAME = b"o" * 16, b"t" * 16, b"n" * 16


@given(ID, ID, ID, st.sampled_from(["worker", "client", "broker"]))
def test_a_token_proves_one_cluster_and_one_role(name: bytes, ours: bytes, theirs: bytes, role: str) -> None:
    said = tokens.token(name, role, ours)
    assert len(said) <= 32 and said[:16] == name and ours not in said[16:]
    assert tokens.belongs(said, role, ours) and tokens.of_a_cluster(said)
    assert ours == theirs or not tokens.belongs(said, role, theirs)
    assert not tokens.belongs(said, "answer", ours) and not tokens.belongs(said, role, b"")
    assert not tokens.belongs(name, role, ours) and not tokens.of_a_cluster(tokens.token(name, role, b""))


@given(st.binary(max_size=32))
def test_no_other_bytes_prove_anything(said: bytes) -> None:
    assert not tokens.belongs(said, "client", OURS) and not tokens.belongs(said, "client", b"")


@pytest.mark.parametrize(("mine", "said", "taken"), [
    (OURS, tokens.token(NAME, "client", OURS), True), (OURS, b"", True), (b"", b"", True), (OURS, NAME, True),
    (OURS, tokens.token(NAME, "client", THEIRS), False), (b"", tokens.token(NAME, "client", OURS), False),
    (OURS, tokens.token(NAME, "worker", OURS), False), (OURS, OURS + OURS, False),
])  # fmt: skip
def test_a_broker_answers_its_own_cluster_and_who_names_none(mine: bytes, said: bytes, taken: bool) -> None:
    state = BrokerState("t", 10, b"b" * 16, cluster=mine)
    hello = Message(Command.HELLO, m.Hello(PROTOCOL_VERSION, "client", said))
    (reply,) = state.handle(FromClient(b"c", hello, 0.0))
    assert isinstance(reply, ToClient) and isinstance(reply.message.header, m.Hello if taken else m.Error)
    assert bool(state.clients) == taken
    if isinstance(reply.message.header, m.Hello):
        assert reply.message.header.token == tokens.answer(said, mine)
        assert b"b" * 16 not in reply.message.header.token  # what names a broker to its workers is for them


@pytest.mark.parametrize(("mine", "said", "taken"), [
    (OURS, tokens.token(NAME, "worker", OURS), True), (OURS, NAME, True), (b"", NAME, True),
    (OURS, tokens.token(NAME, "worker", THEIRS), False), (b"", tokens.token(NAME, "worker", OURS), False),
])  # fmt: skip
def test_a_broker_takes_workers_of_its_own_cluster(mine: bytes, said: bytes, taken: bool) -> None:
    state = BrokerState("t", 10, b"b" * 16, cluster=mine)
    device = m.DeviceInfo("CPU", "cpu", worker="w", total_bytes=1, free_bytes=1)
    for bulk in (False, True):
        role = "worker-bulk" if bulk else "worker"
        header = m.Hello(PROTOCOL_VERSION, role, said, devices=[] if bulk else [device])
        out = state.handle(FromWorker("dial/0.aa", Message(Command.HELLO, header), 1.0, bulk))
        if not bulk:
            answer = out[0]
            assert isinstance(answer, ToWorker) and isinstance(answer.message.header, m.Hello if taken else m.Error)
            assert taken or isinstance(out[1], CloseLink)
            if isinstance(answer.message.header, m.Hello):
                assert tokens.belongs(answer.message.header.token, "broker", mine) == bool(mine)
    assert len(state.devices.entries) == taken
