"""Weights that one worker takes from another: who may read what, and whatever the other end does, never a wrong byte."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import PROTOCOL_VERSION, limits
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.errors import GgmqError
from protocol.frames import Message
from protocol.limits import MAX_CHUNK_BYTES
from tests.support.attacker import SESSION, Attacker, listening_worker
from tests.support.fixtures import content_hash
from tests.support.one_worker import OneWorker
from workers.cache import ModelFolder
from workers.fetches import MAX_FETCHES
from workers.sources import Sources
from workers.ticks import nothing
from workers.work import Dial, Later, Send, ToPeer, Work

MIB = 1 << 20
DATA = random.Random(4).randbytes(3 * MIB + 512)
N = len(DATA)
NE = (N // 4, 1, 1, 1)
WEIGHT = m.Weight(content_hash(DATA), N)
LINK = (b"broker", 9)


# -- who may read what -------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[Attacker, Attacker, Path]]:
    """A broker's connection and another worker's, and the worker's model folder."""
    models = tmp_path / "models"
    models.mkdir()
    with listening_worker("--cache-dir", str(tmp_path / "cache"), "--model-dir", str(models)) as (port, p):
        broker, peer = Attacker(port, b"broker"), Attacker(port, b"peer", role="peer")
        yield broker, peer, models
        assert p.poll() is None
        broker.close()
        peer.close()


def read(peer: Attacker, weight: m.Weight, at: int = 0) -> bytes | None:
    reply = peer.ask(m.ReadWeight(weight, at))
    assert isinstance(reply.header, m.Found), reply.header
    assert len(reply.payload) == reply.header.found
    return bytes(reply.payload[0]) if reply.payload else None


def had(broker: Attacker, *weights: m.Weight) -> list[int]:
    reply = broker.ask(m.HaveWeights(list(weights))).header
    assert isinstance(reply, m.Had), reply
    return reply.which


def test_who_names_a_weight_may_read_it_and_nothing_else(worker: tuple[Attacker, Attacker, Path]) -> None:
    broker, peer, models = worker
    (models / "m.gguf").write_bytes(b"head" + DATA + b"what else is in the file")
    there = m.Weight(WEIGHT.hash, N, "m.gguf", 4)
    other = m.Weight(content_hash(b"else"), N)
    assert read(peer, WEIGHT) is None and had(broker, WEIGHT, there, other) == [1]
    got = [read(peer, there, at) for at in range(0, N, MAX_CHUNK_BYTES)]
    assert b"".join(chunk or b"" for chunk in got) == DATA
    for weight in (m.Weight(WEIGHT.hash, N, "m.gguf", 5), m.Weight(WEIGHT.hash, N - 1, "m.gguf", 4),
                   m.Weight(other.hash, N, "m.gguf", 4), m.Weight(WEIGHT.hash, N, "../models/m.gguf", 4),
                   m.Weight(WEIGHT.hash, N, "n.gguf", 4), m.Weight(WEIGHT.hash, 1 << 45, "m.gguf", 4)):  # fmt: skip
        assert read(peer, weight) is None
    assert read(peer, there, N) is None and read(peer, there, 1 << 45) is None
    (models / "m.gguf").write_bytes(b"head" + bytes(N) + b"it is another now")
    assert read(peer, there) is None, "it was verified before it was written to"
    assert broker.code(m.ReadWeight(there, 0)) == "protocol"


def test_a_buffer_gives_what_was_verified_in_it(worker: tuple[Attacker, Attacker, Path]) -> None:
    broker, peer, _ = worker
    broker.ask(m.AllocBuffer(SESSION, 1, N + 64, bytes(32)))
    for at in range(0, N, MIB):
        assert read(peer, WEIGHT) is None, "not before all of it is there"
        broker.ask(m.SetTensor(SESSION, 1, 64, N, at, GGMLType.F32, NE, WEIGHT.hash), DATA[at : at + MIB])
    assert read(peer, WEIGHT, 2 * MIB) == DATA[2 * MIB : 3 * MIB] and read(peer, WEIGHT, 3 * MIB) == DATA[3 * MIB :]
    broker.ask(m.SetTensor(SESSION, 1, 99, 4), b"else")
    assert read(peer, WEIGHT, 2 * MIB) == DATA[2 * MIB : 3 * MIB], "the cache has it as it was"
    assert had(broker, WEIGHT) == [0]


