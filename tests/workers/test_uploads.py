"""Uploads that break off: what came is not sent again, what did not come is never seen, and never a wrong byte."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.errors import GgmqError
from protocol.limits import MAX_CHUNK_BYTES
from tests.support.attacker import SESSION, Attacker, listening_worker
from tests.support.fixtures import content_hash, free_port
from tests.support.one_worker import OneWorker
from tests.support.processes import WORKER, started
from workers import growing
from workers.cache import Cache
from workers.growing import left_behind
from workers.ticks import PIECE_BYTES, nothing

MIB = 1 << 20
DATA = random.Random(1).randbytes(5 * MIB + 1024)
HASH = content_hash(DATA)
N = len(DATA)
NE = (N // 4, 1, 1, 1)
BUFFER = 1


class Worker(OneWorker):
    """With one upload."""

    def alloc(self) -> None:
        self.ask(m.AllocBuffer(SESSION, BUFFER, N, bytes(32)))

    def chunk(self, at: int, n: int = MIB, data: bytes = DATA) -> None:
        h = m.SetTensor(SESSION, BUFFER, 0, N, at, GGMLType.F32, NE, HASH)
        self.ask(h, data[at : at + n])

    def query(self) -> tuple[bool, int]:
        h = self.ask(m.SetTensorHash(SESSION, BUFFER, 0, N, HASH, GGMLType.F32, NE)).header
        assert isinstance(h, m.Found)
        return h.found, h.at

    def bytes(self, n: int = N) -> bytes:
        return b"".join(bytes(p) for p in self.ask(m.GetTensor(SESSION, BUFFER, 0, n)).payload)

    def finish(self) -> int:
        """Send what is missing, as a client does. Returns: how much that was."""
        found, at = self.query()
        sent = 0
        while not found and at < N:
            self.chunk(at)
            sent += min(MIB, N - at)
            at += MIB
        assert self.bytes() == DATA
        return sent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def broken_off(folder: Path, n_chunks: int = 3, data: bytes = DATA) -> Path:
    """What an upload that broke off has left, when its session ended."""
    worker = Worker(folder)
    worker.alloc()
    for i in range(n_chunks):
        worker.chunk(i * MIB, data=data)
    worker.ask(m.Drain(SESSION))
    worker.flush()
    return left_behind(folder, HASH, N)


# -- while the process lives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_under_a_new_epoch_an_upload_goes_on_where_it_was(folder: Path, cached: bool) -> None:
    worker = Worker(folder if cached else None)
    worker.alloc()
    assert worker.query() == (False, 0)
    for at in range(0, 3 * MIB, MIB):
        worker.chunk(at)
    worker.greet(2)
    assert worker.query() == (False, 3 * MIB)
    assert worker.finish() == N - 3 * MIB
    assert worker.query() == (True, 0), "it was verified in this place"
    worker.flush()
    assert worker.cache is None or [p.name for p in folder.iterdir()] == [HASH.hex()]


def test_chunks_of_any_size_go_on_too() -> None:
    worker = Worker()
    worker.alloc()
    worker.chunk(0, 12345)
    assert worker.query() == (False, 12345)
    assert worker.finish() == N - 12345


def test_what_came_is_of_no_use_when_something_else_came_there(folder: Path) -> None:
    worker = Worker(folder)
    worker.alloc()
    worker.chunk(0)
    worker.chunk(MIB)
    worker.ask(m.SetTensor(SESSION, BUFFER, 10, 4), b"else")
    with pytest.raises(GgmqError, match="overwritten"):
        worker.chunk(2 * MIB)
    found, at = worker.query()
    assert not found and at == 2 * MIB, "the cache has it as it came"
    assert worker.finish() == N - 2 * MIB


def test_another_session_gets_what_was_verified_only(folder: Path) -> None:
    worker = Worker(folder)
    worker.alloc()
    worker.chunk(0)
    worker.ask(m.AllocBuffer(SESSION + 1, BUFFER, N))
    h = m.SetTensorHash(SESSION + 1, BUFFER, 0, N, HASH, GGMLType.F32, NE)
    assert worker.ask(h).header == m.Found(False), "the first one still writes it"
    assert bytes(worker.ask(m.GetTensor(SESSION + 1, BUFFER, 0, N)).payload[0]) == bytes(N)


# -- after a restart ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["drained", "killed"])
def test_a_worker_that_was_started_again_has_all_but_the_last_piece(folder: Path, ends: str) -> None:
    worker = Worker(folder)
    worker.alloc()
    for at in range(0, 3 * MIB, MIB // 2):
        worker.chunk(at, MIB // 2)
    worker.chunk(3 * MIB, 1000)
    worker.flush()
    if ends == "drained":
        worker.ask(m.Drain(SESSION))
        worker.flush()
    worker.close()
    again = Worker(folder)
    again.alloc()
    assert again.query() == (False, 3 * MIB)
    assert again.bytes(3 * MIB) == DATA[: 3 * MIB]
    assert again.finish() == N - 3 * MIB
    again.flush()
    assert [(p.name, p.stat().st_size) for p in folder.iterdir()] == [(HASH.hex(), N)]
    assert Cache(folder).verify() == (1, 0)


def test_a_whole_weight_is_never_left_without_its_last_chunk(folder: Path) -> None:
    """Whoever takes it over sends at least one, so that the hash is looked at."""
    worker, data = Worker(folder), DATA[: 2 * MIB]
    worker.ask(m.AllocBuffer(SESSION, BUFFER, N))
    ne, digest = (MIB // 2, 1, 1, 1), content_hash(data)
    for at in (0, MIB):
        assert worker.cache is not None
        entry = worker.cache.resume(digest, 2 * MIB) if at else worker.cache.begin(digest, 2 * MIB)
        assert entry is not None
        if at:
            assert len(list(entry.left(nothing))) == 1
        else:
            entry.add(data[:MIB], nothing, content_hash(data[:MIB]))
            entry.add(data[MIB:], nothing, digest)
        entry.leave()
        worker.flush()
    h = worker.ask(m.SetTensorHash(SESSION, BUFFER, 0, 2 * MIB, digest, GGMLType.F32, ne)).header
    assert h == m.Found(False, MIB)


@pytest.mark.parametrize(("damage", "left"), [
    ("flip in 0", 0), ("flip in 1", MIB), ("flip in 2", 2 * MIB), ("flip in notes", MIB), ("cut", 2 * MIB), ("empty", 0),
    ("longer", 3 * MIB), ("no notes", 0), ("zeros", 0),
])  # fmt: skip
def test_a_damaged_rest_counts_as_far_as_it_is_good(folder: Path, damage: str, left: int) -> None:
    path = broken_off(folder)
    raw = bytearray(path.read_bytes())
    assert len(raw) == N + 3 * 32
    if damage.startswith("flip"):
        raw[N + 40 if damage.endswith("notes") else int(damage[-1]) * MIB + 5] ^= 1
    path.write_bytes({"cut": bytes(raw[:-1]), "empty": b"", "longer": bytes(raw) + b"x" * 99, "no notes": bytes(raw[:N]),
                      "zeros": bytes(len(raw))}.get(damage, bytes(raw)))  # fmt: skip
    worker = Worker(folder)
    worker.alloc()
    assert worker.query() == (False, left)
    assert worker.finish() == N - left
    worker.flush()
    assert Cache(folder).verify() == (1, 0)


def test_a_rest_of_other_bytes_is_thrown_away_when_the_hash_shows_it(folder: Path) -> None:
    """Somebody said that it has this hash, and broke off."""
    path = broken_off(folder, data=bytes(N))
    worker = Worker(folder)
    worker.alloc()
    assert worker.query() == (False, 3 * MIB)
    worker.chunk(3 * MIB)
    worker.chunk(4 * MIB)
    with pytest.raises(GgmqError, match="do not have the hash"):
        worker.chunk(5 * MIB)
    worker.flush()
    assert not path.exists() and list(folder.iterdir()) == []
    assert worker.query() == (False, 0)
    assert worker.finish() == N


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "fifo", "folder"])
def test_what_is_no_file_of_ours_is_neither_read_nor_written(folder: Path, tmp_path: Path, kind: str) -> None:
    path = broken_off(folder)
    victim = tmp_path / "victim"
    victim.write_bytes(path.read_bytes())
    path.unlink()
    {"symlink": path.symlink_to, "hardlink": path.hardlink_to, "fifo": lambda _: os.mkfifo(path),
     "folder": lambda _: path.mkdir()}[kind](victim)  # fmt: skip
    before = victim.read_bytes()
    worker = Worker(folder)
    worker.alloc()
    assert worker.query() == (False, 0)
    assert worker.finish() == N
    worker.flush()
    assert victim.read_bytes() == before and Cache(folder).verify() == (1, 0)


def test_two_writers_of_one_large_weight(folder: Path) -> None:
    a, b = Worker(folder), Worker(folder)
    for worker in (a, b):
        worker.alloc()
        worker.chunk(0)
        worker.flush()
    names = sorted(p.name for p in folder.iterdir())
    assert len(names) == 2 and left_behind(folder, HASH, N).name in names, "the second has a file of its own"
    for worker in (a, b):
        for at in range(MIB, N, MIB):
            worker.chunk(at)
        worker.flush()
        assert [p.name for p in folder.iterdir() if not p.name.startswith(growing.PART)] == [HASH.hex()]
    assert [p.name for p in folder.iterdir()] == [HASH.hex()] and Cache(folder).verify() == (1, 0)


def test_one_who_comes_while_it_becomes_an_entry_does_not_write_into_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He opened the file before it was renamed, and has the lock after."""
    worker = Worker(folder)
    worker.alloc()
    for at in range(0, 5 * MIB, MIB):
        worker.chunk(at)
    worker.flush()
    real = growing._unlocked

    def late(fd: int, otherwise: bool) -> bool:
        if threading.current_thread() is threading.main_thread():
            worker.chunk(5 * MIB)
            worker.flush()
            assert (folder / HASH.hex()).exists()
        return real(fd, otherwise)

    monkeypatch.setattr(growing, "_unlocked", late)
    assert growing._own(str(left_behind(folder, HASH, N)), create=False) is None


