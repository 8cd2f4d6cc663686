"""Weights that stay when their session has ended: who gets them, who does not, and when they go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from protocol import messages as m
from protocol.content import Part, content_name
from protocol.dtypes import GGMLType
from protocol.encoding import encode_graph, graph_digest
from protocol.graph import Graph
from tests.support.attacker import Attacker, listening_worker
from tests.support.processes import until
from tests.support.strategies import leaf
from workers.devices import open_device
from workers.leases import Content, Leases, written

MIB = 1 << 20
ROW = 64
NE = (ROW, 16, 1, 1)
TENSOR = np.random.default_rng(3).integers(0, 255, 34 * ROW // 32 * NE[1], np.uint8).tobytes()
FIRST, SECOND = (Part(at, len(TENSOR), int(GGMLType.Q8_0), NE, blake3(data).digest())
                 for at, data in ((0, TENSOR), (2 * len(TENSOR), TENSOR[::-1])))  # fmt: skip
N_BYTES = 4 * len(TENSOR)
NAME = content_name(N_BYTES, [FIRST, SECOND])


# -- what a buffer holds -----------------------------------------------------------------------------------------------

sizes = st.integers(1, 9)


THREE = [Part(at, n, 0, (n // 4, 1, 1, 1), bytes([at]) * 32) for at, n in ((0, 4), (4, 8), (16, 4))]


@given(st.permutations(THREE), st.lists(st.tuples(st.integers(0, 20), sizes)))
def test_content_is_complete_when_all_parts_are_there_and_none_was_changed(
    parts: list[Part], changes: list[tuple[int, int]]
) -> None:
    content = Content(content_name(24, sorted(parts)), 24)
    for i, part in enumerate(parts):
        content.verified(part)
        assert content.complete == (i == len(parts) - 1)
    for offset, n_bytes in changes:
        content.changed(range(offset, offset + n_bytes))
    touched = [p for p in parts if any(p.offset < at + n and at < p.offset + p.n_bytes for at, n in changes)]
    assert content.complete == (not touched)
    for part in touched:
        content.verified(part)
    assert content.complete
    content.spoil()
    for part in parts:
        content.verified(part)
    assert not content.complete


@pytest.mark.parametrize("other", [
    [FIRST], [FIRST, SECOND._replace(offset=SECOND.offset + 1)], [FIRST, SECOND._replace(type=int(GGMLType.I8))],
    [FIRST, SECOND._replace(ne=(ROW, 8, 2, 1))], [FIRST, SECOND._replace(hash=FIRST.hash)],
    [FIRST, SECOND._replace(n_bytes=SECOND.n_bytes - 1)],
])  # fmt: skip
def test_a_name_says_all_that_there_is(other: list[Part]) -> None:
    assert content_name(N_BYTES, other) != NAME != content_name(N_BYTES + 1, [FIRST, SECOND])
    assert content_name(N_BYTES, [SECOND, FIRST]) == NAME


@pytest.mark.parametrize(("graph", "expected"), [
    (Graph((leaf(0, (4, 1, 1, 1), 5), replace(leaf(0, (4, 1, 1, 1)), op="SQR", src=(0,))), (), (1,)), set()),
    (Graph((leaf(0, (4, 1, 1, 1), 5), replace(leaf(0, (4, 1, 1, 1), 6), op="SQR", src=(0,))), (), (1,)), {6}),
    (Graph((leaf(0, (4, 1, 1, 1), 5), replace(leaf(0, (4, 1, 1, 1)), op="SQR", src=(0,), view_src=0)), (), (1,)), {5}),
    (Graph((leaf(0, (4, 1, 1, 1), 5), replace(leaf(0, (4, 1, 1, 1)), op="RESHAPE", src=(0,), view_src=0)), (), (1,)), set()),
])  # fmt: skip
def test_which_buffers_a_graph_writes_to(graph: Graph, expected: set[int]) -> None:
    assert written(graph) == expected


def test_leases_end_in_their_order_by_time_by_number_and_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    n_kept = 64
    monkeypatch.setattr("workers.leases.MAX_KEPT", n_kept)
    device, now = open_device("reference", 1, 100 * MIB), [0.0]
    leases = Leases(device, 10.0, lambda: now[0])
    for i in range(n_kept + 1):
        now[0] = i / 100
        leases.leave(bytes([i]) * 32, device.alloc(MIB))
    assert len(leases) == n_kept and leases.n_bytes == n_kept * MIB
    assert leases.take(bytes(32), MIB) is None, "the oldest has made room"
    assert leases.take(b"\1" * 32, MIB - 1) is None
    taken = leases.take(b"\1" * 32, MIB)
    assert taken is not None and leases.take(b"\1" * 32, MIB) is None, "it belongs to one"
    now[0] = 10.04
    leases.expire()
    assert len(leases) == n_kept - 4 and device.info().free_bytes == (100 - n_kept + 3) * MIB
    monkeypatch.setattr(device, "short", lambda: True)
    leases.expire()
    assert not leases and device.info().free_bytes == 99 * MIB
    none = Leases(device, 0.0, lambda: now[0])
    none.leave(b"\1" * 32, taken.buffer)
    assert not none and device.info().free_bytes == 100 * MIB


def test_two_sessions_that_had_the_same_leave_two_buffers() -> None:
    device = open_device("reference", 1, 100 * MIB)
    leases = Leases(device, 10.0, lambda: 0.0)
    buffers = [device.alloc(MIB) for _ in range(3)]
    for b in buffers:
        leases.leave(NAME, b)
    taken = [leases.take(NAME, MIB) for _ in range(4)]
    assert [lease and lease.buffer for lease in taken] == [*reversed(buffers), None]


# -- a real worker -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker() -> Iterator[tuple[Attacker, int]]:
    with listening_worker("-m", "64", "--keep", "300") as (port, _):
        a = Attacker(port, b"keeper")
        yield a, port
        a.close()


SESSIONS = iter(range(100, 10_000))


def found(a: Attacker, header: m.Header) -> bool:
    answer = a.ask(header).header
    assert isinstance(answer, m.Found), answer
    return answer.found


def stats(a: Attacker) -> m.Stats:
    answer = a.ask(m.StatsQuery()).header
    assert isinstance(answer, m.Stats)
    return answer


def send(a: Attacker, session: int, part: Part, data: bytes, n: int | None = None) -> None:
    header = m.SetTensor(session, 1, part.offset, part.n_bytes, 0, part.type, part.ne, part.hash)
    assert a.code(header, data[:n]) == "ok"


def fill(a: Attacker, name: bytes = NAME) -> int:
    """A session with a buffer of that content."""
    session = next(SESSIONS)
    assert not found(a, m.AllocBuffer(session, 1, N_BYTES, content=name))
    send(a, session, FIRST, TENSOR)
    send(a, session, SECOND, TENSOR[::-1])
    return session


def there(a: Attacker, name: bytes = NAME) -> bool:
    """Whether the worker has kept a buffer of that content; it is gone then."""
    session = next(SESSIONS)
    kept = found(a, m.AllocBuffer(session, 1, N_BYTES, content=name))
    data = a.ask(m.GetTensor(session, 1, 0, N_BYTES)).payload[0]
    gap = bytes(len(TENSOR))
    assert bytes(data) == (TENSOR + gap + TENSOR[::-1] + gap if kept else bytes(N_BYTES))
    a.ask(m.FreeBuffer(session, 1))
    a.ask(m.Drain(session))
    return kept


def test_the_next_session_has_what_the_last_one_left(worker: tuple[Attacker, int]) -> None:
    a, _ = worker
    a.ask(m.Drain(fill(a)))
    s = stats(a)
    assert (s.kept_bytes, s.n_buffers, s.buffer_bytes, s.free_bytes) == (N_BYTES, 0, 0, 64 * MIB)
    session = next(SESSIONS)
    assert found(a, m.AllocBuffer(session, 1, N_BYTES, content=NAME))
    s = stats(a)
    assert (s.kept_bytes, s.n_buffers, s.buffer_bytes, s.free_bytes) == (0, 1, N_BYTES, 64 * MIB - N_BYTES)
    other = next(SESSIONS)
    assert not found(a, m.AllocBuffer(other, 1, N_BYTES, content=NAME)), "one that is in use is nobody else's"
    a.ask(m.Drain(other))
    assert stats(a).kept_bytes == 0, "it was never filled"
    a.ask(m.Drain(session))
    assert there(a) and not there(a)


def put(a: Attacker, session: int, graph: Graph, *payload: bytes) -> None:
    frame = encode_graph(graph)
    assert a.code(m.GraphPut(session, graph_digest(frame)), frame) == "ok"
    assert a.code(m.StageCompute(session, graph_digest(frame), len(payload)), *payload) == "ok"


def write_by_a_node(a: Attacker, session: int) -> None:
    square = replace(leaf(0, (4, 1, 1, 1), 1), op="SQR", src=(0,))
    put(a, session, Graph((leaf(0, (4, 1, 1, 1)), square), (0,), (1,)), bytes(16))


def write_by_a_copy(a: Attacker, session: int) -> None:
    source = leaf(0, (4, 1, 1, 1))
    cpy = replace(leaf(0, (4, 1, 1, 1)), op="CPY", src=(0, 1), view_src=1)
    put(a, session, Graph((source, leaf(0, (4, 1, 1, 1), 1), cpy), (0,), (2,)), bytes(16))


CHANGES: dict[str, Callable[[Attacker, int], object]] = {
    "a byte": lambda a, s: a.ask(m.SetTensor(s, 1, 5, 1), b"x"),
    "its own bytes without a hash": lambda a, s: a.ask(m.SetTensor(s, 1, 0, len(TENSOR)), TENSOR),
    "a copy": lambda a, s: a.ask(m.CopyTensor(s, 1, FIRST.n_bytes, 1, SECOND.offset + 8, 4, 4)),
    "the beginning of an upload": lambda a, s: send(a, s, FIRST, TENSOR, 100),
    "a hash that is not here": lambda a, s: found(a, m.SetTensorHash(s, 1, 0, FIRST.n_bytes, bytes(32), FIRST.type, NE)),
    "bytes of another hash": lambda a, s: a.code(m.SetTensor(s, 1, 0, FIRST.n_bytes, 0, FIRST.type, NE, FIRST.hash),
                                                 TENSOR[::-1]),
    "a node": write_by_a_node,
    "a copying node": write_by_a_copy,
    "freed": lambda a, s: a.ask(m.FreeBuffer(s, 1)),
}  # fmt: skip


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_was_changed_is_not_kept(worker: tuple[Attacker, int], change: str) -> None:
    a, _ = worker
    session = fill(a)
    CHANGES[change](a, session)
    a.ask(m.Drain(session))
    assert stats(a).kept_bytes == 0 and not there(a)


def test_what_only_reads_changes_nothing(worker: tuple[Attacker, int]) -> None:
    a, _ = worker
    session = fill(a)
    a.ask(m.AllocBuffer(session, 2, 64))
    a.ask(m.CopyTensor(session, 1, 0, 2, 0, 64, 64))
    a.ask(m.SetTensor(session, 1, len(TENSOR), 8), b"\0" * 8)
    weight = leaf(int(GGMLType.Q8_0), NE, 1)
    rows = replace(leaf(0, (ROW, 1, 1, 1)), op="GET_ROWS", src=(0, 1))
    put(a, session, Graph((weight, leaf(int(GGMLType.I32), (1, 1, 1, 1)), rows), (1,), (2,)), bytes(4))
    a.ask(m.Drain(session))
    assert there(a)


@pytest.mark.parametrize("name", [b"", b"short", bytes(32)])
def test_what_was_not_named_or_wrongly_is_not_kept(worker: tuple[Attacker, int], name: bytes) -> None:
    a, _ = worker
    a.ask(m.Drain(fill(a, name)))
    assert stats(a).kept_bytes == 0 and not there(a, name)


def test_what_is_kept_is_free_for_whatever_needs_it(worker: tuple[Attacker, int]) -> None:
    a, _ = worker
    a.ask(m.Drain(fill(a)))
    session = next(SESSIONS)
    assert a.code(m.AllocBuffer(session, 1, 65 * MIB)) == "out_of_memory" and stats(a).kept_bytes == 0
    a.ask(m.Drain(fill(a)))
    assert a.code(m.AllocBuffer(session, 1, 64 * MIB)) == "ok" and stats(a).kept_bytes == 0
    a.ask(m.Drain(session))
    a.ask(m.Drain(fill(a)))
    n = 64 * MIB // 4 - 64
    square = replace(leaf(0, (n, 1, 1, 1)), op="SQR", src=(0,))
    total = replace(leaf(0, (1, 1, 1, 1)), op="SUM_ROWS", src=(1,))
    a.ask(m.AllocBuffer(session, 1, 4 * n))
    big = encode_graph(Graph((leaf(0, (n, 1, 1, 1), 1), square, total), (), (2,)))
    assert a.code(m.GraphPut(session, graph_digest(big)), big) == "out_of_memory", "scratch needs room as well"
    assert stats(a).kept_bytes == 0
    a.ask(m.Drain(session))
    a.ask(m.Drain(fill(a)))
    assert found(a, m.Release()) and not found(a, m.Release()) and stats(a).kept_bytes == 0


def test_it_stays_for_another_broker_when_the_first_has_gone(worker: tuple[Attacker, int]) -> None:
    a, port = worker
    first = Attacker(port, b"gone")
    fill(first)
    first.close()
    assert stats(a).kept_bytes == 0
    second = Attacker(port, b"next")
    try:
        until(lambda: stats(a).kept_bytes == N_BYTES, 10)
        assert there(second)
    finally:
        second.close()


def test_a_lease_ends() -> None:
    with listening_worker("-m", "64", "--keep", "1") as (port, _):
        a = Attacker(port, b"lessee")
        a.ask(m.Drain(fill(a)))
        start = time.monotonic()
        assert stats(a).kept_bytes == N_BYTES
        until(lambda: stats(a).kept_bytes == 0, 10)
        assert time.monotonic() - start > 0.5 and not there(a)
        a.close()


def test_a_worker_keeps_nothing_unless_it_is_told_to() -> None:
    with listening_worker("-m", "64") as (port, _):
        a = Attacker(port, b"forgetful")
        a.ask(m.Drain(fill(a)))
        assert stats(a).kept_bytes == 0 and not there(a)
        a.close()


def test_sessions_one_after_the_other_hold_no_more_than_one(worker: tuple[Attacker, int]) -> None:
    a, _ = worker
    a.ask(m.Drain(fill(a)))
    before = stats(a)
    for _ in range(200):
        session = next(SESSIONS)
        assert found(a, m.AllocBuffer(session, 1, N_BYTES, content=NAME))
        a.ask(m.Drain(session))
    after = stats(a)
    assert (after.kept_bytes, after.n_sessions) == (N_BYTES, before.n_sessions)
    assert after.rss_bytes - before.rss_bytes < 4 * MIB
    assert there(a)


# -- memory that has a secret ------------------------------------------------------------------------------------------

SECRET = b"known to one who asks"


def remember(a: Attacker) -> int:
    """Write to memory that has a secret. Returns: its session."""
    session = next(SESSIONS)
    assert not found(a, m.AllocBuffer(session, 1, N_BYTES, secret=SECRET))
    a.ask(m.SetTensor(session, 1, 0, len(TENSOR)), TENSOR)
    return session


def recalled(a: Attacker, secret: bytes = SECRET, n_bytes: int = N_BYTES) -> bytes | None:
    """What is found under a secret; None: nothing, and the memory is zeros."""
    session = next(SESSIONS)
    is_found = found(a, m.AllocBuffer(session, 1, n_bytes, secret=secret))
    data = bytes(a.ask(m.GetTensor(session, 1, 0, len(TENSOR))).payload[0])
    a.ask(m.Drain(session))
    assert is_found or data == bytes(len(TENSOR))
    return data if is_found else None


@pytest.mark.parametrize("keep", ["0", "60"])
def test_memory_stays_as_it_was_for_who_knows_its_secret_when_a_broker_has_gone(keep: str) -> None:
    with listening_worker("-m", "64", "--keep", keep) as (port, _):
        first = Attacker(port, b"gone")
        remember(first)
        first.close()
        second = Attacker(port, b"next")
        until(lambda: stats(second).kept_bytes == N_BYTES, 10)
        assert recalled(second, SECRET[:-1] + b"?") is None and recalled(second, n_bytes=N_BYTES + 64) is None
        assert recalled(second, SECRET) == TENSOR
        assert recalled(second, SECRET) is None, "it belonged to one"
        second.close()


def test_memory_of_a_session_that_took_its_leave_is_gone() -> None:
    with listening_worker("-m", "64", "--keep", "60") as (port, _):
        a = Attacker(port, b"a")
        a.ask(m.Drain(remember(a)))
        assert stats(a).kept_bytes == 0 and recalled(a) is None
        session = remember(a)
        a.ask(m.FreeBuffer(session, 1))
        a.close()
        b = Attacker(port, b"b")
        until(lambda: stats(b).n_sessions == 0, 10)
        assert recalled(b) is None
        b.close()


def test_memory_that_was_left_makes_room() -> None:
    with listening_worker("-m", "64") as (port, _):
        first = Attacker(port, b"gone")
        remember(first)
        first.close()
        second = Attacker(port, b"next")
        until(lambda: stats(second).kept_bytes == N_BYTES, 10)
        second.ask(m.AllocBuffer(next(SESSIONS), 1, 64 * MIB))
        assert stats(second).kept_bytes == 0
        second.close()


@pytest.mark.parametrize("h", [m.AllocBuffer(1, 1, 64, secret=b"short"), m.AllocBuffer(1, 1, 64, NAME, SECRET)],
                         ids=["guessed", "with a content"])  # fmt: skip
def test_a_secret_is_long_and_stands_alone(worker: tuple[Attacker, int], h: m.AllocBuffer) -> None:
    assert worker[0].code(h) == "protocol"
