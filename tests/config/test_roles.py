"""Keys of their own: who may be what on the bus, who is kept out, what a removed key loses. Real sockets and processes."""

from __future__ import annotations

import contextlib
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

import config.listening
from broker.loop import BrokerLoop
from config.allowed import Allowed, Entry, add_key, list_beside, read_list, remove_key
from config.auth import new_keys
from config.handing import new_pair
from config.keys import KeyPair, read_keys, write_keys
from config.roles import Role
from config.zap import Authenticator
from ggmq.cluster import Client, connect
from protocol import PROTOCOL_VERSION
from protocol import messages as m
from protocol.errors import ConfigError, DeadlineExceeded, GgmqError
from protocol.frames import Message, decode, encode
from tests.support.fixtures import free_port
from tests.support.processes import WORKER, started, until
from tests.test_cli import ggmq
from workers.devices import open_device
from workers.front import Front
from workers.loop import WorkerLoop

QUIET_S = 0.6
"""For so long a stranger tries; whoever is let in is answered in some milliseconds."""


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    path = tmp_path / "keys" / "cluster.key"
    write_keys(path, new_keys())
    return read_keys(path)


def own(keys: KeyPair, role: Role, name: str) -> KeyPair:
    """A key of its own, in a file beside the cluster's."""
    path = Path(keys.path).with_name(f"{name}.key")
    write_keys(path, new_pair(keys, role, name))
    return read_keys(path)


def remove(keys: KeyPair, name: str) -> None:
    remove_key(list_beside(Path(keys.path)), name)


class Peer:
    """A raw DEALER that may say what it likes."""

    def __init__(self, endpoint: str, secure: Callable[[zmq.Socket[Any]], None], identity: bytes = b"") -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        if identity:
            self.socket.identity = identity
        secure(self.socket)
        self.socket.connect(endpoint)
        self.seq = 0

    def send(self, header: m.Header, epoch: int = 0) -> None:
        self.seq += 1
        self.socket.send_multipart(encode(Message(m.COMMAND_OF[type(header)], header, epoch=epoch, seq=self.seq)))

    def hello(self, role: str, token: bytes = b"t" * 16, epoch: int = 0) -> m.Header | None:
        return self.ask(m.Hello(PROTOCOL_VERSION, role, token, epoch), epoch)

    def ask(self, header: m.Header, epoch: int = 0, within_s: float = 5.0) -> m.Header | None:
        self.send(header, epoch)
        due = time.monotonic() + within_s
        while (left_s := due - time.monotonic()) > 0 and self.socket.poll(int(1000 * left_s)):
            message = decode(self.socket.recv_multipart())
            if message.seq == self.seq and message.reply:
                return message.header
        return None

    def close(self) -> None:
        self.socket.close()
        self.context.destroy(linger=0)


def curve(pair: KeyPair, server: bytes = b"") -> Callable[[zmq.Socket[Any]], None]:
    def secure(s: zmq.Socket[Any]) -> None:
        s.curve_publickey, s.curve_secretkey = pair.public, pair.secret
        s.curve_serverkey = server or pair.server

    return secure


def plain(s: zmq.Socket[Any]) -> None:
    s.plain_username, s.plain_password = b"admin", b"admin"


@contextlib.contextmanager
def peer(endpoint: str, secure: Callable[[zmq.Socket[Any]], None], identity: bytes = b"") -> Iterator[Peer]:
    p = Peer(endpoint, secure, identity)
    try:
        yield p
    finally:
        p.close()


@contextlib.contextmanager
def broker(keys: KeyPair | None) -> Iterator[tuple[BrokerLoop, str]]:
    context: zmq.Context[Any] = zmq.Context()
    loop = BrokerLoop("t", context, keys)
    try:
        endpoint = loop.listen("tcp://127.0.0.1:*")
        loop.serve_in_thread()
        yield loop, endpoint
    finally:
        loop.stop()
        context.destroy(linger=0)


@contextlib.contextmanager
def worker(keys: KeyPair | None) -> Iterator[tuple[WorkerLoop, str]]:
    loop = WorkerLoop(open_device("reference", 1), None, "t", keys, quiet=True)
    try:
        endpoint = loop.listen("tcp://127.0.0.1:*")
    except ConfigError:
        loop.stop()
        loop.run()
        raise
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield loop, endpoint
    finally:
        loop.stop()
        thread.join(10)


