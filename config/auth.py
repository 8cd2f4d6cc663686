"""Sockets with every limit set, and who may connect to them: CURVE with one key for the cluster.

Broker and workers share it, which is why it lies with the keys.
"""

from __future__ import annotations

import secrets
import socket
import tempfile
from pathlib import Path
from typing import Any

import zmq
import zmq.auth.thread

from config.keys import KeyPair, default_key_file, read_keys
from protocol import limits
from protocol.errors import ConfigError, Unavailable


class Allowed:
    """ZAP credentials: the one public key that may speak. Never raises: that would kill the authenticator's thread."""

    def __init__(self, public: bytes) -> None:
        self.public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return secrets.compare_digest(bytes(key), self.public)


def new_socket(context: zmq.Context[Any], kind: int, keys: KeyPair | None, server: bool) -> zmq.Socket[Any]:
    """A socket with every limit set; with CURVE when there are keys, enforced on the server's side."""
    s = context.socket(kind)
    for name, value in limits.SOCKET_OPTIONS.items():
        s.setsockopt(getattr(zmq, name), value)
    if keys is not None:
        s.curve_publickey, s.curve_secretkey = keys.public, keys.secret
        if server:
            s.zap_domain = limits.ZAP_DOMAIN.encode()
            s.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            s.curve_server = True
        else:
            s.curve_serverkey = keys.public
    if kind == zmq.ROUTER:
        s.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return s


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


def require_curve(context: zmq.Context[Any], keys: KeyPair) -> zmq.auth.thread.ThreadAuthenticator:
    """Start the handler that lets in the cluster's key and nothing else. Call before any CURVE socket is bound."""
    auth = zmq.auth.thread.ThreadAuthenticator(context)
    auth.start()
    auth.configure_curve_callback(domain=limits.ZAP_DOMAIN, credentials_provider=Allowed(keys.public))
    return auth


def socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A private folder for ipc sockets, whose paths may have little more than 100 bytes."""
    return tempfile.TemporaryDirectory(prefix="ggmq-", dir="/tmp" if len(tempfile.gettempdir()) > 70 else None)


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
