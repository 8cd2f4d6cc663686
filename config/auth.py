"""Sockets with every limit set, with CURVE where there are keys. All sides share them: so they lie with the keys."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq

from config.keys import KeyPair, default_key_file, read_keys
from config.reaching import Happening
from protocol import limits
from protocol.errors import ConfigError, Unavailable


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
