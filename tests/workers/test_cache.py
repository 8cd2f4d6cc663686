"""The weight cache: whatever happens to the disk, never a wrong byte."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from protocol.errors import Cancelled
from tests.support.fixtures import ROOT, content_hash
from workers import cache as caches
from workers import growing
from workers.cache import Cache, ModelFolder, Reader
from workers.ticks import Aside, nothing

DATA = bytes(range(256)) * 100
HASH = content_hash(DATA)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def read(cache: Cache, digest: bytes, n_bytes: int) -> bytes | None:
    return whole(cache.open(digest, n_bytes), n_bytes)


def whole(reader: Reader | None, n_bytes: int) -> bytes | None:
    """What a reader gives in some pieces, if it says that all is good."""
    if reader is None:
        return None
    with reader:
        came = b"".join(bytes(piece) for piece in reader.pieces(n_bytes // 5 + 1, nothing))
    return came if reader.good else None


def put(cache: Cache, digest: bytes, data: bytes) -> bool:
    """Whether an entry of these bytes, which come in two chunks, is on the disk once all has been written."""
    entry = cache.begin(digest, len(data))
    if entry is None:
        return False
    entry.add(data[:1000], nothing)
    entry.add(data[1000:], nothing)
    entry.keep()
    cache.close(20)
    return cache.path(digest).is_file()


def descriptors() -> list[str]:
    """What this process has open of regular files and the like."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    return sorted(n for n in names if n.startswith("/"))


def test_a_model_folder_gives_only_what_has_the_hash(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path / "models")
    folder.folder.mkdir()
    (folder.folder / "a.gguf").write_bytes(b"head" + DATA)
    (tmp_path / "secret").write_bytes(DATA)
    n = len(DATA)
    assert whole(folder.open("a.gguf", 4, n, HASH), n) == DATA
    for name, offset in (("a.gguf", 3), ("a.gguf", 5), ("b.gguf", 0), ("../secret", 0), ("", 0), ("..", 0), ("a\0", 0)):
        assert whole(folder.open(name, offset, n, HASH), n) is None, name
    (folder.folder / "a.gguf").write_bytes(b"head" + DATA[:-1] + b"?")
    assert whole(folder.open("a.gguf", 4, n, HASH), n) is None


def test_bytes_come_back(cache: Cache) -> None:
    assert read(cache, HASH, len(DATA)) is None
    assert put(cache, HASH, DATA)
    assert read(cache, HASH, len(DATA)) == DATA
    assert (cache.hits, cache.misses, cache.repairs) == (1, 1, 0)


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty"])
def test_a_damaged_entry_is_removed_and_never_served(cache: Cache, damage: str) -> None:
    put(cache, HASH, DATA)
    path = cache.path(HASH)
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[1234] ^= 1
    path.write_bytes({"flip": bytes(raw), "cut": bytes(raw[:-1]), "longer": bytes(raw) + b"x", "empty": b""}[damage])
    assert read(cache, HASH, len(DATA)) is None
    assert cache.repairs == 1 and not path.exists()
    assert put(cache, HASH, DATA) and read(cache, HASH, len(DATA)) == DATA


