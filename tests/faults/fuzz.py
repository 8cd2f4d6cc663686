"""Messages that are wrong, by the hundred thousand, at a worker and at a broker: the same process, the same next token."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import zmq

from ggmq.cluster import connect
from protocol import PROTOCOL_VERSION, limits
from protocol import messages as m
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import ProtocolError
from protocol.frames import Message, decode, encode
from protocol.graph import Graph
from protocol.messages import NOT_CLIENTS, REQUEST, Command
from tests.faults.ground import Ground
from tests.faults.mutations import mutated, valid
from tests.faults.playing import one_text
from tests.faults.report import Run
from tests.faults.setups import Live, Setup, living
from tests.faults.streams import Talker
from tests.support.attacker import SESSION
from tests.support.processes import rss_bytes
from tests.support.strategies import leaf
from tests.support.supervised import until

N_MESSAGES = 1_000_000
N_QUICK = 25_000
MAX_GROWTH_BYTES = 10 << 20
ANSWER_S = 20.0
LOOKED_AT = 500
"""After so many messages the process is asked whether it is well."""
SETTLE_S = limits.PEER_CLOSED_S + 2
N_TOKENS = 40
BUFFER = 1000
MIB = 1 << 20


@dataclass
class Peer:
    """A raw DEALER, what it says first, and what it knows to be there."""

    socket: zmq.Socket[Any]
    commands: Sequence[Command]
    epoch: int = 0
    seq: int = 0
    known: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)

    def next(self, rng: Random) -> list[bytes]:
        self.seq += 1
        seq = self.seq if rng.random() < 0.9 else rng.randrange(self.seq + 1)
        frames = valid(rng, self.commands, self.epoch, seq, self.known, self.digests, self.payloads)
        return frames if rng.random() < 0.3 else mutated(frames, rng)

    def ask(self, header: m.Header, payload: Sequence[bytes] = ()) -> m.Header:
        """A good request and its answer. Errors: RuntimeError when none comes."""
        self.seq += 1
        message = Message(m.COMMAND_OF[type(header)], header, tuple(payload), epoch=self.epoch, seq=self.seq)
        self.socket.send_multipart(encode(message))
        due = time.monotonic() + ANSWER_S
        while self.socket.poll(max(0, int(1000 * (due - time.monotonic())))):
            with contextlib.suppress(ProtocolError):
                reply = decode(self.socket.recv_multipart())
                if reply.reply and reply.seq == self.seq:
                    return reply.header
        raise RuntimeError(f"no answer to {type(header).__name__} within {ANSWER_S:.0f} s")


class Attack:
    """Peers of one endpoint, and one among them that is good."""

    def __init__(self, endpoint: str, rng: Random) -> None:
        self.endpoint, self.rng = endpoint, rng
        self.answers: Counter[str] = Counter()
        self._context: zmq.Context[Any] = zmq.Context()

    def socket(self) -> zmq.Socket[Any]:
        s = self._context.socket(zmq.DEALER)
        s.linger, s.sndhwm = 0, 100
        s.connect(self.endpoint)
        return s

    def peer(self, role: str, commands: Sequence[Command]) -> Peer:
        """One that said HELLO in a role; without a role, nothing."""
        peer = Peer(self.socket(), commands, 5 if role in ("broker", "peer") else 0)
        if role:
            token = self.rng.randbytes(16) if role != "client" else b""
            peer.ask(m.Hello(PROTOCOL_VERSION, role, token, peer.epoch))
        return peer

    def take(self, peer: Peer, run: Run) -> None:
        """Replies so far. What is no message is a failure: an answer to nonsense is an ordinary error."""
        while peer.socket.poll(0):
            frames = peer.socket.recv_multipart()
            try:
                header = decode(frames).header
            except ProtocolError as e:
                run.fail(f"an answer that is no message: {e}")
                continue
            self.answers[header.code if isinstance(header, m.Error) else type(header).__name__] += 1

    def close(self) -> None:
        self._context.destroy(linger=0)


def _send(run: Run, attack: Attack, peers: Sequence[Peer], good: Peer, process: Talker, n: int) -> bool:
    """Send so many messages; whether the process was well all the time."""
    for i in range(n):
        peer = attack.rng.choice(peers)
        if not peer.socket.poll(int(1000 * ANSWER_S), zmq.POLLOUT):
            run.fail(f"message {i}: nobody takes messages any more")
            return False
        peer.socket.send_multipart(peer.next(attack.rng))
        if i % LOOKED_AT == 0:
            for each in peers:
                attack.take(each, run)
            if process.process.poll() is not None:
                run.fail(f"message {i}: the process ended: {process.err.text()[-300:]}")
                return False
            if i % (20 * LOOKED_AT) == 0:
                good.ask(m.Ping(i))
    return True


@contextlib.contextmanager
def _watched(run: Run, live: Live, processes: dict[str, Talker]) -> Iterator[None]:
    """Texts before and after, memory before and after."""
    for _ in range(2):
        one_text(live, run, "before")
    before = {name: rss_bytes(p.pid) for name, p in processes.items()}
    yield
    until(lambda: all(rss_bytes(p.pid) < before[name] + MAX_GROWTH_BYTES / 2 for name, p in processes.items()
                      if p.process.poll() is None), SETTLE_S, 0.1)  # fmt: skip
    one_text(live, run, "afterwards")
    for name, p in processes.items():
        if p.process.poll() is not None:
            run.fail(f"the {name} ended: {p.err.text()[-300:]}")
            continue
        grown = rss_bytes(p.pid) - before[name]
        run.figures[f"{name}, MiB more"] = grown / MIB
        if grown > MAX_GROWTH_BYTES:
            run.fail(f"the {name} has grown by {grown / MIB:.1f} MiB")


def _give(peer: Peer) -> None:
    """Let a peer have a buffer and a graph, so that messages about them are often about something that is there."""
    square = replace(leaf(0, (32, 2, 1, 1)), op="SQR", src=(0,))
    frame = encode_graph(Graph((leaf(0, (32, 2, 1, 1), BUFFER), square), (), (1,)))
    peer.ask(m.AllocBuffer(SESSION, BUFFER, 256))
    peer.ask(m.GraphPut(SESSION, graph_digest(frame)), [frame])
    peer.known, peer.digests, peer.payloads = [SESSION, BUFFER, 256], [graph_digest(frame)], [frame, bytes(256)]


def _take_back(endpoint: str) -> None:
    """Have no device left: some other message may have become a RETIRE."""
    with contextlib.closing(connect(endpoint)) as client:
        for number, device in enumerate(client.devices()):
            if device.retired:
                client.request(m.Retire(False), device=number)


def _amount(ground: Ground) -> int:
    return N_QUICK if ground.quick else N_MESSAGES


def worker(ground: Ground, run: Run) -> None:
    """A worker that listens, and peers that are its broker, another worker, a broker's second channel, nobody."""
    n = _amount(ground)
    with living(ground, Setup("bus", n_workers=1, listens=True, n_tokens=N_TOKENS)) as live:
        process = live.workers["w0"]
        with _watched(run, live, {"worker": process}):
            attack = Attack(f"tcp://127.0.0.1:{live.port('w0')}", run.rng)
            try:
                every = sorted(REQUEST)
                peers = [attack.peer(role, every) for role in ("broker", "broker", "peer", "")]
                _give(peers[0])
                good = attack.peer("broker", every)
                start = time.monotonic()
                if _send(run, attack, peers, good, process, n):
                    run.figures["messages a second"] = n / (time.monotonic() - start)
                run.did(f"{n} messages, {sum(attack.answers.values())} answers: {_most(attack.answers)}")
            finally:
                attack.close()


def broker(ground: Ground, run: Run) -> None:
    """A broker with a worker, and peers that are a client, a worker, nobody."""
    n = _amount(ground)
    with living(ground, Setup("bus", n_workers=1, n_tokens=N_TOKENS)) as live:
        assert live.broker is not None  # a bus has one
        with _watched(run, live, {"broker": live.broker, "worker": live.workers["w0"]}):
            attack = Attack(live.endpoint, run.rng)
            try:
                # a client may have a worker left for good: then no text can be made any more, and rightly so
                clients = sorted(c for c in set(REQUEST) - NOT_CLIENTS if c.name != "RETIRE")
                peers = [attack.peer("client", clients), attack.peer("client", [*clients, *NOT_CLIENTS])]
                peers += [attack.peer("worker", sorted(REQUEST)), attack.peer("", clients)]
                good = attack.peer("client", clients)
                start = time.monotonic()
                if _send(run, attack, peers, good, live.broker, n):
                    run.figures["messages a second"] = n / (time.monotonic() - start)
                _take_back(live.endpoint)
                run.did(f"{n} messages, {sum(attack.answers.values())} answers: {_most(attack.answers)}")
            finally:
                attack.close()


def _most(answers: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in answers.most_common(5))
