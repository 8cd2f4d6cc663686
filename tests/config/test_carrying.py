"""What TCP tells of a connection."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from config.carrying import carried
from tests.support.processes import until


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell")
def test_bytes_count_that_arrived_either_way() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as a,
        listener.accept()[0] as b,
    ):  # fmt: skip
        before = carried(a.fileno())
        assert before is not None and 0 <= before.network_s < 5
        a.sendall(bytes(10_000))
        until(lambda: (now := carried(a.fileno())) is not None and now.n_bytes >= before.n_bytes + 10_000)
        b.sendall(bytes(5_000))
        until(lambda: (now := carried(a.fileno())) is not None and now.n_bytes >= before.n_bytes + 15_000)
        assert a.fileno() >= 0, "it is still open"



def test_of_what_is_no_connection_nothing_is_told() -> None:
    here, there = socket.socketpair()
    with here, there:
        assert carried(here.fileno()) is None and here.fileno() >= 0
    read, write = os.pipe()
    assert carried(read) is None
    os.close(read)
    os.close(write)
    assert carried(read) is None and carried(-1) is None