def dialling(endpoint: str, pair: KeyPair, name: str) -> contextlib.AbstractContextManager[Any]:
    return started([*WORKER, "-d", "reference", "-t", "1", "--quiet", "--broker", endpoint, "--keys", pair.path,
                    "--name", name])  # fmt: skip


def ready(client: Client) -> list[str]:
    return [d.worker for d in client.devices() if d.state == "ready"]


# -- the command -------------------------------------------------------------------------------------------------------


def test_keys_are_made_listed_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "config" / "ggmq"
    assert ggmq("keys", "new").returncode == 0
    made = ggmq("keys", "new", "lab3", "--role", "worker")
    assert made.returncode == 0 and "lends devices and no more" in made.stdout, made.stderr
    assert "worker --broker tcp://MAINHOST:PORT --keys ~/.config/ggmq/lab3.key" in made.stdout
    assert ggmq("keys", "new", "ann", "--role", "client").returncode == 0
    lab3, cluster = read_keys(folder / "lab3.key"), read_keys(folder / "cluster.key")
    assert (lab3.role, lab3.name, lab3.cluster) == (Role.WORKER, "lab3", cluster.public)
    assert cluster.secret.decode() not in (folder / "lab3.key").read_text()
    for name in ("lab3.key", "ann.key", "cluster.allowed"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    listed = ggmq("keys", "list").stdout
    assert re.search(r"^cluster .*\nworker  \S{40}  lab3\nclient  \S{40}  ann\n$", listed), listed
    assert cluster.secret.decode() not in listed + made.stdout
    assert "removed the worker's key lab3" in ggmq("keys", "remove", "lab3").stdout
    assert [e.name for e in read_list(folder / "cluster.allowed")] == ["ann"]


@pytest.mark.parametrize(("words", "said"), [
    (["new", "lab3"], "--role: expected worker (lends devices) or client (uses devices), got none"),
    (["new", "ann", "--role", "client"], "exists; a key is never overwritten"),
    (["new", "taken", "--role", "client"], "the name taken is taken; choose another, or `ggmq keys remove taken`"),
    (["new", "../x", "--role", "client"], "NAME: expected letters, digits, `_`, `.` and `-`, got '../x'"),
    (["new", "--role", "client"], "--role: only a new key with a name has one"),
    (["remove", "bob"], "there is no key bob; it has ann, taken"),
    (["remove"], "NAME: expected the name of a key"),
    (["list", "--keys", "ann.key"], "takes the cluster's own key, got ann, a client's key"),
    (["list", "--keys", "none.key"], "there is no cluster key yet; make it with `ggmq keys new`"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")  # fmt: skip
def test_what_is_wrong_with_a_key_is_said(keys: KeyPair, words: list[str], said: str) -> None:
    own(keys, Role.CLIENT, "ann")
    add_key(list_beside(Path(keys.path)), Entry(Role.CLIENT, "taken", new_keys().public.decode()))
    folder = Path(keys.path).parent
    words = [str(folder / w) if w.endswith(".key") else w for w in words]
    done = ggmq("keys", *words, *([] if "--keys" in words else ["--keys", keys.path]))
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert len(read_list(folder / "cluster.allowed")) == 2


def test_a_key_of_another_role_is_refused_where_it_is_used(keys: KeyPair) -> None:
    lends, uses = own(keys, Role.WORKER, "lab3"), own(keys, Role.CLIENT, "ann")
    for words, said in (
        (["worker", "--broker", "tcp://127.0.0.1:1", "--keys", uses.path], "to lend a device takes the cluster's key or a"),
        (["worker", "--keys", lends.path, "-p", "0"], "a worker that listens takes the cluster's own key, got lab3, a w"),
        (["broker", "--keys", lends.path], "a broker takes the cluster's own key, got lab3"),
        (["status", "--broker", "tcp://127.0.0.1:1", "--keys", lends.path], "with a broker takes the cluster's key or a c"),
        (["run", "-p", "x", "--rpc", "127.0.0.1:1", "--keys", uses.path], "a worker that listens takes the cluster's own"),
    ):
        done = ggmq(*words, "-d", "reference") if words[0] == "worker" else ggmq(*words)
        assert done.returncode == 2 and said in done.stderr, (words, done.stderr)


@pytest.mark.parametrize(("line", "said"), [
    ("broker x " + "a" * 40, ":1: expected `worker NAME KEY` or `client NAME KEY`, got 'broker x"),
    ("worker x", ":1: expected `worker NAME KEY`"),
    ("worker x " + "a" * 39, ":1: key: expected 40 characters of Z85, got 39"),
    ("worker x " + "#" * 40, "more than 32 bits"),
    ("worker x " + "a" * 40 + "\nclient x " + "b" * 40, "x comes twice"),
    ("worker x " + "a" * 40 + "\nclient y " + "a" * 40, "comes twice"),
    ("\xff", "got bytes that are no text"),
])  # fmt: skip
def test_a_list_that_is_wrong_stops_a_broker_at_its_start(keys: KeyPair, line: str, said: str) -> None:
    path = list_beside(Path(keys.path))
    path.write_bytes(line.encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=re.escape(said)):
        Allowed(keys, path)
    path.write_text("")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Allowed(keys, path)


# -- strangers ---------------------------------------------------------------------------------------------------------

STRANGERS = ["no key", "wrong key", "key of another cluster", "PLAIN", "removed key", "another role's key"]


@pytest.mark.parametrize("case", STRANGERS)
@pytest.mark.parametrize("what", ["broker", "worker"])
def test_no_byte_of_a_stranger_reaches_the_decoder(
    what: str, case: str, keys: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[object] = []

    def recorded(frames: Any) -> Message:
        if threading.current_thread() not in others:  # brokers of other tests may run in this process
            came.append(frames)
        return decode(frames)

    others = threading.enumerate()
    monkeypatch.setattr("broker.loop.decode", recorded)
    monkeypatch.setattr("workers.loop.decode", recorded)
    old = own(keys, Role.WORKER, "old")
    remove(keys, "old")
    fresh, ann = new_keys(), own(keys, Role.CLIENT, "ann")
    secure = {
        "no key": lambda s: None,
        "wrong key": curve(fresh, keys.public),
        "key of another cluster": curve(fresh),
        "PLAIN": plain,
        "removed key": curve(old),
        # a broker knows every key of the list, and what each may do; a worker lets in none that its broker did not name
        "another role's key": curve(ann) if what == "worker" else curve(ann, fresh.public),
    }[case]
    with broker(keys) if what == "broker" else worker(keys) as (_, endpoint):
        with peer(endpoint, secure) as stranger:
            for role in ("client", "worker", "broker", "peer"):
                stranger.send(m.Hello(PROTOCOL_VERSION, role, b"s" * 16, 1))
            time.sleep(QUIET_S)
            assert not came and not stranger.socket.poll(0)
        with peer(endpoint, curve(keys)) as known:
            assert isinstance(known.hello("client" if what == "broker" else "broker", epoch=1), m.Hello)
        assert came


@pytest.mark.parametrize("case", ["dead", "raising", "mute"])
def test_an_authenticator_that_fails_lets_in_nobody(case: str, keys: KeyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggmq.cluster.CONNECT_S", 1.0)
    monkeypatch.setattr("protocol.limits.RETURN_S", 2.0)
    may_end = threading.Event()
    with broker(keys) as (loop, endpoint):
        assert loop._auth is not None
        there = connect(endpoint, keys)
        if case == "dead":
            loop._auth.stop()
        elif case == "raising":
            monkeypatch.setattr(Allowed, "lets_in", lambda self, key: 1 // 0)
        else:
            monkeypatch.setattr(Allowed, "lets_in", lambda self, key: may_end.wait(20) and False)
        try:
            with pytest.raises(DeadlineExceeded):
                connect(endpoint, keys)
            assert len(loop.state.clients) == 1 and there.devices() == [], "who was there before is served"
            monkeypatch.undo()
            if case == "raising":
                connect(endpoint, keys).close()
        finally:
            may_end.set()
            there.close()


NEW_SOCKET = config.listening.new_socket


def lax_socket(*args: Any, **more: Any) -> zmq.Socket[Any]:
    """As `new_socket`, without the option that makes the absence of an answer a no."""
    s = NEW_SOCKET(*args, **more)
    if more.get("server"):
        s.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 0)
    return s


@pytest.mark.parametrize(("case", "said"), [
    ("nobody answers", "nobody refused it within"),
    ("any key is let in", "it was let in"),
    ("nobody answers, and that is no refusal", "it was let in"),
])  # fmt: skip
def test_who_cannot_protect_does_not_start(case: str, said: str, keys: KeyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "nobody answers":
        monkeypatch.setattr(config.listening, "PROOF_S", 0.5)
    if case != "nobody answers" and case != "any key is let in":
        monkeypatch.setattr(config.listening, "new_socket", lax_socket)
    if case == "any key is let in":
        monkeypatch.setattr(Allowed, "lets_in", lambda self, key: True)
    else:
        monkeypatch.setattr(Authenticator, "_run", lambda self: self._socket.close())
    refused = pytest.raises(ConfigError, match=f"expected a key that is not allowed to be refused, tried one, and {said}")
    with refused, broker(keys):
        pass
    with refused, worker(keys):
        pass
    with refused:
        Front("tcp://127.0.0.1:*", keys)


# -- roles -------------------------------------------------------------------------------------------------------------


def test_a_key_has_one_role_at_a_broker(keys: KeyPair) -> None:
    lends, uses = own(keys, Role.WORKER, "lab3"), own(keys, Role.CLIENT, "ann")
    with broker(keys) as (loop, endpoint):
        for pair, may, may_not in ((lends, ["worker"], ["client", "broker"]),
                                   (uses, ["client"], ["worker", "worker-bulk", "peer"]),
                                   (keys, ["client", "worker"], [])):  # fmt: skip
            for role in may:
                with peer(endpoint, curve(pair)) as p:
                    assert isinstance(p.hello(role, pair.public[:16]), m.Hello)
            for role in may_not:
                with peer(endpoint, curve(pair)) as p:
                    h = p.hello(role)
                    assert isinstance(h, m.Error) and h.code == "protocol", h
                    assert f"the key {pair.name} is a {pair.role}'s" in h.message
                    h = p.ask(m.DeviceQuery())
                    assert isinstance(h, m.Error) and "expected HELLO first" in h.message
        assert not loop.state.devices.entries


def test_a_key_has_one_role_at_a_worker_and_is_let_in_while_a_broker_names_it(keys: KeyPair) -> None:
    lends = own(keys, Role.WORKER, "lab3")
    with worker(keys) as (_, endpoint), peer(endpoint, curve(keys)) as boss:
        assert isinstance(boss.hello("broker", b"b" * 16, 1), m.Hello)
        with peer(endpoint, curve(lends)) as early:
            assert early.ask(m.Hello(PROTOCOL_VERSION, "peer", b"p" * 16, 1), within_s=QUIET_S) is None
        assert isinstance(boss.ask(m.PeerListen([lends.public]), 1), m.PeerAddress)
        with peer(endpoint, curve(lends)) as p:
            for role, token in (("broker", b"c" * 16), ("broker", b"b" * 16), ("client", b"c" * 16)):
                h = p.hello(role, token, 2)
                assert isinstance(h, m.Error) and "a worker's: it lends devices" in h.message
            h = p.hello("peer", b"b" * 16, 9)
            assert isinstance(h, m.Error) and "in another role" in h.message, "the broker's token is not for others"
            assert isinstance(p.hello("peer", b"p" * 16, 1), m.Hello)
            h = p.ask(m.AllocBuffer(1, 1, 64), 1)
            assert isinstance(h, m.Error) and "only hand activations over" in h.message
            monitor = p.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            try:
                assert isinstance(boss.ask(m.PeerListen(), 1), m.PeerAddress)
                assert monitor.poll(2000), "it was not cut off"
            finally:
                p.socket.disable_monitor()
                monitor.close()
        assert isinstance(boss.ask(m.StatsQuery(), 1), m.Stats)


def test_a_routing_id_does_not_pass_to_another_key(keys: KeyPair) -> None:
    uses, other = own(keys, Role.CLIENT, "ann"), own(keys, Role.CLIENT, "bob")
    with broker(keys) as (loop, endpoint):
        with peer(endpoint, curve(uses), b"same id") as a:
            assert isinstance(a.hello("client"), m.Hello)
            with peer(endpoint, curve(other), b"same id") as b:  # while it is there nobody gets it
                assert b.ask(m.DeviceQuery(), within_s=QUIET_S) is None
            assert isinstance(a.ask(m.DeviceQuery()), m.DeviceList)
        assert "expected HELLO first" in stolen(endpoint, other, b"same id", m.DeviceQuery(), 0)
        until(lambda: not loop.state.clients)
    with worker(keys) as (_, endpoint):
        with peer(endpoint, curve(keys), b"broker id") as boss:
            assert isinstance(boss.hello("broker", b"b" * 16, 1), m.Hello)
            boss.ask(m.PeerListen([other.public]), 1)
        assert "expected HELLO first" in stolen(endpoint, other, b"broker id", m.StatsQuery(), 1)


def stolen(endpoint: str, pair: KeyPair, identity: bytes, request: m.Header, epoch: int) -> str:
    """What is said to who takes a routing id as soon as its connection is closed, and says no HELLO."""
    for _ in range(20):
        with peer(endpoint, curve(pair), identity) as thief:
            thief.seq = 10
            h = thief.ask(request, epoch, 0.3)
            if h is not None:
                assert isinstance(h, m.Error), h
                return h.message
    return ""


def test_a_worker_is_not_replaced_by_one_with_another_key(keys: KeyPair) -> None:
    first, second = own(keys, Role.WORKER, "one"), own(keys, Role.WORKER, "two")
    port = free_port()
    with started([*WORKER, "-d", "reference", "-t", "1", "-p", str(port), "--keys", keys.path]):
        context: zmq.Context[Any] = zmq.Context()
        loop = BrokerLoop("t", context, keys)
        endpoint = loop.listen("tcp://127.0.0.1:*")
        loop.connect_worker(f"tcp://127.0.0.1:{port}")
        loop.serve_in_thread()
        client = connect(endpoint, keys)
        try:
            with dialling(endpoint, first, "lends"):
                until(lambda: len(ready(client)) == 2)
                for entry in list(loop.state.devices.entries.values()):
                    for role in ("worker", "worker-bulk"):
                        with peer(endpoint, curve(second)) as thief:
                            h = thief.hello(role, entry.instance)
                            assert isinstance(h, m.Error) and "of a worker with another key" in h.message, h
                with peer(endpoint, curve(second)) as thief, peer(endpoint, curve(second)) as bulk:
                    assert isinstance(thief.hello("worker", b"mine" * 4), m.Hello)
                    assert isinstance(bulk.hello("worker-bulk", b"mine" * 4), m.Hello)
                    victim = next(e for e in loop.state.devices.entries.values() if e.info.worker == "lends")
                    thief.ask(m.Hello(PROTOCOL_VERSION, "worker", victim.instance), within_s=0.2)
                assert sorted(ready(client)) == sorted(["lends", f"127.0.0.1:{port}"])
        finally:
            client.close()
            loop.stop()
            context.destroy(linger=0)


# -- removed keys ------------------------------------------------------------------------------------------------------


def test_a_removed_key_loses_its_session_and_the_others_keep_theirs(keys: KeyPair) -> None:
    lends, uses, stays = own(keys, Role.WORKER, "lab3"), own(keys, Role.CLIENT, "ann"), own(keys, Role.CLIENT, "bob")
    with broker(keys) as (loop, endpoint), dialling(endpoint, lends, "lab3"):
        kept, lost = connect(endpoint, stays), connect(endpoint, uses)
        try:
            until(lambda: ready(kept) == ["lab3"])
            lost.request(m.AllocBuffer(lost.session, 1, 1 << 20), device=0)
            remove(keys, "ann")
            assert until(lambda: len(loop.state.clients) == 1, 5) < 1.5
            with pytest.raises(GgmqError, match="the broker closed the connection"):
                lost.devices()
            until(lambda: kept.devices()[0].n_sessions == 0, 5)  # what it held is free
            with pytest.raises(DeadlineExceeded, match=r"does not let in the key of this side .*: it was removed"):
                connect(endpoint, uses)
            remove(keys, "lab3")
            assert until(lambda: not ready(kept), 5) < 1.5
            time.sleep(QUIET_S)
            assert not ready(kept)
            add_key(list_beside(Path(keys.path)), Entry(Role.WORKER, "lab3", lends.public.decode()))
            until(lambda: ready(kept) == ["lab3"], 15)  # the same process, let in again
            assert kept.stats(0).device == "reference"
        finally:
            kept.close()
            lost.close()


def test_a_list_that_becomes_unreadable_leaves_the_cluster_key_alone(
    keys: KeyPair, capfd: pytest.CaptureFixture[str]
) -> None:
    uses = own(keys, Role.CLIENT, "ann")
    path = list_beside(Path(keys.path))
    with broker(keys) as (loop, endpoint):
        mine, theirs = connect(endpoint, keys), connect(endpoint, uses)
        try:
            good = path.read_text()
            path.write_text(good + "nonsense\n")
            assert until(lambda: len(loop.state.clients) == 1, 5) < 1.5
            assert mine.devices() == []
            until(lambda: "expected `worker NAME KEY`" in capfd.readouterr().err)
            path.write_text(good)
            again = connect(endpoint, uses)
            assert again.devices() == []
            again.close()
        finally:
            mine.close()
            theirs.close()


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["both dial in", "one listens", "a front listens"])
def test_workers_with_keys_of_their_own_hand_over_to_each_other(case: str, keys: KeyPair) -> None:
    one, two = own(keys, Role.WORKER, "one"), own(keys, Role.WORKER, "two")
    context: zmq.Context[Any] = zmq.Context()
    loop = BrokerLoop("t", context, keys)
    endpoint = loop.listen("tcp://127.0.0.1:*")
    with contextlib.ExitStack() as ended:
        n = 2
        if case != "both dial in":
            port = free_port()
            n = 3 if case == "a front listens" else 2
            devices = "reference,reference" if n == 3 else "reference"
            ended.enter_context(started([*WORKER, "-d", devices, "-t", "1", "-p", str(port), "--keys", keys.path]))
            loop.connect_worker(f"tcp://127.0.0.1:{port}")
        else:
            ended.enter_context(dialling(endpoint, two, "two"))
        ended.enter_context(dialling(endpoint, one, "one"))
        loop.serve_in_thread()
        client = connect(endpoint, keys)
        try:
            until(lambda: len(ready(client)) == n)
            names = [d.worker for d in client.devices()]
            mine = names.index("one")
            others = [i for i in range(n) if i != mine]
            for pair in ([mine, others[0]], [others[-1], mine]):
                linked = client.request(m.Link(client.session, pair)).header
                assert linked == m.Found(True), pair
            remove(keys, "one")
            until(lambda: len(ready(client)) == n - 1, 5)
            until(lambda: not any(one.public in w.named for w in loop.state.workers.values()), 5)
        finally:
            client.close()
            loop.stop()
            context.destroy(linger=0)


def test_a_client_with_a_key_of_its_own_runs_a_model(keys: KeyPair) -> None:
    lends, uses = own(keys, Role.WORKER, "lab3"), own(keys, Role.CLIENT, "ann")
    with broker(keys) as (_, endpoint), dialling(endpoint, lends, "lab3"):
        done = ggmq("run", "--broker", endpoint, "--keys", uses.path, "-p", "Once upon a time", "-n", "4", "--temp", "0")
        assert done.returncode == 0 and "output on lab3" in done.stderr, done.stderr
        drained = ggmq("drain", "lab3", "--broker", endpoint, "--keys", uses.path)
        assert drained.returncode == 1 and "holder of the cluster's key" in drained.stderr, drained.stderr
        drained = ggmq("drain", "lab3", "--broker", endpoint, "--keys", keys.path)
        assert drained.returncode == 0 and "may be ended" in drained.stdout, drained.stderr
    # alone it needs no broker's key: its workers are on paths of this host
    done = ggmq("run", "--keys", uses.path, "-p", "Once upon a time", "-n", "4", "--temp", "0")
    assert done.returncode == 0, done.stderr
