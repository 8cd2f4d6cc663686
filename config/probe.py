"""What is at the other end of a TCP address, asked once with a plain socket and within a time limit.

ZeroMQ tries again for ever and says little of why. Its greeting tells the rest: a peer that speaks ZMTP sends 64 bytes of a
known form before any key matters, and names in them how it wants to be spoken to.
Source: RFC 23 and 26 of ZeroMQ (ZMTP 3, CURVE).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from dataclasses import dataclass
from enum import Enum, auto

CONNECT_S = 4.0
GREET_S = 1.0
MISMATCH_S = 0.5
NAMED_S = 0.2
"""A peer that refuses closes at once; so long before, it can look up our address, also when its host is busy."""
N_ADDRESSES = 3
GREETING_BYTES = 64
N_BEGIN = 11
SIGNATURE = b"\xff" + bytes(7) + b"\x01\x7f"
NULL, CURVE = "NULL", "CURVE"


class Kind(Enum):
    NAME = auto()
    REFUSED = auto()
    NO_ROUTE = auto()
    BLOCKED = auto()
    NO_ANSWER = auto()
    SILENT = auto()
    CLOSED = auto()
    FOREIGN = auto()
    ZEROMQ = auto()


NOT_REACHED = frozenset({Kind.NAME, Kind.REFUSED, Kind.NO_ROUTE, Kind.BLOCKED, Kind.NO_ANSWER})


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found.

    Attributes:
        detail: with NAME, NO_ROUTE and BLOCKED the system's words, with FOREIGN what it answers, with ZEROMQ the security
            mechanism that it asks for: NULL or CURVE.
    """

    kind: Kind
    detail: str = ""


def greeting(mechanism: str) -> bytes:
    """What a ZMTP 3.1 peer says first. Its first `N_BEGIN` bytes are enough for the other side to tell its mechanism."""
    return (SIGNATURE + b"\x03\x01" + mechanism.encode().ljust(20, b"\0")).ljust(GREETING_BYTES, b"\0")


def address_of(endpoint: str) -> tuple[str, int]:
    """Host and port of a `tcp://` endpoint; port 0 for any other."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.rpartition(";")[2].strip("[]"), int(port) if endpoint.startswith("tcp://") and port.isdecimal() else 0


def probe(host: str, port: int, mechanism: str, connect_s: float = CONNECT_S) -> Finding:
    """Ask who is there, as one that uses `mechanism`. Takes some seconds at most, and the time of a look-up of the name.

    connect_s: for so long a connection is waited for.

    Errors: OSError when this process can open no socket.
    """
    try:  # ZeroMQ is told nothing of IPv6, so it looks for these only
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        return Finding(Kind.NAME, getattr(e, "strerror", None) or "no name of a host")
    last = Finding(Kind.NO_ANSWER)
    for family, kind, proto, _, where in found[:N_ADDRESSES]:
        with socket.socket(family, kind, proto) as s:
            s.settimeout(connect_s / min(len(found), N_ADDRESSES))
            try:
                s.connect(where)
            except OSError as e:
                last = not_reached(e)
                continue
            return _greet(s, mechanism)
    return last


def not_reached(e: OSError) -> Finding:
    """What an error of connect stands for."""
    words = e.strerror or os.strerror(e.errno or 0)
    if e.errno == errno.ECONNREFUSED:
        return Finding(Kind.REFUSED)
    if isinstance(e, TimeoutError) or e.errno == errno.ETIMEDOUT:
        return Finding(Kind.NO_ANSWER)
    if e.errno in (errno.EACCES, errno.EPERM):
        return Finding(Kind.BLOCKED, words)
    return Finding(Kind.NO_ROUTE, words)


def _greet(s: socket.socket, mechanism: str) -> Finding:
    got = b""
    try:
        s.sendall(greeting(mechanism)[:N_BEGIN])
        got = _read(s, GREET_S)
        if not got:  # a server that reads lines waits for the end of one
            s.sendall(b"\r\n\r\n")
            got = _read(s, GREET_S)
    except TimeoutError:
        return Finding(Kind.SILENT)
    except OSError:
        return Finding(Kind.CLOSED)
    found = _meaning(got)
    if found.kind is Kind.ZEROMQ and found.detail != mechanism:
        with contextlib.suppress(OSError):  # once it has read the rest it closes, and can say why
            time.sleep(NAMED_S)
            s.settimeout(MISMATCH_S)
            s.sendall(greeting(mechanism)[N_BEGIN:])
            s.recv(1)
    return found


def _read(s: socket.socket, limit_s: float) -> bytes:
    """A greeting, or what came of one within the time. Errors: ConnectionError when the peer closes and has said nothing."""
    got, due = b"", time.monotonic() + limit_s
    while len(got) < GREETING_BYTES and (left_s := due - time.monotonic()) > 0:
        s.settimeout(left_s)
        try:
            more = s.recv(GREETING_BYTES - len(got))
        except TimeoutError:
            break
        except OSError:
            more = b""
        if not more:
            if not got:
                raise ConnectionError
            break
        got += more
    return got


def _meaning(got: bytes) -> Finding:
    if not got:
        return Finding(Kind.SILENT)
    if got[0] == SIGNATURE[0] and len(got) >= len(SIGNATURE) and got[9] & 1:
        if len(got) < 32 or got[10] < 3:
            return Finding(Kind.FOREIGN, "speaks an old version of ZeroMQ's protocol")
        named = got[12:32].rstrip(b"\0").decode("ascii", "replace")
        if named not in (NULL, CURVE):
            return Finding(Kind.FOREIGN, f"speaks ZeroMQ's protocol with the security mechanism {named!r}")
        return Finding(Kind.ZEROMQ, named)
    if got.startswith(b"SSH-"):
        return Finding(Kind.FOREIGN, "answers as an SSH server")
    if got.startswith(b"HTTP/") or got.lstrip()[:1] == b"<":
        return Finding(Kind.FOREIGN, "answers as an HTTP server")
    if got[0] in (0x15, 0x16) and got[1:2] == b"\x03":
        return Finding(Kind.FOREIGN, "answers with TLS")
    return Finding(Kind.FOREIGN, f"answers {got[:16]!r}")
