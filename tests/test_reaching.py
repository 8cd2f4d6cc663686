"""Why a worker or broker is not reached: each cause has its own words, and the side that refuses names the peer.

Real sockets throughout. That no way leads to a host is tested by the system's error alone: no address is sure to have none.
"""

from __future__ import annotations

import contextlib
import errno
import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker.loop import BrokerLoop
from config import probe as probing
from config.auth import new_keys
from config.keys import KeyPair, read_keys, write_keys
from config.probe import CURVE, NULL, Finding, Kind, not_reached, probe
from config.refusals import N_ADDRESSES, PERIOD_S, Refusals
from ggmq.cluster import connect, local_bus
from protocol import PROTOCOL_VERSION
from protocol.errors import DeadlineExceeded, GgmqError, Unavailable
from tests.support.fixtures import ROOT, free_port
from tests.support.processes import GGMQ, WORKER, await_devices, started, until

Dial = Callable[[str, KeyPair | None], str]


def as_main_host(address: str, keys: KeyPair | None) -> str:
    """What `ggmq run --rpc` and `ggmq plan` say of a worker."""
    with local_bus(keys) as bus:
        bus.add_remote(address)
        with pytest.raises(Unavailable) as e:
            bus.start()
    return str(e.value)


def as_client(address: str, keys: KeyPair | None) -> str:
    """What `ggmq run --broker` and `ggmq status` say of a broker."""
    with pytest.raises(GgmqError) as e:
        connect(f"tcp://{address}", keys)
    return str(e.value)


BOTH = pytest.mark.parametrize(("dial", "what"), [(as_main_host, "worker"), (as_client, "broker")], ids=["rpc", "broker"])


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None] | None = None) -> Iterator[str]:
    """Another program on a port; `serve` does something with each connection. Without it they stay in the queue."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as s:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    c = s.accept()[0]
                    with c, contextlib.suppress(OSError):
                        serve(c)  # type: ignore[misc]

        if serve is not None:
            threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{s.getsockname()[1]}"
        with contextlib.suppress(OSError):
            s.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept


@contextlib.contextmanager
def web_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign,assignment]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def key_file(path: Path) -> KeyPair:
    write_keys(path, new_keys())
    return read_keys(path)


class Process:
    """A worker or broker of its own, and what it has said on standard error so far."""

    def __init__(self, command: list[str]) -> None:
        self.p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        self.said = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.p.stderr is not None
        for line in self.p.stderr:
            self.said += line

    def close(self) -> None:
        for s in (signal.SIGTERM, signal.SIGCONT):
            self.p.send_signal(s)
        self.p.wait(10)
        self._thread.join(5)
        assert self.p.stderr is not None
        self.p.stderr.close()

    def lines(self, words: str) -> list[str]:
        return [line for line in self.said.splitlines() if re.search(words, line)]


@contextlib.contextmanager
def running(command: list[str], port: int = 0) -> Iterator[Process]:
    p = Process(command)
    try:
        if port:
            until(lambda: accepts(port))
        yield p
    finally:
        p.close()


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def security(keys: KeyPair | None) -> list[str]:
    return ["--keys", keys.path] if keys is not None else ["--insecure"]


@contextlib.contextmanager
def listener(what: str, keys: KeyPair | None) -> Iterator[tuple[str, Process]]:
    """A real worker or broker: its address and its process."""
    port = free_port()
    command = {"worker": [*WORKER, "-d", "reference", "-p", str(port)],
               "broker": [*GGMQ, "broker", "--listen", f"tcp://127.0.0.1:{port}"]}[what]  # fmt: skip
    with running([*command, *security(keys)], port) as p:
        yield f"127.0.0.1:{port}", p


# -- who is not there --------------------------------------------------------------------------------------------------


@BOTH
def test_a_name_that_is_not_known_is_said_at_once(dial: Dial, what: str) -> None:
    start = time.monotonic()
    said = dial("host.invalid:5555", None)
    assert re.search(r"host\.invalid:5555: the name host\.invalid is not known \(.+\); check its spelling", said), said
    assert time.monotonic() - start < 2.5  # and not the 6 or 10 s for which a silent one is waited for


@BOTH
def test_a_port_where_nothing_listens(dial: Dial, what: str) -> None:
    port = free_port()
    said = dial(f"127.0.0.1:{port}", None)
    start = {"worker": f"start `worker -p {port}`", "broker": f"start `ggmq broker --listen tcp://ADDRESS:{port}`"}[what]
    assert f"connection refused: nothing listens on port {port}" in said and start in said, said


def test_a_worker_that_is_being_started_is_waited_for() -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        late = threading.Timer(1.0, lambda: stack.enter_context(listener_on(port)))
        late.start()
        with local_bus() as bus:
            bus.add_remote(f"127.0.0.1:{port}")
            client = bus.start()
            assert [d.state for d in client.devices()] == ["ready"]
        late.join()


@contextlib.contextmanager
def listener_on(port: int) -> Iterator[None]:
    with started([*WORKER, "-d", "reference", "-p", str(port), "--insecure"]):
        yield


@pytest.mark.parametrize(("number", "kind"), [
    (errno.ECONNREFUSED, Kind.REFUSED), (errno.EHOSTUNREACH, Kind.NO_ROUTE), (errno.ENETUNREACH, Kind.NO_ROUTE),
    (errno.ETIMEDOUT, Kind.NO_ANSWER), (errno.EACCES, Kind.BLOCKED), (errno.EPERM, Kind.BLOCKED),
])  # fmt: skip
def test_each_error_of_the_system_has_a_meaning(number: int, kind: Kind) -> None:
    assert not_reached(OSError(number, os.strerror(number))).kind is kind


def test_a_host_that_answers_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose queue is full: the system drops what comes, as a firewall does."""
    monkeypatch.setattr(probing, "CONNECT_S", 1.0)
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            s = stack.enter_context(socket.socket())
            s.setblocking(False)
            s.connect_ex(full.getsockname())
        address = f"127.0.0.1:{full.getsockname()[1]}"
        assert probe("127.0.0.1", full.getsockname()[1], NULL) == Finding(Kind.NO_ANSWER)
        assert "no answer to the connection: the host is down, or a firewall" in as_main_host(address, None)