def test_a_symlink_is_not_followed(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(DATA)
    cache.path(HASH).symlink_to(tmp_path / "elsewhere")
    assert read(cache, HASH, len(DATA)) is None
    assert cache.entries() == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
def test_what_is_no_file_is_not_waited_for(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    models = ModelFolder(tmp_path / "models")
    models.folder.mkdir()
    for place in (cache.path(HASH), cache.folder / ".part-abcdefgh", models.folder / "a.gguf"):
        monkeypatch.chdir(place.parent)  # a socket's path must be short
        make_strange(place.name, kind)
    assert read(cache, HASH, len(DATA)) is None and cache.misses == 1
    assert whole(models.open("a.gguf", 0, 1, HASH), 1) is None
    assert cache.entries() == [] and cache.verify() == (0, 0)
    again = Cache(cache.folder)
    assert put(again, HASH, DATA) is (kind != "folder")  # a folder in an entry's place is nobody's to remove
    assert read(again, HASH, len(DATA)) == (None if kind == "folder" else DATA)
    again.evict()
    assert again.clear() == int(kind != "folder")


def make_strange(name: str, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(name)
    elif kind == "folder":
        os.mkdir(name)
    elif kind == "device":
        os.symlink("/dev/zero", name)
    else:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(name)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_folder_that_cannot_be_written_means_no_cache_and_one_line(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], call: str
) -> None:
    real = getattr(os, call)

    def full(*args: object, **more: object) -> object:
        ours = threading.current_thread().name == "ggmq-cache-write"
        if ours and not (call == "open" and "locked" not in str(args[0])):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **more)

    monkeypatch.setattr(os, call, full)
    for data in (DATA, DATA[1:], DATA):
        assert put(cache, content_hash(data), data) is False
    assert read(cache, HASH, len(DATA)) is None
    monkeypatch.undo()
    assert list(cache.folder.iterdir()) == []
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and f"cache {cache.folder}: No space left on device" in told and "--cache-dir" in told
    assert put(cache, HASH, DATA) and read(cache, HASH, len(DATA)) == DATA  # there is room again


def test_a_folder_that_cannot_be_made_means_no_cache(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = Cache(tmp_path / "file")
    assert read(cache, HASH, len(DATA)) is None and not put(cache, HASH, DATA) and not put(cache, HASH, DATA)
    told = capfd.readouterr().err
    assert 1 <= told.count("\n") <= 2 and str(tmp_path / "file") in told


def test_a_slow_disk_is_waited_for_while_the_worker_answers(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (time.sleep(0.3), real(fd)))
    ticked: list[int] = []
    entry = cache.begin(HASH, len(DATA))
    assert entry is not None
    entry.add(DATA, lambda: ticked.append(1))
    entry.keep()
    assert not ticked and not cache.path(HASH).exists()  # nobody waits for the disk
    reader = cache.open(HASH, len(DATA), lambda: ticked.append(1))  # who wants the entry does, and answers
    assert len(ticked) >= 3
    assert whole(reader, len(DATA)) == DATA and (cache.hits, cache.misses) == (1, 0)


def test_what_waits_to_be_written_is_bounded(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "QUEUE_BYTES", 3 * len(DATA))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (time.sleep(0.05), real(fd, data))[1])
    ticked, most = [], 0
    entry = cache.begin(content_hash(DATA * 12), 12 * len(DATA))
    assert entry is not None
    for _ in range(12):
        entry.add(DATA, lambda: ticked.append(1))
        most = max(most, cache._queued_bytes)
    entry.keep()
    assert ticked and most <= 3 * len(DATA)
    assert read(cache, content_hash(DATA * 12), 12 * len(DATA)) == DATA * 12  # however slow the disk, it is all there


def test_a_disk_that_stands_still_is_done_without(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(caches, "QUEUE_BYTES", 0)
    cache._writing = Aside("ggmq-cache-write", stall_s=0.1)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (time.sleep(1.5), real(fd, data))[1])
    entry = cache.begin(HASH, len(DATA))
    assert entry is not None
    entry.add(DATA, nothing)
    assert "timed out" in capfd.readouterr().err
    entry.keep()
    assert cache.begin(HASH, len(DATA)) is None and read(cache, HASH, len(DATA)) is None
    cache.close(10)
    monkeypatch.undo()
    assert list(cache.folder.iterdir()) == []
    assert put(cache, HASH, DATA)  # it goes on


def test_two_writers_of_one_entry(cache: Cache, tmp_path: Path) -> None:
    other = Cache(cache.folder)
    entries = [c.begin(HASH, len(DATA)) for c in (cache, cache, other)]
    for half in (DATA[:5000], DATA[5000:]):
        for entry in entries:
            assert entry is not None
            entry.add(half, nothing)
    for entry in entries:
        assert entry is not None
        entry.keep()
    assert read(cache, HASH, len(DATA)) == read(other, HASH, len(DATA)) == DATA
    assert [p.name for p in cache.folder.iterdir()] == [HASH.hex()]


def test_what_is_not_kept_leaves_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    dropped, under_way, late = (cache.begin(bytes([i]) * 32, len(DATA)) for i in range(3))
    assert dropped is not None and under_way is not None and late is not None
    for entry in (dropped, under_way, late):
        entry.add(DATA, nothing)
    dropped.drop()
    monkeypatch.setattr(os, "fsync", lambda fd: time.sleep(1))
    late.keep()
    cache.close(0.2)
    assert list(cache.folder.iterdir()) == []
    time.sleep(1.2)
    assert list(cache.folder.iterdir()) == []
    under_way.drop()
    cache.close()
    cache._writing.wait(cache.later(nothing), nothing)
    assert descriptors() == before


def test_one_who_stops_reading_says_nothing_about_the_entry(cache: Cache) -> None:
    put(cache, HASH, DATA)
    before = descriptors()

    def cancel() -> None:
        raise Cancelled("no longer wanted")

    with pytest.raises(Cancelled):
        reader = cache.open(HASH, len(DATA))
        assert reader is not None
        with reader:
            for _ in reader.pieces(1000, nothing):
                cancel()
    assert not reader.good and (cache.hits, cache.repairs) == (0, 0)
    assert read(cache, HASH, len(DATA)) == DATA and descriptors() == before


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    folder, n = ModelFolder(tmp_path), 8 << 20
    (tmp_path / "m.gguf").write_bytes(bytes(n))
    reader = folder.open("m.gguf", 0, n, content_hash(bytes(n)))
    assert reader is not None
    with reader:
        for _ in reader.pieces(1 << 20, nothing):
            os.truncate(tmp_path / "m.gguf", 1 << 20)
    assert not reader.good


def test_leftovers_go_when_their_writers_have_gone(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from workers.cache import Cache\n"
        "e = Cache(Path(sys.argv[1])).begin(b'x' * 32, 9); e.add(b'half', lambda: None); time.sleep(60)\n"
    )
    p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    due = time.monotonic() + 20
    while not list(tmp_path.glob(".part-*")) and time.monotonic() < due:
        time.sleep(0.01)
    young, old = tmp_path / ".part-youngone", tmp_path / ".part-olderone"
    for path in (young, old):
        path.write_bytes(b"of a writer without a lock")
    os.utime(old, (time.time() - 2 * growing.ABANDONED_S,) * 2)
    (theirs,) = tmp_path.glob(growing.GROWING + "*")
    Cache(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([theirs, young])
    assert Cache(tmp_path).clear() == 0 and list(tmp_path.iterdir()) == [theirs]
    p.kill()
    p.wait()
    Cache(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_quota_removes_the_least_recently_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path, quota_bytes=250)
    parts = [bytes([i]) * 100 for i in range(3)]
    for i, part in enumerate(parts):
        put(cache, content_hash(part), part)
        os.utime(cache.path(content_hash(part)), (i, i)) if cache.path(content_hash(part)).exists() else None
    assert read(cache, content_hash(parts[0]), 100) is None
    assert read(cache, content_hash(parts[2]), 100) == parts[2]
    assert not put(cache, content_hash(b"x" * 300), b"x" * 300)


def test_kill_in_mid_write_leaves_whole_entries_only(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.support.fixtures import content_hash\n"
        "from workers.cache import Cache\n"
        "c = Cache(Path(sys.argv[1])); i = 0\n"
        "while True:\n"
        "    d = i.to_bytes(4, 'big') * 200000; e = c.begin(content_hash(d), len(d)); i += 1\n"
        "    e.add(d, lambda: None); e.keep()\n"
    )
    p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    due = time.monotonic() + 20
    while len(Cache(tmp_path).entries()) < 3 and time.monotonic() < due:
        time.sleep(0.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    cache = Cache(tmp_path)
    good, bad = cache.verify()
    assert good >= 3 and bad == 0
    assert cache.clear() == good and list(tmp_path.iterdir()) == []
