"""What TCP tells of a connection."""

from __future__ import annotations

import socket

from config.carrying import carried


def test_what_is_no_tcp_connection_tells_nothing() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert carried(-1) is None and carried(left.fileno()) is None
        left.sendall(b"x")
        assert right.recv(1) == b"x"