# -- who is another program --------------------------------------------------------------------------------------------


def test_a_worker_that_says_nothing() -> None:
    with listening() as address:
        said = as_main_host(address, None)
    assert "says nothing: the worker there is asleep or suspended, or another program" in said


def test_a_broker_that_says_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggmq.cluster.CONNECT_S", 3.5)
    monkeypatch.setattr("protocol.limits.RETURN_S", 5.0)
    notes: list[str] = []
    with listening() as address, pytest.raises(DeadlineExceeded, match="says nothing: the broker there is asleep"):
        connect(f"tcp://{address}", None, notes.append)
    assert len(notes) == 1 and "waiting for it" in notes[0]


@BOTH
def test_a_web_server(dial: Dial, what: str) -> None:
    with web_server() as address:
        assert f"no ggmq {what} listens there: it answers as an HTTP server" in dial(address, None)


@BOTH
@pytest.mark.parametrize("keyed", [False, True])
def test_an_ssh_server(dial: Dial, what: str, keyed: bool) -> None:
    def greet(c: socket.socket) -> None:
        c.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        c.settimeout(1)
        c.recv(100)

    with listening(greet) as address:
        said = dial(address, new_keys() if keyed else None)
    assert f"no ggmq {what} listens there: it answers as an SSH server" in said


@BOTH
def test_one_that_closes_every_connection(dial: Dial, what: str) -> None:
    with listening(lambda c: None) as address:
        assert "closes it without a word: another program listens there" in dial(address, None)


def test_other_uses_of_zeromq_are_none_of_ours() -> None:
    context: zmq.Context[Any] = zmq.Context()
    mute = context.socket(zmq.ROUTER)  # takes what comes and never answers
    try:
        port = mute.bind_to_random_port("tcp://127.0.0.1")
        said = as_main_host(f"127.0.0.1:{port}", None)
        assert "answers no HELLO: the worker there is busy or suspended, or it is another" in said
        assert probe("127.0.0.1", port, CURVE) == Finding(Kind.ZEROMQ, NULL)
    finally:
        mute.close(linger=0)
        context.destroy(linger=0)


def test_a_worker_is_no_broker_and_a_broker_no_worker() -> None:
    with listener("worker", None) as (address, _):
        assert "a ggmq worker listens there, not a broker; a worker's address is for --rpc" in as_client(address, None)
    with listener("broker", None) as (address, _):
        assert "a ggmq broker listens there, not a worker; a broker's address is for --broker" in as_main_host(address, None)


# -- keys --------------------------------------------------------------------------------------------------------------

REFUSED = r"(worker|ggmq broker): refused 127\.0\.0\.1: "