def test_a_full_disk_leaves_nothing_and_the_upload_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = Worker(folder)
    worker.alloc()
    worker.chunk(0)
    worker.flush()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    worker.chunk(MIB)
    worker.flush()
    assert list(folder.iterdir()) == []
    worker.greet(2)
    assert worker.finish() == N - 2 * MIB
    assert "No space left" in capfd.readouterr().err


def test_what_uploads_left_is_within_the_quota_and_goes_with_time(folder: Path) -> None:
    path = broken_off(folder)
    os.utime(path, (1, 1))
    entry = folder / content_hash(b"x" * MIB).hex()
    entry.write_bytes(b"x" * MIB)
    cache = Cache(folder, 4 * MIB + 4096 * 8)
    assert not path.exists(), "it was old"
    path = broken_off(folder)
    os.utime(entry, (time.time() - 10,) * 2)
    cache.evict()
    assert path.exists() and entry.exists()
    Cache(folder, 3 * MIB + 4096 * 8).evict()
    assert path.exists() and not entry.exists(), "the oldest goes first"
    writer = Worker(folder)
    writer.alloc()
    assert writer.query() == (False, 3 * MIB)
    Cache(folder, MIB).evict()
    assert path.exists(), "somebody goes on with it"
    assert Cache(folder).clear() == 0 and path.exists()
    writer.ask(m.Drain(SESSION))
    writer.flush()
    Cache(folder, MIB).evict()
    assert not path.exists()