def test_what_is_written_to_while_it_is_read_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its being looked at and its being read."""
    (tmp_path / "m.gguf").write_bytes(DATA)
    folder = ModelFolder(tmp_path)
    device: Any = None
    sources = Sources(device, None, folder, lambda weight: None)
    there = m.Weight(WEIGHT.hash, N, "m.gguf")
    assert sources.read(there, 0, nothing) == DATA[:MIB]
    real = folder.chunk

    def chunk(*args: Any) -> bytes | None:
        (tmp_path / "m.gguf").write_bytes(bytes(N + 1))
        return real(*args)

    monkeypatch.setattr(folder, "chunk", chunk)
    assert sources.read(there, 0, nothing) is None


# -- whatever the other end does ---------------------------------------------------------------------------------------


class Fetching(OneWorker):
    """With a link to another worker, which the test plays, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.links = self.executor.links
        self.asked: list[Message] = []
        self.answers: list[Message] = []
        self.queue: list[tuple[bytes, Message]] = []
        self.ask(m.AllocBuffer(SESSION, 1, N, bytes(32)))
        dial = m.PeerDial(LINK[1], "tcp://there:1", b"other", 0)
        out = self.links.dial(self.rid, Message(m.COMMAND_OF[m.PeerDial], dial, seq=90, epoch=1), b"us", 0.0)
        assert isinstance(out[0], Dial)
        hello = Message(m.Command.HELLO, m.Hello(PROTOCOL_VERSION, "worker", b"other"), reply=True, epoch=1, seq=1)
        self.carry_out(self.links.received(LINK, hello, 0.0))
        assert [a.header for a in self.answers] == [m.Found(True)]
        self.answers.clear()

    def carry_out(self, instructions: Sequence[Any]) -> None:
        for i in instructions:
            if isinstance(i, ToPeer):
                if isinstance(i.message.header, m.ReadWeight):
                    self.asked.append(i.message)
            elif isinstance(i, Later):
                self.queue.append((i.rid, i.message))
            elif isinstance(i, Send):
                self.answers.append(i.message)
            elif isinstance(i, Work):
                self.carry_out(self.executor.execute(i, nothing))

    def fetch(self) -> None:
        self.seq += 1
        h = m.FetchTensor(SESSION, 1, 0, GGMLType.F32, NE, WEIGHT, 0, LINK[1])
        request = Message(m.Command.FETCH_TENSOR, h, (), False, 0, self.epoch, self.seq)
        self.carry_out(self.links.fetches.begin(self.rid, request, self.links.now_s))

    def reply(self, payload: Sequence[bytes], found: bool = True, at: int = 0) -> None:
        """The other worker answers a question."""
        question = self.asked.pop(at)
        self.carry_out(self.links.received(LINK, question.answer(m.Found(found), payload), self.links.now_s))

    def right(self) -> list[bytes]:
        h = self.asked[0].header
        assert isinstance(h, m.ReadWeight)
        return [DATA[h.at : h.at + MAX_CHUNK_BYTES]]

    def turn(self) -> None:
        """What waits has its turn."""
        while self.queue:
            rid, message = self.queue.pop(0)
            if self.state.current(rid, message):
                self.carry_out(self.links.fetches.take(rid, message))

    @property
    def verified(self) -> bool:
        return self.executor._holder(WEIGHT) is not None

    def bytes(self) -> bytes:
        return bytes(self.ask(m.GetTensor(SESSION, 1, 0, N)).payload[0])


def test_a_weight_that_comes_in_order_is_there() -> None:
    w = Fetching()
    w.fetch()
    assert len(w.asked) == 4 and not w.answers
    while w.asked:
        w.reply(w.right())
    assert not w.verified, "nothing is stored in the middle of something else"
    w.turn()
    assert [a.header for a in w.answers] == [m.Found(True)] and w.verified and w.bytes() == DATA
    assert not w.links.fetches.under_way and not w.links.fetches.asked


@pytest.mark.parametrize("answer", ["not found", "short", "long", "two", "none", "error", "out of order", "wrong at last"])
def test_what_is_wrong_ends_it_and_says_how_far_it_came(answer: str) -> None:
    w = Fetching()
    w.fetch()
    w.reply(w.right())
    w.turn()
    expected = MIB
    if answer == "error":
        refusal = w.asked.pop(0).refusal(GgmqError("no"))
        w.carry_out(w.links.received(LINK, refusal, 0.0))
    elif answer == "out of order":
        w.reply([DATA[2 * MIB : 3 * MIB]], at=1)
    elif answer == "wrong at last":
        while len(w.asked) > 1:
            w.reply(w.right())
        w.reply([bytes(512)])
        expected = 0
    else:
        chunk = w.right()[0]
        payload = {"short": [chunk[:-1]], "long": [chunk + b"x"], "two": [chunk, chunk]}.get(answer, [])
        w.reply(payload, answer != "not found")
    w.turn()
    assert [a.header for a in w.answers] == [m.Found(False, expected)] and not w.verified
    assert LINK in w.links.links, "the link is still of use"
    for _ in range(len(w.asked)):
        w.reply(w.right())  # too late
    w.turn()
    assert len(w.answers) == 1
    for at in range(expected, N, MIB):  # whoever asked sends the rest
        w.ask(m.SetTensor(SESSION, 1, 0, N, at, GGMLType.F32, NE, WEIGHT.hash), DATA[at : at + MIB])
    assert w.verified and w.bytes() == DATA