@BOTH
@pytest.mark.parametrize("case", ["another key", "another pair", "no key", "no key there"])
def test_keys_that_differ_are_told_apart_on_both_sides(dial: Dial, what: str, case: str, tmp_path: Path) -> None:
    cluster, stranger = key_file(tmp_path / "cluster.key"), key_file(tmp_path / "other.key")
    theirs, mine, words, logged = {
        "another key": (cluster, stranger, rf"there has another cluster key than this side \({stranger.path}\); copy",
                        "it has another cluster key"),
        "another pair": (cluster, None, "", "its key is none that this cluster lets in"),
        "no key": (cluster, None, "there wants a cluster key and this side uses none; copy the key file",
                   "it uses no cluster key"),
        "no key there": (None, cluster, rf"there runs without a cluster key, this side with {cluster.path}; start it",
                         "it uses a cluster key, and this (worker|broker) runs without one"),
    }[case]  # fmt: skip
    with listener(what, theirs) as (address, refusing):
        if case == "another pair":
            until(lambda: knock(address, cluster.public) or refusing.lines(REFUSED + logged))  # it may not listen at once
        else:
            said = dial(address, mine)
            assert re.search(f"the {what} {words}", said), said
        until(lambda: refusing.lines(REFUSED + logged), 5)
        time.sleep(0.5)
        assert len(refusing.lines(REFUSED)) == 1, refusing.said
    assert cluster.secret.decode() not in refusing.said and stranger.secret.decode() not in refusing.said


def knock(address: str, public: bytes) -> None:
    """As one that knows the cluster's public key and not the secret one."""
    context: zmq.Context[Any] = zmq.Context()
    s = context.socket(zmq.DEALER)
    try:
        s.curve_publickey, s.curve_secretkey = zmq.curve_keypair()
        s.curve_serverkey = public
        s.connect(f"tcp://{address}")
        time.sleep(0.5)
    finally:
        s.close(linger=0)
        context.destroy(linger=0)


def test_who_only_looks_who_is_there_is_not_logged(tmp_path: Path) -> None:
    cluster = key_file(tmp_path / "cluster.key")
    with listener("worker", cluster) as (address, p):
        port = int(address.rsplit(":", 1)[1])
        for _ in range(20):
            assert accepts(port)
        assert probe("127.0.0.1", port, CURVE) == Finding(Kind.ZEROMQ, CURVE)
        with local_bus(cluster) as bus:
            bus.add_remote(address)
            assert bus.start().devices()
        assert not p.lines("refused")


def test_a_flood_of_strangers_fills_no_log() -> None:
    refusals = Refusals()
    lines = [refusals.line(f"10.0.{i // 250}.{i % 250}", "why", i / 1000) for i in range(5000)]
    assert len([line for line in lines if line]) == N_ADDRESSES and lines[0] == "refused 10.0.0.0: why"
    assert not refusals.line("10.0.0.0", "why", PERIOD_S - 1)
    again = refusals.line("10.0.0.0", "why", PERIOD_S + 1)
    assert again == f"refused 10.0.0.0: why ({5000 - N_ADDRESSES + 1} more were refused before)"
    assert not refusals.line("", "somebody", PERIOD_S + 2)


def test_a_listener_goes_with_all_that_belongs_to_it() -> None:
    def doors() -> int:
        return sum(t.name == "ggmq-door" for t in threading.enumerate())

    before = doors()
    context: zmq.Context[Any] = zmq.Context()
    loop = BrokerLoop("t", context, new_keys())
    loop.listen("tcp://127.0.0.1:*")
    loop.serve_in_thread()
    assert doors() == before + 1
    loop.stop()
    context.destroy(linger=0)
    until(lambda: doors() == before)


# -- versions ----------------------------------------------------------------------------------------------------------


def of_version(version: int, main: str, *options: str) -> list[str]:
    """The command of a process of ours that speaks another version of the protocol."""
    return [sys.executable, "-c", f"import protocol.limits as l, protocol; l.PROTOCOL_VERSION = protocol.PROTOCOL_VERSION = "
            f"{version}; from {main} import main; raise SystemExit(main())", *options]  # fmt: skip


@BOTH
@pytest.mark.parametrize("step", [-1, 1], ids=["older", "newer"])
def test_another_version_is_named_on_both_sides(dial: Dial, what: str, step: int) -> None:
    port, there = free_port(), PROTOCOL_VERSION + step
    command = {"worker": of_version(there, "workers.__main__", "-d", "reference", "-p", str(port), "--insecure"),
               "broker": of_version(there, "ggmq.cli", "broker", "--listen", f"tcp://127.0.0.1:{port}", "--insecure"),
               }[what]  # fmt: skip
    mine, theirs = ("the peer's side", "this side") if step < 0 else ("this side", "the peer's side")
    with running(command, port) as p:
        said = dial(f"127.0.0.1:{port}", None)
        assert said.endswith(f"127.0.0.1:{port}: this side speaks protocol {PROTOCOL_VERSION}, the peer protocol {there}; "
                             f"upgrade ggmq on {mine}"), said  # fmt: skip
        logged = (rf"{REFUSED}this side speaks protocol {there}, the peer protocol {PROTOCOL_VERSION} \(ggmq .+\); "
                  rf"upgrade ggmq on {theirs}")  # fmt: skip
        until(lambda: p.lines(logged), 5)
        assert len(p.lines("refused")) == 1, p.said