# -- whatever is sent --------------------------------------------------------------------------------------------------

SMALL = random.Random(2).randbytes(4 * 24)
steps = st.one_of(
    st.tuples(st.just("next"), st.integers(1, 40)), st.tuples(st.just("chunk"), st.integers(0, 95)),
    st.tuples(st.just("wrong"), st.integers(1, 40)), st.tuples(st.just("write"), st.integers(0, 92)),
    st.tuples(st.just("query"), st.just(0)), st.tuples(st.just("epoch"), st.just(0)), st.tuples(st.just("free"), st.just(0)),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(steps, max_size=30))
def test_whatever_comes_in_whatever_order_a_weight_counts_only_when_it_is_right(steps: Sequence[tuple[str, int]]) -> None:
    """Truncated, reordered, doubled, wrong and abandoned chunks, restarts of the connection, writes in between."""
    worker, digest, ne = Worker(), content_hash(SMALL), (24, 1, 1, 1)
    n = len(SMALL)
    worker.ask(m.AllocBuffer(SESSION, BUFFER, n, bytes(32)))
    at = 0
    for kind, value in steps:
        try:
            if kind in ("next", "wrong", "chunk"):
                start = value if kind == "chunk" else at
                data = SMALL[start : start + (value if kind != "chunk" else 7)]
                data = bytes(len(data)) if kind == "wrong" else data
                worker.ask(m.SetTensor(SESSION, BUFFER, 0, n, start, GGMLType.F32, ne, digest), data)
                at = start + len(data)
            elif kind == "write":
                worker.ask(m.SetTensor(SESSION, BUFFER, value, 4), b"else")
            elif kind == "query":
                h = worker.ask(m.SetTensorHash(SESSION, BUFFER, 0, n, digest, GGMLType.F32, ne)).header
                assert isinstance(h, m.Found)
                at = h.at
                if h.found:
                    assert worker.bytes(n) == SMALL
            elif kind == "epoch":
                worker.greet(worker.epoch + 1)
            else:
                worker.ask(m.FreeBuffer(SESSION, BUFFER))
                worker.ask(m.AllocBuffer(SESSION, BUFFER, n, bytes(32)))
                at = 0
        except GgmqError:
            pass
        part = worker.executor._holder(m.Weight(digest, n))
        if part is not None:
            assert worker.bytes(n) == SMALL, "it passes for the weight, and is not"


