"""Peers without a key, as a program: `python -m tests.faults.crowd PORT KIND`. They stay until standard input ends."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys

from tests.soak.strangers import crowd

N_PEERS, N_MANY = 300, 600
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
ANNOUNCES_8_GIB = b"\x06" + struct.pack(">Q", 8 << 30) + bytes(1000)
KINDS = {"silent": b"", "8 GiB": GREETING + ANNOUNCES_8_GIB, "descriptors": b"", "talkers": GREETING}
"""What each says."""
MANY = ("descriptors", "talkers")
"""More than there is room for, who come again when they are sent away."""


def main() -> int:
    port, kind = int(sys.argv[1]), sys.argv[2]
    with contextlib.ExitStack() as stack:
        if kind in MANY:
            stack.enter_context(crowd(port, N_MANY, KINDS[kind]))
        else:
            for _ in range(N_PEERS):
                s = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
                s.sendall(KINDS[kind])
        print("there", flush=True)
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