def test_one_that_says_nothing_is_given_up_and_one_that_takes_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    w = Fetching()
    w.fetch()
    w.carry_out(w.links.tick(limits.FETCH_STALL_S + 0.1))
    assert [a.header for a in w.answers] == [m.Found(False, 0)]
    w.answers.clear()
    w.asked.clear()
    monkeypatch.setattr(limits, "CREDIT_CHUNKS", 1)
    w.fetch()
    for waits_s in (1.0, limits.FETCH_S):
        assert len(w.asked) == 1
        w.reply(w.right())
        w.carry_out(w.links.fetches.tick(w.links.fetches.now_s + waits_s))
        assert not w.answers, "what came waits for its turn, however long that takes"
        w.turn()
    assert [a.header for a in w.answers] == [m.Found(False, 2 * MIB)] and not w.asked
    w.links.now_s = w.links.fetches.now_s
    w.fetch()
    while w.asked:
        w.reply(w.right())
        w.turn()
    assert w.answers[-1].header == m.Found(True) and w.bytes() == DATA


def test_a_link_that_breaks_and_an_epoch_that_ends() -> None:
    w = Fetching()
    w.fetch()
    w.reply(w.right())
    w.turn()
    w.greet(2)
    w.carry_out(w.links.tick(1.0))
    assert not w.links.fetches.under_way and not w.answers, "nobody waits for it"
    assert w.ask(m.SetTensorHash(SESSION, 1, 0, N, WEIGHT.hash, GGMLType.F32, NE)).header == m.Found(False, MIB)
    w.asked.clear()
    w.fetch()
    first = w.asked[0].header
    assert isinstance(first, m.ReadWeight) and first.at == MIB, "what came is not asked for again"
    w.carry_out(w.links.lost(LINK, "test"))
    assert [a.header for a in w.answers] == [m.Found(False, MIB)] and not w.links.fetches.asked
    w.fetch()
    assert [a.header for a in w.answers[1:]] == [m.Found(False, MIB)], "there is no link"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["right", "right", "right", "zeros", "not found", "turn", "fetch", "send", "write", "epoch",
                                 "free", "tick"]), max_size=25))  # fmt: skip
def test_whatever_happens_it_counts_only_when_it_is_right(steps: list[str]) -> None:
    w = Fetching()
    w.fetch()
    for step in steps:
        try:
            if step in ("right", "zeros", "not found") and w.asked:
                right = w.right()
                payload = {"right": right, "zeros": [bytes(len(right[0]))]}.get(step, [])
                w.reply(payload, step != "not found")
            elif step == "turn":
                w.turn()
            elif step == "fetch":
                w.fetch()
            elif step == "send":
                found = w.ask(m.SetTensorHash(SESSION, 1, 0, N, WEIGHT.hash, GGMLType.F32, NE)).header
                assert isinstance(found, m.Found)
                if not found.found:
                    part = m.SetTensor(SESSION, 1, 0, N, found.at, GGMLType.F32, NE, WEIGHT.hash)
                    w.ask(part, DATA[found.at : found.at + MIB])
            elif step == "write":
                w.ask(m.SetTensor(SESSION, 1, 7, 4), b"else")
            elif step == "epoch":
                w.greet(w.epoch + 1)
            elif step == "free":
                w.ask(m.FreeBuffer(SESSION, 1))
                w.ask(m.AllocBuffer(SESSION, 1, N, bytes(32)))
            elif step == "tick":
                w.carry_out(w.links.tick(w.links.now_s + 2))
        except GgmqError:
            pass
        if w.verified:
            assert w.bytes() == DATA
    w.turn()
    assert not w.verified or w.bytes() == DATA
    assert all(isinstance(a.header, m.Found | m.Error) for a in w.answers)
    assert len({a.seq for a in w.answers}) == len(w.answers), "each is answered once"


def test_fetches_at_once_are_bounded() -> None:
    w = Fetching()
    for _ in range(40):
        w.fetch()
    assert len(w.links.fetches.under_way) == MAX_FETCHES and len(w.asked) == 4 * MAX_FETCHES
    assert [a.header for a in w.answers] == [m.Found(False)] * (40 - MAX_FETCHES)
