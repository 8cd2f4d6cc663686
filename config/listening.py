"""Bound sockets that strangers cannot wear out. Broker and workers share them, which is why they lie with the keys."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
import time
from collections.abc import Collection, Iterator
from typing import Any

import zmq

from config.allowed import Allowed
from config.auth import bound_endpoint, close_monitored, happening, monitor_of, new_socket
from config.descriptors import borrowed, descriptor_limit, open_descriptors
from config.door import Door
from config.keys import KeyPair
from config.memory import give_back_free_memory
from config.reaching import Happening
from config.roles import ANYBODY, Caller
from protocol import limits
from protocol.errors import ConfigError, GgmqError, Unavailable, VersionError

SILENT_S, N_SILENT = 60, 4096
"""For so long, and so many at once (of Linux 4096 at most), the system keeps connections over which nothing came."""
PROOF_S = 10.0
"""Within this time a wrong key is refused, or nothing listens. It takes some milliseconds."""
N_LOOKED_AT = 32
"""Descriptors that are looked at in one go."""
N_SENT_AWAY, SHUT_S = 8, 0.15
"""When more are cut off in one look because they have said nothing, no new connection is heard of for so long."""
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
"""Linux' numbers, in asm-generic/socket.h; Python has no names for them."""
_DROP_ALL = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))
"""A socket filter of one instruction: return 0, nothing of the packet (BPF_RET | BPF_K)."""
WATCHING_S = 0.002
"""Between one go and the next, until all have been looked at."""
N_TRIMS = 20
"""Looks after a cut at which free memory is given back: a second or two."""
TCPI_BYTES_RECEIVED = 128
"""Offset of that field in Linux' struct tcp_info (RFC 4898's tcpEStatsAppHCThruOctetsReceived)."""


