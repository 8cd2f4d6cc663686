"""`python -m tests.support.flooding ENDPOINT [KIND]`: a client that asks for as much as it may, until it is killed.

It says `ready` when it has begun, and ends with an error if something is given to it that is another's.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import zmq

from ggmq.cluster import Client, connect
from protocol import PROTOCOL_VERSION, limits
from protocol import messages as m
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import GgmqError, HandleError
from protocol.frames import Message, decode, encode
from protocol.graph import Graph
from tests.support.strategies import leaf

MIB = 1 << 20
FOREIGN = range(2, 60)
"""Numbers of buffers that this client does not have, and others may."""
Asked = tuple[m.Header, list[bytes], bool]
"""Header, payload, and whether it must be refused."""


def everything(client: Client) -> Iterator[Asked]:
    """Of each kind some; before them, all the memory that there is."""
    s, taken, size = client.session, 0, 256 * MIB
    while size >= MIB:
        try:
            client.request(m.AllocBuffer(s, 100_000 + taken, size))
            taken += 1
        except GgmqError as e:
            assert e.code == "out_of_memory", e
            size //= 2
    for n in itertools.count(1):
        ne = (256, 1 + n % 200, 1, 1)
        square = replace(leaf(0, ne), op="SQR", src=(0,))
        frame = encode_graph(Graph((leaf(0, ne, 1), square), (), (1,)))
        yield m.GraphPut(s, graph_digest(frame)), [frame], False
        yield m.GraphCompute(s, graph_digest(frame), 0), [], False
        yield m.GetTensor(s, 1, 0, 256 << 10), [], False
        yield m.SetTensor(s, 1, 0, 256 << 10), [bytes(256 << 10)], False
        yield m.StatsQuery(), [], False
        yield m.AllocBuffer(s, 1000 + n, 1 << 45), [], True
        yield from itertools.islice(handles_of_others(client, FOREIGN[n % len(FOREIGN)]), 5)
        yield m.AllocBuffer(s, 10_000 + n, 4096), [], False


def handles_of_others(client: Client, first: int = FOREIGN[0]) -> Iterator[Asked]:
    s = client.session
    for n in itertools.count(first):
        foreign = FOREIGN[n % len(FOREIGN)]
        yield m.GetTensor(s, foreign, 0, 1), [], True
        yield m.FreeBuffer(s, foreign), [], True
        yield m.GetTensor(s + 1, foreign, 0, 1), [], True
        yield m.GetTensor(s - 1, foreign, 0, 1), [], True
        yield m.CopyTensor(s, foreign, 0, 1, 0, 4, 4), [], True


def pings(client: Client) -> Iterator[Asked]:
    for n in itertools.count():
        yield m.Ping(n), [], False


def buffers(client: Client) -> Iterator[Asked]:
    s = client.session
    for n in itertools.count(1000):
        yield m.AllocBuffer(s, n, 64 << 10), [], False
        yield m.FreeBuffer(s, n), [], False


def uploads(client: Client) -> Iterator[Asked]:
    chunk = bytes(MIB)
    while True:
        yield m.SetTensor(client.session, 1, 0, MIB), [chunk], False


def computes(client: Client) -> Iterator[Asked]:
    """Each of some tenths of a second, if nobody else is there."""
    s, ne = client.session, (MIB, 4, 1, 1)
    nodes = [leaf(0, ne, 1), *(replace(leaf(0, ne), op="MUL", src=(i, i)) for i in range(20)),
             replace(leaf(0, (1, 4, 1, 1)), op="SUM_ROWS", src=(20,))]  # fmt: skip
    frame = encode_graph(Graph(tuple(nodes), (), (21,)))
    client.request(m.GraphPut(s, graph_digest(frame)), [frame])
    while True:
        yield m.GraphCompute(s, graph_digest(frame), 0), [], False


KINDS: dict[str, Callable[[Client], Iterator[Asked]]] = {
    "handles": handles_of_others,
    "pings": pings,
    "buffers": buffers,
    "uploads": uploads,
    "computes": computes,
    "everything": everything,
}
N_INFLIGHT = {"computes": 32, "uploads": 64}
"""Less than there may be, where that would still be worked at long after the flood."""
BUSY = "busy"
"""No flood: what a process costs that takes as much of a core as a flooder of this host does."""
RUDE = "rude"
"""The kind that waits for no answer, and reads them only to throw them away."""


def ask(client: Client, requests: Iterator[Asked], n_inflight: int) -> None:
    """As a client of ours does, with so many requests in flight."""
    asked: deque[tuple[int, bool]] = deque()
    for i, (header, payload, must_fail) in enumerate(requests):
        if i == n_inflight + 8:
            print("ready", flush=True)
        while len(asked) >= n_inflight:
            seq, refused = asked.popleft()
            if refused:
                try:
                    client.wait(seq)
                except GgmqError as e:
                    assert isinstance(e, HandleError) or e.code == "out_of_memory", e
                else:
                    raise AssertionError("it was given what is another's, or is not there")
            else:
                with contextlib.suppress(GgmqError):
                    client.wait(seq)
        asked.append((client.submit(header, payload), must_fail))


def be_rude(endpoint: str) -> None:
    """Send as fast as it can, with a core to itself."""
    s: zmq.Socket[bytes] = zmq.Context().socket(zmq.DEALER)
    s.connect(endpoint)
    s.send_multipart(encode(Message(m.Command.HELLO, m.Hello(PROTOCOL_VERSION, "client", b""))))
    hello = decode(s.recv_multipart()).header
    assert isinstance(hello, m.Hello)
    print("ready", flush=True)
    for seq in itertools.count(1):
        with contextlib.suppress(zmq.Again):
            request = Message(m.Command.GET_TENSOR, m.GetTensor(hello.session, 2, 0, 1), seq=seq)
            s.send_multipart(encode(request), zmq.DONTWAIT)
        with contextlib.suppress(zmq.Again):
            while True:
                s.recv_multipart(zmq.DONTWAIT)


def be_busy() -> None:
    """Take a core and ask for nothing."""
    print("ready", flush=True)
    while True:
        pass


def main(endpoint: str, kind: str = "everything") -> None:
    if kind == BUSY:
        be_busy()
    if kind == RUDE:
        be_rude(endpoint)
    client = connect(endpoint)
    client.request(m.AllocBuffer(client.session, 1, 16 * MIB))
    ask(client, KINDS[kind](client), N_INFLIGHT.get(kind, limits.MAX_INFLIGHT_PER_CLIENT - 8))


if __name__ == "__main__":
    main(*sys.argv[1:])
