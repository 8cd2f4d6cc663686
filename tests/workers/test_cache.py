"""The weight cache: whatever happens to the disk, never a wrong byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.fixtures import ROOT
from workers.cache import Cache, ModelFolder, Reader, content_hash

DATA = bytes(range(256)) * 100
HASH = content_hash(DATA)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def read(cache: Cache, digest: bytes, n_bytes: int) -> bytes | None:
    return whole(cache.open(digest, n_bytes), n_bytes)


def whole(reader: Reader | None, n_bytes: int) -> bytes | None:
    """What a reader gives in two pieces, if it says that all is good."""
    if reader is None:
        return None
    target = bytearray(n_bytes)
    view, half = memoryview(target), n_bytes // 2
    came = reader.read(view[:half]) and reader.read(view[half:])
    return bytes(target) if reader.close() and came else None


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
    assert cache.put(HASH, DATA)
    assert read(cache, HASH, len(DATA)) == DATA
    assert (cache.hits, cache.misses, cache.repairs) == (1, 1, 0)


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty"])
def test_a_damaged_entry_is_removed_and_never_served(cache: Cache, damage: str) -> None:
    cache.put(HASH, DATA)
    path = cache.path(HASH)
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[1234] ^= 1
    path.write_bytes({"flip": bytes(raw), "cut": bytes(raw[:-1]), "longer": bytes(raw) + b"x", "empty": b""}[damage])
    assert read(cache, HASH, len(DATA)) is None
    assert cache.repairs == 1 and not path.exists()
    assert cache.put(HASH, DATA) and read(cache, HASH, len(DATA)) == DATA


def test_a_symlink_is_not_followed(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(DATA)
    cache.path(HASH).symlink_to(tmp_path / "elsewhere")
    assert read(cache, HASH, len(DATA)) is None
    assert cache.entries() == []


def test_a_folder_that_cannot_be_written_means_no_cache(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cache.put(HASH, DATA) is False
    assert read(cache, HASH, len(DATA)) is None
    assert list(cache.folder.iterdir()) == []


def test_the_quota_removes_the_least_recently_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path, quota_bytes=250)
    parts = [bytes([i]) * 100 for i in range(3)]
    for i, part in enumerate(parts):
        cache.put(content_hash(part), part)
        os.utime(cache.path(content_hash(part)), (i, i)) if cache.path(content_hash(part)).exists() else None
    assert read(cache, content_hash(parts[0]), 100) is None
    assert read(cache, content_hash(parts[2]), 100) == parts[2]
    assert not cache.put(content_hash(b"x" * 300), b"x" * 300)


def test_kill_in_mid_write_leaves_whole_entries_only(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from workers.cache import Cache, content_hash\n"
        "c = Cache(Path(sys.argv[1])); i = 0\n"
        "while True:\n"
        "    d = i.to_bytes(4, 'big') * 200000; c.put(content_hash(d), d); i += 1\n"
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
