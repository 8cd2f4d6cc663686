"""The cluster key: private from its first byte, and a real wall on a real socket."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker.loop import BrokerLoop
from config.auth import new_keys
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
