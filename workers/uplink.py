"""The broker that a worker dialled: two channels to it, and what is done when it cannot be reached or has gone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import zmq
from msgspec import structs

from config.auth import close_monitored, monitor_of
from config.reaching import Happening, Reaching
from config.stuck import Stuck, Way
from config.terminal import print_line
from protocol import limits
from protocol import messages as m
from protocol.errors import ConfigError, GgmqError
from protocol.frames import Message, encode
from protocol.messages import Command
from workers.sockets import Sockets

QUIET_S = 2.0
"""A broker that says nothing for so long may be reached by another connection."""
REFUSED_REDIAL_S = 5.0
"""So often a worker tries whose broker has another key, another version, or is none: somebody must change that first."""


class Uplink:
    """Attributes:
    control, bulk: routing ids that we give to its two channels.
    channels: both sockets, while there are any, with these ids.
    monitor: tells what becomes of the connection.
    reaching: finds out why there is no answer, until there is one.
    token: names the broker that answered.
    redial_s: when to connect anew; 0: no need.
    said: what was last printed of it.
    """

    def __init__(
        self, endpoint: str, sockets: Sockets, hello: Callable[[str], m.Hello], closed: Callable[[bytes, float], None]
    ) -> None:
        """hello: what we say in a role. closed: told the token of a broker whose connection is closed, and when."""
        self.endpoint = endpoint
        self._sockets, self._hello, self._closed = sockets, hello, closed
        self.control = self.bulk = self.token = b""
        self.channels: dict[zmq.Socket[Any], bytes] = {}
        self.monitor: zmq.Socket[Any] | None = None
        self.reaching: Reaching | None = None
        self.redial_s = 0.0
        self.said = ""
        self._n_channels = self._n_dials = 0
        self._stuck: Stuck | None = None

    def dial(self, now_s: float) -> None:
        """Connect, control and bulk, and say HELLO.

        Errors: ConfigError for an endpoint that is none, Unavailable when no socket can be opened.
        """
        self._n_dials += 1
        self.control = self._channel("worker")
        self.bulk = self._channel("worker-bulk")
        keys = self._sockets.keys_for(self.endpoint)
        self.reaching = Reaching(self.endpoint, keys, "broker", now_s, limits.RECONNECT_S)
        self.redial_s = 0.0

    def _channel(self, role: str) -> bytes:
        s = self._sockets.dealer(self.endpoint)
        if role == "worker":
            self.monitor = monitor_of(s)
            self._sockets.add(self.monitor)
        self._sockets.add(s)
        try:
            s.connect(self.endpoint)
        except zmq.ZMQError as e:
            raise ConfigError(f"--broker {self.endpoint}: expected an endpoint such as tcp://HOST:5555; {e}") from None
        self._n_channels += 1
        rid = self.channels[s] = b"dial" + self._n_channels.to_bytes(8)
        with contextlib.suppress(zmq.Again):  # ZeroMQ has given the connection up already: that is found out beside
            hello = structs.replace(self._hello(role), session=self._n_dials)
            s.send_multipart(encode(Message(Command.HELLO, hello)), zmq.DONTWAIT)
        return rid

    def answered(self, token: bytes) -> bytes:
        """A broker has said HELLO. Returns: the token of the one that was there before, if that was another."""
        before = self.token
        self.token, self.said, self.reaching = token, "", None
        return before if before != token else b""

    def hang_up(self, reason: str, now_s: float, wait_s: float = limits.REDIAL_S) -> None:
        """The broker has gone, or does not know us: connect anew, so that nothing old is on its way."""
        if self.redial_s:
            return
        if reason != self.said:
            print_line(f"worker: broker {self.endpoint}: {reason}; dialling again", file=sys.stderr)
        self.said, self.redial_s = reason, now_s + wait_s
        self._closed(self.token, now_s)
        control = next((s for s, rid in self.channels.items() if rid == self.control), None)
        if self.monitor is not None and control is not None:
            self._sockets.forget(self.monitor)
            self._sockets.forget(control)
            close_monitored(control, self.monitor)
            del self.channels[control]
        for s in self.channels:
            self._sockets.remove(s)
        self.channels.clear()
        self.monitor = self.reaching = None

    def refused(self, reason: str, now_s: float) -> None:
        """As `hang_up`, where nothing will change by itself."""
        self.hang_up(reason, now_s, REFUSED_REDIAL_S)

    def monitored(self, what: Happening, now_s: float) -> None:
        """What became of the connection."""
        if what is Happening.LOST and (self.reaching is None or self.reaching.shaken):  # HELLO went with it
            self.hang_up("it closed the connection, or was stopped or killed", now_s)
        elif self.reaching is not None:
            self.reaching.happened(what, now_s)

    def quiet(self, for_s: float, now_s: float) -> None:
        """The broker has said nothing for so long; while it is well it asks several times a second."""
        if for_s < QUIET_S or self.redial_s or self.reaching is not None:
            self._stuck = None
            return
        if self._stuck is None:
            self._stuck = Stuck(self.endpoint, self._sockets.keys_for(self.endpoint), now_s)
        if self._stuck.look(now_s) is not Way.UNKNOWN:
            self.hang_up(f"it says nothing for {for_s:.0f} s over this connection", now_s, 0.01)

    def look(self, now_s: float) -> None:
        """Say why the broker is not reached, and dial it afresh: ZeroMQ does not after some refusals, nor looks names up."""
        reaching = self.reaching
        reason = reaching.reason(now_s) if reaching is not None else ""
        if reaching is not None and reason and not reaching.asleep(now_s):
            self.hang_up(reason, now_s, REFUSED_REDIAL_S if reaching.shut else limits.REDIAL_S)
        elif reason and reason != self.said:
            self.said = reason
            print_line(f"worker: broker {self.endpoint}: {reason}; waiting for it", file=sys.stderr)
        if self.redial_s and now_s >= self.redial_s:
            try:
                self.dial(now_s)
            except GgmqError as e:
                self.redial_s = 0.0
                self.hang_up(str(e), now_s)
