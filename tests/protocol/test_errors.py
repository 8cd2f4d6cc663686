"""Errors on their way from a worker over the broker to a client: what they say arrives as it left."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.events import FromClient, FromWorker, LinkOpened, ToClient, ToWorker
from broker.state import BrokerState
from protocol import PROTOCOL_VERSION
from protocol import messages as m
from protocol.errors import BY_CODE, GgmqError, RemoteError, WorkerLost
from protocol.frames import Message, decode, encode
from protocol.messages import Command
from workers.state import WorkerState
from workers.work import Send

LINK, CLIENT = "tcp://w:1", b"c"
LISTED = m.DeviceInfo("CPU", "cpu", worker="listed")
CODES = st.sampled_from(sorted(BY_CODE)) | st.text(min_size=1, max_size=40)
NAMES = st.text(min_size=1, max_size=256)


def over_the_wire(message: Message) -> Message:
    return decode([bytes(f) for f in encode(message)])


def failed(code: str, message: str, retryable: bool) -> GgmqError:
    """An error as a worker raises it."""
    error = BY_CODE.get(code, RemoteError)(message)
    error.code, error.retryable = code, retryable
    return error


def carried(error: GgmqError, worker: str = "", device: str = "") -> GgmqError:
    """What a client hears of an error that a worker with these names, or none, has with a request."""
    broker = BrokerState("t", 1)
    (hello,) = broker.handle(LinkOpened(LINK, 0.0))
    assert isinstance(hello, ToWorker)
    answer = m.Hello(PROTOCOL_VERSION, "worker", b"t", devices=[LISTED])
    (bulk,) = broker.handle(FromWorker(LINK, hello.message.answer(answer), 0.0))
    assert isinstance(bulk, ToWorker)
    broker.handle(FromWorker(LINK, bulk.message.answer(answer), 0.0, True))
    (welcome,) = broker.handle(FromClient(CLIENT, Message(Command.HELLO, m.Hello(PROTOCOL_VERSION, "client")), 0.0))
    assert isinstance(welcome, ToClient) and isinstance(welcome.message.header, m.Hello)
    alloc = Message(Command.ALLOC_BUFFER, m.AllocBuffer(welcome.message.header.session, 1, 8), seq=1)
    (asked,) = broker.handle(FromClient(CLIENT, over_the_wire(alloc), 0.0))
    assert isinstance(asked, ToWorker)
    sent = WorkerState("t", worker, device).refuse(b"r", over_the_wire(asked.message), error)
    assert isinstance(sent, Send)
    (heard,) = broker.handle(FromWorker(LINK, over_the_wire(sent.message), 0.0))
    assert isinstance(heard, ToClient)
    reply = over_the_wire(heard.message)
    assert reply.command == Command.ERROR and isinstance(reply.header, m.Error)
    return reply.header.error()


def facts(error: GgmqError) -> tuple[Any, ...]:
    return error.code, error.retryable, error.worker, error.device, error.message


@given(CODES, st.text(max_size=4096), st.booleans(), NAMES, NAMES)
def test_all_that_an_error_says_passes_every_hop(code: str, message: str, retryable: bool, worker: str, device: str) -> None:
    heard = carried(failed(code, message, retryable), worker, device)
    assert facts(heard) == (code, retryable, worker, device, message)
    assert type(heard) is BY_CODE.get(code, RemoteError)


@given(CODES, st.text(max_size=50), st.booleans())
def test_a_broker_names_who_did_not_name_himself(code: str, message: str, retryable: bool) -> None:
    assert facts(carried(failed(code, message, retryable))) == (code, retryable, "listed", "CPU", message)


@given(CODES, st.booleans(), st.sampled_from(["", "left"]))
def test_the_text_names_the_place_once(code: str, retryable: bool, worker: str) -> None:
    text = str(carried(failed(code, "it went wrong", retryable), worker, "CPU" if worker else ""))
    assert text.count(worker or "listed") == text.count("CPU") == text.count("it went wrong") == 1


@pytest.mark.parametrize("kind", sorted(BY_CODE.values(), key=lambda kind: kind.code))
def test_a_kind_says_itself_whether_to_try_again(kind: type[GgmqError]) -> None:
    assert carried(kind("no")).retryable == kind.retryable


def test_a_message_that_is_too_long_loses_its_end() -> None:
    assert carried(GgmqError("ab" * 4000)).message == "ab" * 2048


def test_a_lost_worker_is_told_in_one_sentence() -> None:
    assert str(WorkerLost("it was killed").at("left", "CPU")) == "worker left (CPU) was lost: it was killed"
    assert str(WorkerLost("a local worker ended")) == "a local worker ended"
