"""The cluster key: private from its first byte, and a real wall on a real socket."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker.loop import BrokerLoop
from config.auth import find_keys, new_keys
from config.keys import KeyPair, read_keys, write_keys
from ggmq.cluster import Client
from protocol.errors import ConfigError, DeadlineExceeded


def test_a_key_comes_back_and_is_never_overwritten(tmp_path: Path) -> None:
    path, keys = tmp_path / "k" / "cluster.key", new_keys()
    old = os.umask(0)
    try:
        write_keys(path, keys)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_keys(path) == keys
    with pytest.raises(ConfigError, match="never overwritten"):
        write_keys(path, new_keys())


@pytest.mark.parametrize("text", ["", "public x\nsecret y\n", "hello", "public " + "a" * 40 + "\n", "\xff"])
def test_files_that_hold_no_key_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cluster.key"
    path.write_text(text, encoding="latin-1")
    path.chmod(0o600)
    with pytest.raises(ConfigError):
        read_keys(path)


@pytest.mark.parametrize(("public", "secret", "words"), [
    ("a" * 39 + "~", None, r"public: expected 40 characters of Z85, got '~' among them"),
    (None, "a" * 20 + "\x1b" + "a" * 19, r"secret: expected 40 characters of Z85, got '\\x1b' among them"),
    ("#####" * 8, None, "public: expected Z85, got five characters that stand for more than 32 bits"),
    (None, "other", "expected the public key that belongs to the secret one"),
])  # fmt: skip
def test_keys_that_are_no_pair_are_refused(tmp_path: Path, public: str | None, secret: str | None, words: str) -> None:
    path, good, other = tmp_path / "cluster.key", new_keys(), new_keys()
    wrong = other.secret.decode() if secret == "other" else secret
    path.write_text(f"public {public or good.public.decode()}\nsecret {wrong or good.secret.decode()}\n")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=f"^{path}: {words}"):
        find_keys(path, False)
    assert find_keys(path, True) is None


def test_places_where_no_key_can_be_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "cluster.key", Path("a\0b"), tmp_path):
        with pytest.raises(ConfigError, match=r"cluster key|never overwritten"):
            write_keys(path, new_keys())
        with pytest.raises(ConfigError, match="cannot read the cluster key"):
            read_keys(path)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    write_keys(path, new_keys())
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(path)


def test_only_the_cluster_key_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggmq.cluster.CONNECT_S", 1.5)
    context: zmq.Context[Any] = zmq.Context()
    keys = new_keys()
    loop = BrokerLoop("t", context, keys)
    endpoint = loop.listen("tcp://127.0.0.1:*")
    loop.serve_in_thread()
    try:
        good = Client(context, endpoint, keys)
        assert good.devices() == []
        good.close()
        stranger = new_keys()
        for wrong in (None, stranger, KeyPair(keys.public, stranger.secret)):
            try:
                with pytest.raises(DeadlineExceeded):
                    Client(context, endpoint, wrong)
            except (zmq.ZMQError, ValueError):
                pass  # libzmq itself may refuse a pair that does not belong together
        assert not loop.state.clients or len(loop.state.clients) == 1
    finally:
        loop.stop()
        context.destroy(linger=0)
