"""Sockets with every limit set, and who may connect to them, by CURVE. Who is refused is named.

Broker and workers share it, which is why it lies with the keys.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import zmq

from config.allowed import Allowed
from config.keys import KeyPair, default_key_file, read_keys
from config.reaching import Happening
from config.refusals import Refusals
from config.roles import ANYBODY, Caller
from config.terminal import print_line
from protocol import limits
from protocol.errors import ConfigError, GgmqError, Unavailable, VersionError


def new_socket(
    context: zmq.Context[Any], kind: int, keys: KeyPair | None, server: bool, other: bytes = b""
) -> zmq.Socket[Any]:
    """A socket with every limit set; with CURVE when there are keys, enforced on the server's side.

    other: the public key that the other side must prove to have, if it is not the cluster's.
    Errors: Unavailable when this process may open no more, or `other` is no key.
    """
    try:
        s = context.socket(kind)
    except zmq.ZMQError as e:
        raise Unavailable(f"cannot open a socket: {e.strerror or e}; raise the limit of open files (ulimit -n)") from None
    for name, value in limits.SOCKET_OPTIONS.items():
        s.setsockopt(getattr(zmq, name), value)
    if keys is not None:
        s.curve_publickey, s.curve_secretkey = keys.public, keys.secret
        if server:
            s.zap_domain = limits.ZAP_DOMAIN.encode()
            s.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            s.curve_server = True
        else:
            try:
                s.curve_serverkey = other or keys.server
            except zmq.ZMQError:
                s.close()
                raise Unavailable(f"expected the public key of the other side, got {other!r}") from None
    if kind == zmq.ROUTER:
        s.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return s


_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_DIALLING = (zmq.EVENT_CONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
             | _FAILED)  # fmt: skip
_LISTENING = (zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
              | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH)  # fmt: skip


def monitor_of(s: zmq.Socket[Any]) -> zmq.Socket[Any]:
    """A socket on which comes what becomes of a connection that `s` is about to make; read it with `happening`."""
    return s.get_monitor_socket(_DIALLING)


def close_monitored(s: zmq.Socket[Any], monitor: zmq.Socket[Any]) -> None:
    """Close both. The monitor is taken off first: ZeroMQ waits for ever to tell one that is closed."""
    s.disable_monitor()
    monitor.close(linger=0)
    s.close(linger=0)


def happening(frames: Sequence[bytes]) -> Happening:
    """What a message of a monitor says."""
    event, value = struct.unpack("=hi", frames[0])
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        return Happening.LATE if value in (errno.EAGAIN, errno.ETIMEDOUT) else Happening.CLOSED
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        return Happening.MISMATCHED if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH else Happening.STRANGE
    return {int(zmq.EVENT_CONNECTED): Happening.CONNECTED, int(zmq.EVENT_CONNECT_RETRIED): Happening.RETRIED,
            int(zmq.EVENT_HANDSHAKE_SUCCEEDED): Happening.SHAKEN, int(zmq.EVENT_DISCONNECTED): Happening.LOST,
            int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): Happening.DENIED}[event]  # fmt: skip


def bound_endpoint(s: zmq.Socket[Any]) -> str:
    """What a socket was bound to, with its real port."""
    raw = s.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(raw, bytes)  # libzmq's type for this option
    return raw.rstrip(b"\0").decode()


def local_address(endpoint: str) -> str:
    """This host as it appears to an endpoint: `tcp://ADDRESS` without a port, or the endpoint itself if it is a path.

    Errors: Unavailable when there is no way there.
    """
    if not endpoint.startswith("tcp://"):
        return endpoint
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, proto) as s:
            s.connect(where)  # of a datagram socket: picks the route, sends nothing
            address = s.getsockname()[0]
    except (OSError, ValueError) as e:
        raise Unavailable(f"{endpoint}: no address of this host leads there: {e}") from None
    return f"tcp://[{address}]" if ":" in address else f"tcp://{address}"


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


class Listener:
    """A bound ROUTER that strangers cannot wear out.

    libzmq takes any number of connections, and any number of frames for one message. So the system keeps those that say
    nothing to itself (TCP_DEFER_ACCEPT, where there is such: a peer of ours speaks at once), and from time to time `guard`
    looks at the connections themselves: it cuts off who has sent too much without completing a message, and, when file
    descriptors are about to run out, whoever has said nothing yet.

    Who is refused for its key, or for its version, is named on standard error, in a line that begins with `who`; never when
    that is empty.

    Attributes:
        endpoint: what it is bound to, with its real port.
        n_cut: connections that were cut off.
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
        if self._port:
            _accept_who_speaks(self._port)
        try:
            if keys is not None:
                prove_refusal(context, self.endpoint, keys)
        except GgmqError:
            self.socket.close()
            raise
        self._door = _Door(context, self.socket, keys, who) if endpoint.startswith("tcp://") and who else None
        self.n_cut = self._n_trims = 0
        self._heard: dict[int, tuple[int, str]] = {}
        self._known: dict[tuple[int, int], tuple[int, int, str]] = {}
        self._look: Iterator[bool] | None = None

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

    def guard(self) -> bool:
        """Look at some of the connections, and cut off whose key is not allowed any more. Takes less than a millisecond, so
        that a crowd holds nobody up; call it often, after everything that has come was read.

        Returns: whether more are to be looked at before all have been.
        """
        if not self._port:
            return False
        if self._look is None:
            self._look = self._looked()
        if next(self._look, False):
            return True
        self._look = None
        return False

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
        with _borrowed(fd) as s:
            received = self._received_bytes(s)
            heard = self._heard.pop(fd, None)
            before = (received, *heard) if heard is not None else self._known.get((fd, inode))
            if before is not None:
                known[fd, inode] = before
            since, whole, public = before or (0, limits.MAX_REQUEST_BYTES, "")
            too_much = read_all and received - since > whole
            removed = public and self._allowed is not None and self._allowed.caller(public) is None
            if too_much or removed or (scarce and before is None):
                self.n_cut += 1
                self._n_trims = N_TRIMS if too_much else self._n_trims
                s.shutdown(socket.SHUT_RDWR)

    def _received_bytes(self, s: socket.socket) -> int:
        """What came over one of our connections. Errors: OSError when it is none of them."""
        if s.family not in (socket.AF_INET, socket.AF_INET6) or s.getsockname()[1] != self._port:
            raise OSError("another socket of this process")
        s.getpeername()  # the listening one has none
        return int(struct.unpack_from("<Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), TCPI_BYTES_RECEIVED)[0])

    def close(self) -> None:
        self.socket.close()


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """A socket of this process that others hold, and go on holding. Errors: OSError when it is none."""
    s = socket.socket(fileno=fd)
    try:
        yield s
    finally:
        s.detach()


def _accept_who_speaks(port: int) -> None:
    """Have connections to a port on which this process listens accepted when their first bytes have come."""
    for fd in open_descriptors():
        # none of ours, or a system without the option
        with contextlib.suppress(OSError, AttributeError), _borrowed(fd) as s:
            inet = s.family in (socket.AF_INET, socket.AF_INET6) and s.getsockname()[1] == port
            if inet and s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, SILENT_S)


class _Door:
    """Names the peers whose handshake with a listening socket fails.

    ZeroMQ tells of a failure without an address, and of a connection with a file descriptor that may be another's soon. So a
    thread waits for nothing else, and looks up the address as a connection begins. Of one that was gone sooner it waits a
    little for another try of the same peer (a ggmq one tries again slowly, see `config.probe`). It ends with the socket or
    the context.
    """

    def __init__(self, context: zmq.Context[Any], s: zmq.Socket[Any], keys: KeyPair | None, who: str) -> None:
        self.who, self.keys = who, keys
        self._refusals, self._lock = Refusals(), threading.Lock()
        name = f"inproc://door-{secrets.token_hex(8)}"
        s.monitor(name, _LISTENING)
        # of a shadow: whoever destroys the context does not close what the thread reads, but ends its waiting
        self._events: zmq.Socket[Any] = zmq.Context.shadow(context.underlying).socket(zmq.PAIR)
        self._events.setsockopt(zmq.RCVHWM, N_EVENTS)
        self._events.connect(name)
        threading.Thread(target=self._watch, name="ggmq-door", daemon=True).start()

    def say(self, address: str, reason: str) -> None:
        """Threads: any."""
        with self._lock:
            line = self._refusals.line(address, reason, time.monotonic())
        if line:
            print_line(f"{self.who}: {line}", file=sys.stderr)

    def _watch(self) -> None:
        addresses: dict[int, str] = {}
        reason, n_looked_up, since_s = "", 0, 0.0
        unnamed, due_s = "", 0.0
        try:
            while True:
                left_s = due_s - time.monotonic()
                if unnamed and (left_s <= 0 or not self._events.poll(int(1000 * left_s) + 1)):
                    self.say("", unnamed)
                    unnamed = ""
                event, value = struct.unpack("=hi", self._events.recv())
                self._events.recv()  # the address on which we listen
                if event == zmq.EVENT_ACCEPTED:
                    now = time.monotonic()
                    if now - since_s > 1:
                        n_looked_up, since_s = 0, now
                    n_looked_up += 1
                    addresses[value] = _peer_of(value) if n_looked_up <= N_LOOKED_UP else ""
                elif event == zmq.EVENT_DISCONNECTED:  # one thread of ZeroMQ tells all: this is the one that failed
                    address = addresses.pop(value, "")
                    if reason and address:
                        self.say(address, reason)
                        unnamed = ""
                    elif reason and not unnamed:
                        unnamed, due_s = reason, time.monotonic() + NAMED_LATER_S
                    reason = ""
                elif event == zmq.EVENT_MONITOR_STOPPED:
                    return
                else:
                    reason = self._reason(event, value)
        except zmq.ContextTerminated:
            pass
        finally:
            self._events.close(linger=0)

    def _reason(self, event: int, value: int) -> str:
        """Why a handshake failed. That a peer only went away is not told: scanners, and those who look who is there, do."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return "its key is none that this cluster lets in, or was removed; see `ggmq keys list` on the main host"
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            if self.keys is not None:
                return "it uses no cluster key; copy the key file to it, and leave --insecure out there"
            return f"it uses a cluster key, and this {self.who.rpartition(' ')[2]} runs without one"
        if value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
            return "it has another cluster key; copy the key file to it again"
        return "it speaks ZeroMQ's protocol in another way than ggmq"


def _peer_of(fd: int) -> str:
    """The address at the other end of a connection of this process; empty when it is closed already."""
    with contextlib.suppress(OSError), _borrowed(fd) as s:
        return str(s.getpeername()[0])
    return ""


def give_back_free_memory() -> None:
    """Have the C library return to the system what was freed; nothing where it has no such function (glibc has)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


SILENT_S, N_SILENT = 60, 4096
"""For so long, and so many at once (of Linux 4096 at most), the system keeps connections over which nothing came."""
PROOF_S = 10.0
"""Within this time a wrong key is refused, or nothing listens. It takes some milliseconds."""
N_EVENTS = 20_000
"""What ZeroMQ may have to tell of connections before it waits for the thread that listens."""
NAMED_LATER_S = 2.0
"""For so long a peer whose address is not known may come again and be named."""
N_LOOKED_UP = 100
"""Addresses that are looked up in a second: a crowd of strangers shall not take a worker's time."""
N_LOOKED_AT = 32
"""Descriptors that are looked at in one go."""
N_TRIMS = 20
"""Looks after a cut at which free memory is given back: a second or two."""
TCPI_BYTES_RECEIVED = 128
"""Offset of that field in Linux' struct tcp_info (RFC 4898's tcpEStatsAppHCThruOctetsReceived)."""


def open_descriptors() -> list[int]:
    """File descriptors of this process; none where the system does not tell."""
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError as e:  # to look takes one too: where all are in use they are known without
        return list(range(min(descriptor_limit(), 1 << 16))) if e.errno == errno.EMFILE else []


def descriptor_limit() -> int:
    """How many there may be."""
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError):
        return 1 << 30
    return soft if soft != resource.RLIM_INFINITY else 1 << 30


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as its host allows it, up to some thousands."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A private folder for ipc sockets, whose paths may have little more than 100 bytes. Its name tells whose it is: those
    of processes that were killed are removed here."""
    parent = "/tmp" if len(tempfile.gettempdir()) > 70 else tempfile.gettempdir()
    for path in Path(parent).glob("ggmq-*-*"):
        owner = re.fullmatch(r"ggmq-(\d+)-\w+", path.name)
        with contextlib.suppress(OSError):
            if owner is not None and path.stat().st_uid == os.getuid() and not _runs(int(owner[1])):
                shutil.rmtree(path, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"ggmq-{os.getpid()}-", dir=parent)


def remove_socket_folder(endpoint: str) -> None:
    """What the process that made an ipc endpoint's folder would have done, had it not been killed."""
    folder = Path(endpoint.removeprefix("ipc://")).parent
    if endpoint.startswith("ipc://") and folder.name.startswith("ggmq-"):
        shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def new_keys() -> KeyPair:
    """A fresh pair from libzmq's generator."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public, secret)


def find_keys(path: Path | None, insecure: bool) -> KeyPair | None:
    """The keys to use: the file named, else the default file if there is one, else none. None when `insecure`.

    Errors: ConfigError when the file holds no pair, or two keys that do not belong together.
    """
    if insecure:
        return None
    if path is None:
        path = default_key_file()
        if not path.exists():
            return None
    keys = read_keys(path)
    if zmq.curve_public(keys.secret) != keys.public:
        raise ConfigError(f"{path}: expected the public key that belongs to the secret one, got another; "
                          "copy the file again from the main host")  # fmt: skip
    return keys