# -- a real worker -----------------------------------------------------------------------------------------------------


@pytest.fixture
def restarted(folder: Path) -> Iterator[Any]:
    """Starts a worker on the same port and folder, as often as it is called."""
    port, stack = free_port(), []

    def start() -> tuple[Attacker, Any]:
        block = started([*WORKER, "-d", "reference", "-t", "1", "-p", str(port), "--insecure", "--cache-dir", str(folder)])
        stack.append(block)
        p = block.__enter__()
        a = Attacker(port, b"broker")
        stack.append(a)
        return a, p

    yield start
    for block in reversed(stack):
        block.close() if isinstance(block, Attacker) else block.__exit__(None, None, None)


def test_kill_in_mid_upload_costs_no_more_than_one_chunk(restarted: Any) -> None:
    a, p = restarted()
    a.ask(m.AllocBuffer(SESSION, BUFFER, N))
    acked = 0
    for at in range(0, 4 * MIB, MAX_CHUNK_BYTES):
        h = m.SetTensor(SESSION, BUFFER, 0, N, at, GGMLType.F32, NE, HASH)
        assert a.code(h, DATA[at : at + MAX_CHUNK_BYTES]) == "ok"
        acked = at + MAX_CHUNK_BYTES
    time.sleep(0.2)
    p.send_signal(signal.SIGKILL)
    p.wait()
    a, _ = restarted()
    a.ask(m.AllocBuffer(SESSION, BUFFER, N))
    found = a.ask(m.SetTensorHash(SESSION, BUFFER, 0, N, HASH, GGMLType.F32, NE)).header
    assert isinstance(found, m.Found) and not found.found and acked - found.at <= MAX_CHUNK_BYTES
    for at in range(found.at, N, MAX_CHUNK_BYTES):
        h = m.SetTensor(SESSION, BUFFER, 0, N, at, GGMLType.F32, NE, HASH)
        assert a.code(h, DATA[at : at + MAX_CHUNK_BYTES]) == "ok"
    assert bytes(a.ask(m.GetTensor(SESSION, BUFFER, 0, N)).payload[0]) == DATA