class Listener:
    """A bound ROUTER that strangers cannot wear out.

    libzmq takes any number of connections, and any number of frames for one message. So the system keeps those that say
    nothing to itself (TCP_DEFER_ACCEPT, where there is such: a peer of ours speaks at once), and from time to time `guard`
    looks at the connections themselves: it cuts off who has sent too much without completing a message, and, when file
    descriptors are about to run out, whoever has said nothing yet. For a moment after that nobody is heard who knocks
    (a socket filter, where there is such), so that those who come again at once do so at the pace of TCP.

    Who is refused for its key, or for its version, is named on standard error, in a line that begins with `who`; never when
    that is empty.

    Attributes:
        endpoint: what it is bound to, with its real port.
    Errors: ConfigError where it cannot be bound.
    Threads: use from one.
    """

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, allowed: Allowed | None, advice: str,
        max_bytes: int = limits.MAX_REQUEST_BYTES, who: str = "worker",
    ) -> None:  # fmt: skip
        """allowed: who may speak, as the context's Authenticator knows it; None: anybody."""
        keys = allowed.keys if allowed is not None else None
        self._allowed = allowed
        self.socket = new_socket(context, zmq.ROUTER, keys, server=True)
        self.socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        self.socket.setsockopt(zmq.BACKLOG, N_SILENT)
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as e:
            self.socket.close()
            raise ConfigError(f"{endpoint}: cannot listen: {e.strerror or e}; {advice}") from None
        self.endpoint = endpoint if endpoint.startswith("inproc") else bound_endpoint(self.socket)
        self._port = int(self.endpoint.rsplit(":", 1)[1]) if self.endpoint.startswith("tcp://") else 0
        self._knocks = _listening_socket(self._port)
        if self._knocks is not None:
            _accept_who_speaks(self._knocks)
        try:
            if keys is not None:
                prove_refusal(context, self.endpoint, keys)
        except GgmqError:
            self.socket.close()
            raise
        self._door = Door(context, self.socket, allowed, who) if endpoint.startswith("tcp://") and who else None
        self._n_trims = 0
        self._heard: dict[int, tuple[int, str]] = {}
        self._known: dict[tuple[int, int], tuple[int, int, str]] = {}
        self._look: Iterator[bool] | None = None
        self._n_sent_away, self._shut_until_s = 0, 0.0

    def heard(self, frame: zmq.Frame, whole_bytes: int = limits.MAX_REQUEST_BYTES) -> Caller | None:
        """A message came complete: one of its frames tells over which connection. The next there may have `whole_bytes`.

        Returns: who sent it; None: whose key is not allowed any more, and nothing of the message may be looked at.
        """
        key, caller = "", ANYBODY if self._allowed is None else None
        if self._allowed is not None:
            with contextlib.suppress(zmq.ZMQError):  # nobody vouched for it
                key = str(frame.get("User-Id"))
                caller = self._allowed.caller(key)
        if self._port:
            self._heard[int(frame.get(zmq.SRCFD))] = whole_bytes, key
        return caller

    def refused(self, frame: zmq.Frame, error: GgmqError) -> None:
        """Say that a message could not be read, if that is for its sender's version. `frame`: one of the message."""
        if self._door is not None and isinstance(error, VersionError):
            with contextlib.suppress(zmq.ZMQError):  # no address: its connection is gone
                self._door.say(str(frame.get("Peer-Address")), str(error))

    def cut(self, frame: zmq.Frame) -> None:
        """Close the connection over which a message came; nothing where that is a path."""
        if self._port:
            # no descriptor: it is closed already, and another host's if it is in use again
            with contextlib.suppress(OSError, zmq.ZMQError), borrowed(int(frame.get(zmq.SRCFD))) as s:
                if _is_at(s, self._port) and s.getpeername()[0] == frame.get("Peer-Address"):
                    s.shutdown(socket.SHUT_RDWR)

    def guard(self) -> bool:
        """Look at some of the connections, and cut off whose key is not allowed any more. Takes less than a millisecond, so
        that a crowd holds nobody up; call it often, after everything that has come was read.

        Returns: whether more are to be looked at before all have been.
        """
        if not self._port:
            return False
        if self._shut_until_s and time.monotonic() >= self._shut_until_s:
            self._hear_who_knocks(True)
        if self._look is None:
            self._look = self._looked()
        if next(self._look, False):
            return True
        self._look = None
        if self._n_sent_away > N_SENT_AWAY:
            self._hear_who_knocks(False)
        self._n_sent_away = 0
        return False

    def _hear_who_knocks(self, heard: bool) -> None:
        """Have the system answer new connections, or drop what they say."""
        if self._knocks is None:
            return
        self._shut_until_s = 0.0 if heard else time.monotonic() + SHUT_S
        with contextlib.suppress(OSError), borrowed(self._knocks) as s:
            if heard:
                s.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
            else:
                s.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(_DROP_ALL)))

    def _looked(self) -> Iterator[bool]:
        """All connections, one after the other, with a pause (True) after some."""
        descriptors, heard_before = open_descriptors(), set(self._heard)
        scarce = len(descriptors) > descriptor_limit() - limits.RESERVED_DESCRIPTORS
        read_all = not self.socket.poll(0)
        known: dict[tuple[int, int], tuple[int, int, str]] = {}
        for i, fd in enumerate(descriptors, 1):
            with contextlib.suppress(OSError):
                status = os.fstat(fd)
                if stat.S_ISSOCK(status.st_mode):
                    self._look_at(fd, status.st_ino, scarce, read_all, known)
            if not i % N_LOOKED_AT:
                yield True
                read_all = not self.socket.poll(0)
        self._known = known
        for fd in heard_before:
            self._heard.pop(fd, None)
        if self._n_trims:  # libzmq drops what it had of the message in its own time
            self._n_trims -= 1
            give_back_free_memory()

    def _look_at(
        self, fd: int, inode: int, scarce: bool, read_all: bool, known: dict[tuple[int, int], tuple[int, int, str]]
    ) -> None:
        """Note in `known` what was heard over a connection, or cut it off. Errors: OSError when it is none of ours."""
        with borrowed(fd) as s:
            received = self._received_bytes(s)
            heard = self._heard.pop(fd, None)
            before = (received, *heard) if heard is not None else self._known.get((fd, inode))
            if before is not None:
                known[fd, inode] = before
            since, whole, public = before or (0, limits.MAX_REQUEST_BYTES, "")
            too_much = read_all and received - since > whole
            removed = public and self._allowed is not None and self._allowed.caller(public) is None
            if too_much or removed or (scarce and before is None):
                self._n_sent_away += scarce and before is None
                self._n_trims = N_TRIMS if too_much else self._n_trims
                s.shutdown(socket.SHUT_RDWR)

    def _received_bytes(self, s: socket.socket) -> int:
        """What came over one of our connections. Errors: OSError when it is none of them."""
        if not _is_at(s, self._port):
            raise OSError("another socket of this process")
        s.getpeername()  # the listening one has none
        return int(struct.unpack_from("<Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), TCPI_BYTES_RECEIVED)[0])

    def close(self) -> None:
        self.socket.close()


def _is_at(s: socket.socket, port: int) -> bool:
    """Whether a socket has our side of its connection, or listens, at a port."""
    return s.family in (socket.AF_INET, socket.AF_INET6) and s.getsockname()[1] == port


def _listening_socket(port: int) -> int | None:
    """The descriptor with which this process listens on a port; None where the system does not tell."""
    for fd in open_descriptors() if port else ():
        with contextlib.suppress(OSError, AttributeError), borrowed(fd) as s:
            if _is_at(s, port) and s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return fd
    return None


def _accept_who_speaks(fd: int) -> None:
    """Have connections accepted when their first bytes have come, where the system can."""
    with contextlib.suppress(OSError, AttributeError), borrowed(fd) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, SILENT_S)


def prove_refusal(context: zmq.Context[Any], endpoint: str, keys: KeyPair) -> None:
    """Knock at a socket that was just bound, with a fresh key. ZeroMQ alone lets in anyone who knows the public key when
    one option is forgotten.

    Errors: ConfigError when the key is let in, or nobody refuses it; Unavailable when no socket can be opened.
    """
    public, secret = zmq.curve_keypair()
    s = new_socket(context, zmq.DEALER, KeyPair(public, secret), server=False, other=keys.public)
    try:
        monitor = monitor_of(s)
    except zmq.ZMQError as e:
        s.close()
        raise Unavailable(f"{endpoint}: cannot try whether a wrong key is refused: {e.strerror or e}") from None
    what: Happening | None = None
    try:
        s.connect(endpoint.replace("//0.0.0.0:", "//127.0.0.1:"))
        due = time.monotonic() + PROOF_S
        while what not in (Happening.DENIED, Happening.SHAKEN):
            left_s = due - time.monotonic()
            if left_s <= 0 or not monitor.poll(int(1000 * left_s) + 1):
                break
            what = happening(monitor.recv_multipart())
    finally:
        close_monitored(s, monitor)
    if what is not Happening.DENIED:
        got = "it was let in" if what is Happening.SHAKEN else f"nobody refused it within {PROOF_S:.0f} s"
        raise ConfigError(f"{endpoint}: expected a key that is not allowed to be refused, tried one, and {got}; this socket "
                          "protects nothing, so it is closed again")  # fmt: skip


class Watch:
    """From time to time has listeners look at who is connected to them, and at some more until all have been looked at.

    Attributes: wait_s: for so long nothing is to be looked at.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s, self._begun_s, self._left = every_s, -every_s, list[Listener]()

    @property
    def wait_s(self) -> float:
        return min(WATCHING_S, self._every_s) if self._left else self._every_s

    def look(self, listeners: Collection[Listener]) -> None:
        now = time.monotonic()
        if not self._left and now - self._begun_s >= self._every_s:
            self._begun_s, self._left = now, list(listeners)
        self._left = [listener for listener in self._left if listener.guard()]
