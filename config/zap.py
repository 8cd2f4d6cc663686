"""Answers ZeroMQ's question whether a handshake may end well (ZAP, RFC 27 of ZeroMQ). Whatever goes wrong here, the answer
is no, or there is none, which ZeroMQ takes for a no where ZAP_ENFORCE_DOMAIN is set."""

from __future__ import annotations

import contextlib
import secrets
import threading
from typing import Any

import zmq
from zmq.utils import z85

from config.allowed import Allowed
from protocol import limits
from protocol.errors import Unavailable

ENDPOINT = "inproc://zeromq.zap.01"
VERSION = b"1.0"
KEY_BYTES = 32
STOP_S = 2.0


class Authenticator:
    """A thread that lets in, by CURVE and in our domain, whose public key is allowed. The key is the connection's User-Id.

    Attributes:
        allowed: whom it asks.
    It ends with `stop`, or with the context. Errors: Unavailable when no socket can be opened.
    """

    def __init__(self, context: zmq.Context[Any], allowed: Allowed) -> None:
        self.allowed = allowed
        # of a shadow: whoever destroys the context does not close what the thread reads, but ends its waiting
        self._context: zmq.Context[Any] = zmq.Context.shadow(context.underlying)
        self._word = secrets.token_bytes(16)
        try:
            self._socket = self._context.socket(zmq.REP)
            self._socket.linger = 0
            self._socket.bind(ENDPOINT)
        except zmq.ZMQError as e:
            raise Unavailable(f"cannot check the keys of who connects: {e.strerror or e}") from None
        self._thread = threading.Thread(target=self._run, name="ggmq-zap", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                request = self._socket.recv_multipart()
                if request == [self._word]:
                    return
                self._socket.send_multipart(self._answer(request))
        except zmq.ContextTerminated:
            pass
        finally:
            self._socket.close()

    def _answer(self, request: list[bytes]) -> list[bytes]:
        user = b""
        with contextlib.suppress(Exception):  # a thread that ends here would let in nobody any more
            user = self._user(request)
        words = (b"200", b"OK") if user else (b"400", b"not allowed")
        return [VERSION, request[1] if len(request) > 1 else b"", *words, user, b""]

    def _user(self, request: list[bytes]) -> bytes:
        """Who is let in, as text; empty: nobody."""
        version, _, domain, address, _, mechanism, *credentials = request
        if (version, domain, mechanism) != (VERSION, limits.ZAP_DOMAIN.encode(), b"CURVE"):
            return b""
        (key,) = credentials
        public = z85.encode(key) if len(key) == KEY_BYTES else b""
        if public and self.allowed.lets_in(public.decode("ascii")):
            return public
        self.allowed.refused.append(address.decode("ascii", "replace"))
        return b""

    def stop(self) -> None:
        """End it. From then on nobody is let in."""
        if self._thread.is_alive():
            with contextlib.suppress(zmq.ZMQError):
                s = self._context.socket(zmq.REQ)
                try:
                    s.linger = 0
                    s.connect(ENDPOINT)
                    s.send(self._word, zmq.DONTWAIT)
                    self._thread.join(STOP_S)
                finally:
                    s.close()
