"""What TCP tells of a connection: whether bytes are carried, and how long the network takes. Linux says it; others do not.

A PING that waits behind a weight on a slow link, or in the queue of a router, says nothing of the process at the other end:
its kernel acknowledges what arrives, whether the process runs or not.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from typing import NamedTuple

RTT, RTTVAR, BYTES_ACKED, BYTES_RECEIVED = 68, 72, 120, 128
"""Offsets in Linux' struct tcp_info: microseconds as uint32, then bytes as uint64."""
END = BYTES_RECEIVED + 8


class Carried(NamedTuple):
    """Attributes:
    n_bytes: acknowledged by the other end, and received from it, since the connection began.
    network_s: within so long the network brings something there and an acknowledgement back: the mean, and four deviations.
    """

    n_bytes: int
    network_s: float


def carried(fd: int) -> Carried | None:
    """Of a TCP connection of this process; None where there is none behind the descriptor (below 0: it is not known), or the
    system does not tell."""
    if fd < 0 or not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError):
        s = socket.socket(fileno=fd)
        try:
            if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                if len(info) >= END:
                    rtt, rttvar = struct.unpack_from("=II", info, RTT)
                    return Carried(sum(struct.unpack_from("=QQ", info, BYTES_ACKED)), (rtt + 4 * rttvar) / 1e6)
        finally:
            s.detach()
    return None
