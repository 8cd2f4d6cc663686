"""A real worker process under attack: each threat gets a typed error, and the next good request its old answer."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq

from protocol import PROTOCOL_VERSION, limits
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.encoding import encode_graph, graph_digest
from protocol.frames import Message, decode, encode
from protocol.graph import Graph
from protocol.messages import Command
from tests.faults.mutations import mutated
from tests.support.attacker import SESSION, Attacker, GoodRequest, listening_worker
from tests.support.fixtures import content_hash
from tests.support.strategies import leaf


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    with listening_worker("--cache-dir", str(tmp_path_factory.mktemp("cache"))) as started:
        yield started


@pytest.fixture
def attacker(worker: tuple[int, subprocess.Popen[bytes]]) -> Iterator[Attacker]:
    a = Attacker(worker[0], random.randbytes(16))
    try:
        yield a
        assert worker[1].poll() is None, "the worker died"
        assert GoodRequest(a).answer() == GoodRequest.expected
    finally:
        a.ask(m.Drain(SESSION))
        a.close()


def test_handles_that_are_not_ours_are_refused(attacker: Attacker) -> None:
    good = GoodRequest(attacker)
    good.set_up()
    b = good.buffer
    assert attacker.code(m.GetTensor(SESSION, 99, 0, 4)) == "handle"
    assert attacker.code(m.GetTensor(SESSION + 1, b, 0, 4)) == "handle"
    assert attacker.code(m.GetTensor(SESSION, b, 253, 4)) == "handle"
    assert attacker.code(m.GetTensor(SESSION, b, (1 << 46) - 1, 4)) == "handle"
    assert attacker.code(m.SetTensor(SESSION, b, 252, 8), b"12345678") == "handle"
    assert attacker.code(m.SetTensor(SESSION, b, 0, 8, 4), b"12345678") == "protocol"
    assert attacker.code(m.CopyTensor(SESSION, b, 0, b, 128, 128, 64)) == "protocol"
    assert attacker.code(m.CopyTensor(SESSION, b, 200, b, 0, 128, 128)) == "handle"
    assert attacker.code(m.AllocBuffer(SESSION, b, 8)) == "handle"
    assert attacker.code(m.AllocBuffer(SESSION, 2, 1 << 45)) == "out_of_memory"
    assert attacker.code(m.FreeBuffer(SESSION, 2)) == "handle"


def test_a_freed_buffer_takes_its_graphs_with_it(attacker: Attacker) -> None:
    good = GoodRequest(attacker)
    good.set_up()
    assert attacker.code(m.FreeBuffer(SESSION, good.buffer)) == "ok"
    assert attacker.code(m.StageCompute(SESSION, good.digest, 0)) == "handle"
    assert attacker.code(m.GraphPut(SESSION, good.digest), good.frame) == "handle"


def test_a_graph_belongs_to_its_session(worker: tuple[int, subprocess.Popen[bytes]], attacker: Attacker) -> None:
    good = GoodRequest(attacker)
    good.set_up()
    other = Attacker(worker[0], random.randbytes(16))
    try:
        assert other.code(m.StageCompute(SESSION, good.digest, 0)) == "handle"
        assert other.code(m.GetTensor(SESSION, good.buffer, 0, 4)) == "handle"
    finally:
        other.close()


def test_fresh_memory_is_zero(attacker: Attacker) -> None:
    attacker.ask(m.AllocBuffer(SESSION, 3, 1 << 20))
    attacker.ask(m.SetTensor(SESSION, 3, 0, 1 << 16), b"\xff" * (1 << 16))
    attacker.ask(m.FreeBuffer(SESSION, 3))
    attacker.ask(m.AllocBuffer(SESSION, 3, 1 << 20))
    assert not any(bytes(attacker.ask(m.GetTensor(SESSION, 3, 0, 1 << 20)).payload[0]))


@pytest.mark.parametrize(("op", "index"), [
    (op, index) for op in ("GET_ROWS", "SET_ROWS", "MUL_MAT_ID", "ADD_ID", "ROPE")
    for index in (-1, 4, (1 << 31) - 1, -(1 << 31)) if (op, index) != ("ROPE", 4)
])  # fmt: skip
def test_indices_in_data_are_checked(attacker: Attacker, op: str, index: int) -> None:
    ids = np.array([0, index], np.int32)
    table, i32 = leaf(0, (32, 4, 1, 1)), leaf(GGMLType.I32, (2, 1, 1, 1))
    params: tuple[int, ...] = (0,) * 16
    if op == "ROPE":
        table = leaf(0, (32, 1, 2, 1))
        node = replace(table, op=op, src=(0, 1), params=(0, 32, 0, 0, 0, 1176256512, 1065353216, *(0,) * 9))
        leaves = [table, i32]
    elif op == "GET_ROWS":
        node, leaves = replace(leaf(0, (32, 2, 1, 1)), op=op, src=(0, 1)), [table, i32]
    elif op == "SET_ROWS":
        leaves = [leaf(0, (32, 2, 1, 1)), i32, table]
        node = replace(table, op=op, src=(0, 1, 2), view_src=2)
    elif op == "ADD_ID":
        leaves = [leaf(0, (32, 2, 1, 1)), table, leaf(GGMLType.I32, (2, 1, 1, 1))]
        node = replace(leaves[0], op=op, src=(0, 1, 2))
    else:
        leaves = [leaf(0, (32, 8, 4, 1)), leaf(0, (32, 1, 1, 1)), i32]
        node = replace(leaf(0, (8, 2, 1, 1)), op=op, src=(0, 1, 2))
    node = replace(node, params=node.params if op == "ROPE" else params)
    graph = Graph((*leaves, node), tuple(range(len(leaves))), (len(leaves),))
    frame = encode_graph(graph)
    assert attacker.code(m.GraphPut(SESSION, graph_digest(frame)), frame) == "ok"
    data = [ids.tobytes() if t.type == GGMLType.I32 else bytes(4 * t.n_elements) for t in leaves]
    assert attacker.code(m.StageCompute(SESSION, graph_digest(frame), len(data)), *data) == "kernel"


def test_inputs_of_the_wrong_size_or_number_are_refused(attacker: Attacker) -> None:
    square = replace(leaf(0, (32, 1, 1, 1)), op="SQR", src=(0,))
    frame = encode_graph(Graph((leaf(0, (32, 1, 1, 1)), square), (0,), (1,)))
    digest = graph_digest(frame)
    attacker.ask(m.GraphPut(SESSION, digest), frame)
    for payload in ([], [bytes(127)], [bytes(129)], [bytes(128)] * 2):
        assert attacker.code(m.StageCompute(SESSION, digest, len(payload)), *payload) == "handle"
    assert attacker.code(m.StageCompute(SESSION, digest, 1), bytes(128)) == "ok"


def test_a_digest_that_lies_and_a_hash_that_lies_are_refused(attacker: Attacker) -> None:
    good = GoodRequest(attacker)
    good.set_up()
    assert attacker.code(m.GraphPut(SESSION, b"0" * 16), good.frame) == "protocol"
    lie = m.SetTensor(SESSION, good.buffer, 0, 128, 0, 0, (32, 1, 1, 1), content_hash(b"something else"))
    assert attacker.code(lie, bytes(128)) == "protocol"
    query = m.SetTensorHash(SESSION, good.buffer, 0, 128, content_hash(b"something else"), 0, (32, 1, 1, 1))
    reply = attacker.ask(query).header
    assert isinstance(reply, m.Found) and not reply.found


def test_chunks_out_of_order_are_refused(attacker: Attacker) -> None:
    attacker.ask(m.AllocBuffer(SESSION, 4, 128))
    data = bytes(range(128))

    def chunk(at: int) -> m.SetTensor:
        return m.SetTensor(SESSION, 4, 0, 128, at, 0, (32, 1, 1, 1), content_hash(data))

    assert attacker.code(chunk(64), data[64:]) == "protocol"
    assert attacker.code(chunk(0), data[:64]) == "ok"
    assert attacker.code(chunk(32), data[32:]) == "protocol"
    assert attacker.code(chunk(0), data[:64]) == "ok"
    assert attacker.code(chunk(64), data[64:]) == "ok"
    assert bytes(attacker.ask(m.GetTensor(SESSION, 4, 0, 128)).payload[0]) == data


def test_what_is_read_with_something_else_is_held_against_its_buffer_too(attacker: Attacker) -> None:
    for buffer, data in ((7, b"first of"), (8, b"and more")):
        attacker.ask(m.AllocBuffer(SESSION, buffer, 8))
        attacker.ask(m.SetTensor(SESSION, buffer, 0, 8), data)
    both = m.GetTensor(SESSION, 7, 0, 8, [m.Extent(8, 0, 3), m.Extent(8, 3, 0), m.Extent(7, 0, 5)])
    assert [bytes(f) for f in attacker.ask(both).payload] == [b"first ofandfirst"]
    for wrong in (m.Extent(8, 0, 9), m.Extent(8, 8, 1), m.Extent(99, 0, 4)):
        assert attacker.code(m.GetTensor(SESSION, 7, 0, 8, [m.Extent(8, 0, 8), wrong])) == "handle"
    too_many = [m.Extent(8, 0, 8)] * (limits.MAX_EXTENTS + 1)
    assert attacker.code(m.GetTensor(SESSION, 7, 0, 8, too_many)) == "protocol"


def test_replays_and_earlier_epochs_are_fenced(attacker: Attacker) -> None:
    attacker.ask(m.AllocBuffer(SESSION, 5, 8))
    before = attacker.ask(m.StatsQuery()).header
    assert isinstance(before, m.Stats)
    attacker.send(m.SetTensor(SESSION, 5, 0, 8), b"replayed", seq=1)
    attacker.send(m.SetTensor(SESSION, 5, 0, 8), b"too late", epoch=attacker.epoch - 1)
    assert bytes(attacker.ask(m.GetTensor(SESSION, 5, 0, 8)).payload[0]) == bytes(8)
    after = attacker.ask(m.StatsQuery()).header
    assert isinstance(after, m.Stats) and after.n_fenced == before.n_fenced + 2


def test_a_hello_that_is_replayed_lets_nothing_in_that_has_been_here(attacker: Attacker) -> None:
    attacker.ask(m.AllocBuffer(SESSION, 6, 8))
    first = attacker.send(m.SetTensor(SESSION, 6, 0, 8), b"the last")
    attacker.wait(first)
    attacker.send(m.SetTensor(SESSION, 6, 0, 8), b"the next")
    attacker.wait(attacker.seq)
    attacker.greet()
    attacker.send(m.SetTensor(SESSION, 6, 0, 8), b"the last", seq=first)
    assert bytes(attacker.ask(m.GetTensor(SESSION, 6, 0, 8)).payload[0]) == b"the next"


def test_nothing_is_done_before_hello(worker: tuple[int, subprocess.Popen[bytes]]) -> None:
    a = Attacker(worker[0], random.randbytes(16))
    raw = a.context.socket(zmq.DEALER)
    try:
        raw.linger = 0
        raw.connect(f"tcp://127.0.0.1:{worker[0]}")
        raw.send_multipart(encode(Message(Command.ALLOC_BUFFER, m.AllocBuffer(1, 1, 1), seq=1)))
        assert raw.poll(10_000)
        reply = decode(raw.recv_multipart()).header
        assert isinstance(reply, m.Error) and "HELLO first" in reply.message
    finally:
        raw.close()
        a.close()


def test_an_epoch_that_no_prefix_holds_is_refused(attacker: Attacker) -> None:
    """A worker that took it could not say it."""
    hello = bytes(encode(Message(Command.HELLO, m.Hello(PROTOCOL_VERSION, "broker", random.randbytes(16), 1)))[1])
    wide = msgpack.packb(msgpack.unpackb(hello) | {"epoch": 1 << 32})
    attacker.seq += 1
    prefix = bytes(encode(Message(Command.HELLO, m.Ok(), seq=attacker.seq))[0])
    attacker.socket.send_multipart([prefix, wide])
    reply = attacker.wait(attacker.seq).header
    assert isinstance(reply, m.Error) and reply.code == "protocol" and "4294967295" in reply.message


def test_20000_fuzzed_messages_change_nothing(
    worker: tuple[int, subprocess.Popen[bytes]], attacker: Attacker
) -> None:
    """Mutations of good messages of every kind, and noise; the same process lives and answers as before."""
    rng = random.Random(20_000)
    good = GoodRequest(attacker)
    before = good.answer()
    rss = attacker.ask(m.StatsQuery()).header
    seeds: list[list[bytes]] = []
    for header, payload in [
        (m.AllocBuffer(SESSION, 50, 64), ()), (m.FreeBuffer(SESSION, 51), ()),
        (m.SetTensor(SESSION, 52, 0, 64), (bytes(64),)), (m.GetTensor(SESSION, 52, 0, 64), ()),
        (m.SetTensorHash(SESSION, 52, 0, 128, bytes(32), 0, (32, 1, 1, 1)), ()),
        (m.CopyTensor(SESSION, 52, 0, 53, 0, 8, 8), ()), (m.GraphPut(SESSION, good.digest), (good.frame,)),
        (m.StageCompute(SESSION, b"1" * 16, 0), ()), (m.GraphCompute(SESSION, b"1" * 16, 0), ()),
        (m.Cancel(SESSION, 3), ()), (m.Ping(1), ()), (m.StatsQuery(), ()),
        (m.FetchTensor(SESSION, 52, 0, 0, (32, 1, 1, 1), m.Weight(bytes(32), 128), 0, 1), ()),
        (m.ReadWeight(m.Weight(bytes(32), 128), 0), ()), (m.HaveWeights([m.Weight(bytes(32), 128, "a.gguf", 9)]), ()),
    ]:  # fmt: skip
        seeds.append([bytes(f) for f in encode(Message(m.COMMAND_OF[type(header)], header, payload, epoch=attacker.epoch))])
    sent = 0
    while sent < 20_000:
        frames = mutated(rng.choice(seeds), rng)
        attacker.socket.send_multipart(frames)
        sent += 1
        if sent % 200 == 0:
            while attacker.socket.poll(0):
                attacker.socket.recv_multipart()
    time.sleep(0.2)
    while attacker.socket.poll(200):
        attacker.socket.recv_multipart()
    # a mutated prefix may have moved this peer's counter far ahead: the true owner comes with a new epoch
    attacker.close()
    attacker.__init__(worker[0], random.randbytes(16))  # type: ignore[misc]
    assert GoodRequest(attacker).answer() == before
    after = attacker.ask(m.StatsQuery()).header
    assert isinstance(rss, m.Stats) and isinstance(after, m.Stats)
    assert after.n_refused > 10_000
    assert after.rss_bytes - rss.rss_bytes < 10 << 20
    assert Path(f"/proc/{worker[1].pid}").exists() and worker[1].poll() is None


def test_computes_of_several_sessions_take_turns(attacker: Attacker) -> None:
    large = leaf(0, (1 << 20, 1, 1, 1))
    node = replace(large, op="SQR", src=(0,))
    tail = replace(leaf(0, (1, 1, 1, 1)), op="SUM_ROWS", src=(1,))
    frame = encode_graph(Graph((replace(large, buffer=9), node, tail), (), (2,)))
    sessions = (SESSION, SESSION + 1)
    try:
        for session in sessions:
            attacker.ask(m.AllocBuffer(session, 9, 4 << 20))
            assert attacker.code(m.GraphPut(session, graph_digest(frame)), frame) == "ok"
        n = 150
        many = [attacker.send(m.StageCompute(SESSION, graph_digest(frame), 0)) for _ in range(n)]
        one = attacker.send(m.StageCompute(SESSION + 1, graph_digest(frame), 0))
        order = []
        while len(order) < n + 1:
            reply = attacker.reply()
            if reply.reply:
                order.append(reply.seq)
        assert order.index(one) < n // 2, "the other one had to wait for all of them"
        assert [seq for seq in order if seq != one] == many
    finally:
        for session in sessions:
            attacker.ask(m.Drain(session))