# -- a worker that dials in --------------------------------------------------------------------------------------------


def dialling_in(endpoint: str, keys: KeyPair | None) -> list[str]:
    return [*WORKER, "-d", "reference", "--broker", endpoint, *security(keys)]


def test_a_worker_says_why_its_broker_is_not_reached_and_joins_it_later() -> None:
    port = free_port()
    endpoint = f"tcp://127.0.0.1:{port}"
    with running(dialling_in(endpoint, None)) as worker:
        until(lambda: worker.lines(f"^worker: broker {endpoint}: connection refused: nothing listens on port {port}"))
        time.sleep(4)  # it is dialled several times
        assert len(worker.said.splitlines()) == 1, worker.said
        with running([*GGMQ, "broker", "--listen", endpoint, "--insecure"]):
            await_devices(endpoint, 1)


def test_a_worker_whose_brokers_name_is_not_known_says_so() -> None:
    with running(dialling_in("tcp://host.invalid:5555", None)) as worker:
        until(lambda: worker.lines(r"^worker: broker tcp://host\.invalid:5555: the name host\.invalid is not known"))


@pytest.mark.parametrize("keyed", [True, False])
def test_a_worker_with_the_wrong_key_says_so_and_joins_once_it_is_right(keyed: bool, tmp_path: Path) -> None:
    cluster, mine = key_file(tmp_path / "cluster.key"), key_file(tmp_path / "mine.key")
    port = free_port()
    endpoint, words = f"tcp://127.0.0.1:{port}", ("has another cluster key" if keyed else "wants a cluster key")
    with running(dialling_in(endpoint, mine if keyed else None)) as worker:
        broker = [*GGMQ, "broker", "--listen", endpoint]
        with running([*broker, *security(cluster)], port) as p:
            until(lambda: worker.lines(f"^worker: broker {endpoint}: the broker there {words}"))
            until(lambda: p.lines(REFUSED + "it (has another cluster key|uses no cluster key)"))
        with running([*broker, *security(mine if keyed else None)], port):

            def there() -> bool:
                client = connect(endpoint, mine if keyed else None)
                try:
                    return [d.state for d in client.devices()] == ["ready"]
                finally:
                    client.close()

            until(there)


def test_a_worker_of_another_version_says_so_and_the_broker_too() -> None:
    port = free_port()
    endpoint = f"tcp://127.0.0.1:{port}"
    with running([*GGMQ, "broker", "--listen", endpoint, "--insecure"], port) as broker:
        newer = of_version(PROTOCOL_VERSION + 1, "workers.__main__", *dialling_in(endpoint, None)[3:])
        with running(newer) as worker:
            words = f"the peer protocol {PROTOCOL_VERSION}; upgrade ggmq on the peer's side"
            until(lambda: worker.lines(words))
            until(lambda: broker.lines(rf"{REFUSED}this side speaks protocol {PROTOCOL_VERSION}, the peer protocol "
                                       rf"{PROTOCOL_VERSION + 1} \(ggmq .+\); upgrade ggmq on this side"))  # fmt: skip


def test_a_broker_says_which_of_its_workers_is_not_reached_and_dials_on() -> None:
    port, worker_port = free_port(), free_port()
    endpoint = f"tcp://127.0.0.1:{port}"
    command = [*GGMQ, "broker", "--listen", endpoint, "--rpc", f"127.0.0.1:{worker_port}", "--insecure"]
    with running(command, port) as broker:
        until(lambda: broker.lines(f"^ggmq broker: 127.0.0.1:{worker_port}: connection refused"))
        with running([*WORKER, "-d", "reference", "-p", str(worker_port), "--insecure"]):
            await_devices(endpoint, 1)
        assert len(broker.lines("connection refused")) == 1


# -- as a user sees it -------------------------------------------------------------------------------------------------


def test_the_command_line_says_it_in_one_line() -> None:
    port = free_port()
    for command in (["run", "-p", "x", "--rpc", f"127.0.0.1:{port}"], ["status", "--broker", f"tcp://127.0.0.1:{port}"]):
        r = subprocess.run([*GGMQ, *command, "--insecure"], capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert r.returncode == 1 and "nothing listens on port" in r.stderr
        assert len(r.stderr.splitlines()) == 1 and r.stderr.startswith("ggmq: "), r.stderr
