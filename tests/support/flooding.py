"""`python -m tests.support.flooding ENDPOINT`: a client that asks for as much as it may, of everything, until it is killed.

It says `ready` when it has begun, and ends with an error if something is given to it that is another's.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from ggmq.cluster import Client, connect
from protocol import limits
from protocol import messages as m
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import GgmqError, HandleError
from protocol.graph import Graph
from tests.support.strategies import leaf

MIB = 1 << 20
FOREIGN = range(2, 60)
"""Numbers of buffers that this client does not have, and others may."""


def requests(client: Client) -> Iterator[tuple[m.Header, list[bytes], bool]]:
    """Without end: header, payload, and whether it must be refused."""
    s, n = client.session, 0
    while True:
        n += 1
        ne = (256, 1 + n % 200, 1, 1)
        square = replace(leaf(0, ne), op="SQR", src=(0,))
        frame = encode_graph(Graph((leaf(0, ne, 1), square), (), (1,)))
        yield m.GraphPut(s, graph_digest(frame)), [frame], False
        yield m.GraphCompute(s, graph_digest(frame), 0), [], False
        yield m.GetTensor(s, 1, 0, 256 << 10), [], False
        yield m.SetTensor(s, 1, 0, 256 << 10), [bytes(256 << 10)], False
        yield m.StatsQuery(), [], False
        yield m.AllocBuffer(s, 1000 + n, 1 << 45), [], True
        foreign = FOREIGN[n % len(FOREIGN)]
        yield m.GetTensor(s, foreign, 0, 1), [], True
        yield m.FreeBuffer(s, foreign), [], True
        yield m.GetTensor(s + 1, foreign, 0, 1), [], True
        yield m.GetTensor(s - 1, foreign, 0, 1), [], True
        yield m.CopyTensor(s, foreign, 0, 1, 0, 4, 4), [], True
        yield m.AllocBuffer(s, 10_000 + n, 4096), [], False


def main(endpoint: str) -> None:
    client = connect(endpoint)
    client.request(m.AllocBuffer(client.session, 1, MIB))
    taken, size = 0, 256 * MIB
    while size >= MIB:  # all that there is
        try:
            client.request(m.AllocBuffer(client.session, 100_000 + taken, size))
            taken += 1
        except GgmqError as e:
            assert e.code == "out_of_memory", e
            size //= 2
    asked: deque[tuple[int, bool]] = deque()
    for i, (header, payload, must_fail) in enumerate(requests(client)):
        if i == limits.MAX_INFLIGHT_PER_CLIENT:
            print("ready", flush=True)
        while len(asked) >= limits.MAX_INFLIGHT_PER_CLIENT - 8:
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


if __name__ == "__main__":
    main(sys.argv[1])
