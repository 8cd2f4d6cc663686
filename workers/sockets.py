"""The sockets of a worker: those that listen, those that are connected, and what is to be known before either is opened."""

from __future__ import annotations

from typing import Any

import zmq

from config.allowed import Allowed
from config.auth import new_socket
from config.keys import KeyPair
from config.listening import Listener, Watch
from config.zap import Authenticator

GUARD_S = 0.05
"""So often listeners look at who is connected to them."""


class Sockets:
    """Attributes:
    allowed: whose keys are let in.
    listeners: by their sockets.
    quiet: strangers that are refused are not named: standard error is that of a program that people look at.
    """

    def __init__(self, keys: KeyPair | None, quiet: bool) -> None:
        self.keys, self.quiet = keys, quiet
        self.allowed = Allowed(keys) if keys is not None else None
        self.context: zmq.Context[Any] = zmq.Context()
        self.poller = zmq.Poller()
        self.listeners: dict[zmq.Socket[Any], Listener] = {}
        self._open: list[zmq.Socket[Any]] = []
        self._auth: Authenticator | None = None
        self._watch = Watch(GUARD_S)

    def keys_for(self, endpoint: str) -> KeyPair | None:
        """A path of this host is guarded by its folder's mode."""
        return self.keys if endpoint.startswith("tcp://") else None

    def bind(self, endpoint: str) -> Listener:
        """Listen. Errors: ConfigError when the endpoint cannot be bound, or a wrong key is not refused there."""
        allowed = self.allowed if self.keys_for(endpoint) is not None else None
        if allowed is not None and self._auth is None:
            self._auth = Authenticator(self.context, allowed)
        advice = "is another worker on this port? Choose another with -p"
        listener = Listener(self.context, endpoint, allowed, advice, who="" if self.quiet else "worker")
        self.listeners[listener.socket] = listener
        self.add(listener.socket)
        return listener

    def dealer(self, endpoint: str, other: bytes = b"") -> zmq.Socket[Any]:
        """A DEALER that may be connected there; whoever asked adds it. `other`: the public key of who listens there, if that
        is not the cluster's. Errors: Unavailable when none can be opened."""
        return new_socket(self.context, zmq.DEALER, self.keys_for(endpoint), server=False, other=other)

    def add(self, s: zmq.Socket[Any]) -> None:
        """Look at it from now on."""
        self._open.append(s)
        self.poller.register(s, zmq.POLLIN)

    def forget(self, s: zmq.Socket[Any]) -> None:
        """Look at it no more."""
        self._open.remove(s)
        self.poller.unregister(s)

    def remove(self, s: zmq.Socket[Any]) -> None:
        """Close it."""
        self.forget(s)
        s.close()

    def guard(self) -> None:
        """Have listeners look at who is connected, when it is time, and at some at once."""
        self._watch.look(self.listeners.values())

    @property
    def wait_s(self) -> float:
        """For so long nothing is to be looked at."""
        return self._watch.wait_s

    def close(self, linger_ms: int = 0) -> None:
        """Close all. What is still to be sent is waited for so long."""
        if self._auth is not None:
            self._auth.stop()
        for s in self._open:
            s.close(linger=linger_ms)
        self.context.destroy(linger=linger_ms)