def test_a_broken_connection_costs_nothing_that_was_acknowledged() -> None:
    with listening_worker() as (port, _):
        first = Attacker(port, b"broker", epoch=5)
        first.ask(m.AllocBuffer(SESSION, BUFFER, N))
        for at in range(0, 3 * MIB, MIB):
            first.ask(m.SetTensor(SESSION, BUFFER, 0, N, at, GGMLType.F32, NE, HASH), DATA[at : at + MIB])
        first.close()
        second = Attacker(port, b"broker", epoch=6, session=1)
        found = second.ask(m.SetTensorHash(SESSION, BUFFER, 0, N, HASH, GGMLType.F32, NE)).header
        assert found == m.Found(False, 3 * MIB)
        for at in range(3 * MIB, N, MIB):
            h = m.SetTensor(SESSION, BUFFER, 0, N, at, GGMLType.F32, NE, HASH)
            assert second.code(h, DATA[at : at + MIB]) == "ok"
        assert bytes(second.ask(m.GetTensor(SESSION, BUFFER, 0, N)).payload[0]) == DATA
        second.close()


def test_chunks_that_were_under_way_count_under_the_next_epoch_until_its_bulk_channel_is_there() -> None:
    def chunk(at: int) -> tuple[m.SetTensor, bytes]:
        return m.SetTensor(SESSION, BUFFER, 0, N, at, GGMLType.F32, NE, HASH), DATA[at : at + MIB]

    with listening_worker() as (port, _):
        control = Attacker(port, b"broker", epoch=5)
        bulk = Attacker(port, b"broker", epoch=5, role="broker-bulk")
        control.ask(m.AllocBuffer(SESSION, BUFFER, N))
        first = bulk.send(*chunk(0))
        bulk.wait(first)
        for epoch in (6, 7):  # the worker was silent twice
            control.begin(epoch, session=1)
            assert bulk.ask(*chunk((epoch - 5) * MIB)).epoch == 5
        bulk.send(m.SetTensor(SESSION, BUFFER, 0, 4), b"else")
        bulk.send(*chunk(0), seq=first)
        bulk.begin(7)
        bulk.send(*chunk(3 * MIB), epoch=5)
        query = m.SetTensorHash(SESSION, BUFFER, 0, N, HASH, GGMLType.F32, NE)
        assert control.ask(query).header == m.Found(False, 3 * MIB)
        for at in range(3 * MIB, N, MIB):
            assert bulk.code(*chunk(at)) == "ok"
        assert bytes(control.ask(m.GetTensor(SESSION, BUFFER, 0, N)).payload[0]) == DATA
        stats = control.ask(m.StatsQuery()).header
        assert isinstance(stats, m.Stats) and stats.n_fenced == 3
        control.close()
        bulk.close()


@pytest.mark.parametrize("goes_on", [True, False])
def test_chunks_that_were_under_way_count_over_a_new_connection_too_if_their_session_goes_on(goes_on: bool) -> None:
    h = m.SetTensor(SESSION, BUFFER, 0, N, 0, GGMLType.F32, NE, HASH)
    with listening_worker() as (port, _):
        first = [Attacker(port, b"broker", 5, role) for role in ("broker", "broker-bulk")]
        first[0].ask(m.AllocBuffer(SESSION, BUFFER, N))
        second = Attacker(port, b"broker", 6, session=int(goes_on))
        assert first[1].code(h, DATA[:MIB]) == ("ok" if goes_on else "protocol")
        third = Attacker(port, b"broker", 6, "broker-bulk")
        late = m.SetTensor(SESSION, BUFFER, 0, N, MIB, GGMLType.F32, NE, HASH)
        assert first[1].code(late, DATA[MIB : 2 * MIB]) == "protocol"
        found = second.ask(m.SetTensorHash(SESSION, BUFFER, 0, N, HASH, GGMLType.F32, NE)).header
        assert found == m.Found(False, MIB) if goes_on else isinstance(found, m.Error)
        for a in (*first, second, third):
            a.close()


assert PIECE_BYTES == MIB  # what a piece is when it breaks off
