"""Why a broker or worker that was dialled does not answer: one reason for each cause.

ZeroMQ tells what becomes of the connection and keeps trying; when that looks bad, `config.probe` asks who is there. The two
together make the reason. What may pass by itself (a process that is just being started, a host that wakes) is given time.
"""

from __future__ import annotations

import contextlib
import threading
from enum import Enum, auto

from config.keys import KeyPair
from config.probe import CURVE, NOT_REACHED, NULL, Finding, Kind, address_of, probe

REFUSED_S = 3.0
"""For so long a port where nothing listens may be one of a process that is just being started."""
QUIET_S = 1.0
"""Who takes a connection and says nothing for so long is asleep, or another program."""
MUTE_S = 2.0
"""The same after the handshake: whoever computes may be late with its HELLO."""
RECHECK_S = 3.0
N_CLOSED = 3
"""Handshakes that the peer must end before its key is known to be another: one may be that of a process that ended."""


class Happening(Enum):
    """What ZeroMQ tells of a connection. LOST follows whatever ended it, too."""

    RETRIED = auto()
    CONNECTED = auto()
    SHAKEN = auto()
    CLOSED = auto()
    LATE = auto()
    MISMATCHED = auto()
    DENIED = auto()
    STRANGE = auto()
    LOST = auto()



class Reaching:
    """One attempt to reach an endpoint, from the moment it is dialled.

    Attributes:
        what: whom the endpoint should lead to, "worker" or "broker".
        shaken: the handshake went well, and the connection is there.
        n_shaken: how often it did. What was sent over a connection that is gone is gone too.
        known: the reason, where whoever dials has heard it from the peer.
    Threads: use from one. Probes run in threads of their own, one at a time, which end by themselves.
    """

    def __init__(self, endpoint: str, keys: KeyPair | None, what: str, now_s: float, patience_s: float) -> None:
        self.what, self.keys = what, keys
        self.host, self.port = address_of(endpoint)
        self.shaken, self.n_shaken = False, 0
        self.known = ""
        self._dialled_s, self._patience_s = now_s, patience_s
        self._ask_s = now_s + QUIET_S
        self._asked_s = float("-inf")
        self._open_s: float | None = None
        self._quiet = self._denied = self._strange = False
        self._n_closed = 0
        self._finding: Finding | None = None
        self._thread: threading.Thread | None = None
        self._answer: list[Finding] = []

    def happened(self, what: Happening, now_s: float) -> None:
        """Take in what became of the connection."""
        if what is Happening.CONNECTED:
            self._open_s, self._ask_s = now_s, now_s + QUIET_S
            if self._finding is not None and self._finding.kind in NOT_REACHED:
                self._finding = None
            return
        if what is Happening.SHAKEN:
            self.shaken, self._finding, self._ask_s, self._n_closed = True, None, now_s + MUTE_S, 0
            self.n_shaken += 1
            return
        if self._open_s is not None:
            self._quiet, self._open_s = now_s - self._open_s > QUIET_S, None
        self.shaken = False
        self._denied |= what is Happening.DENIED
        self._strange |= what is Happening.STRANGE
        self._n_closed += what is Happening.CLOSED
        self._ask_s = min(self._ask_s, max(now_s, self._asked_s + RECHECK_S))

    @property
    def shut(self) -> bool:
        """Whether somebody answers and will have none of us: it takes somebody to change that."""
        found = self._finding
        return bool(self.known or self._denied or self._strange or (found is not None and found.kind is Kind.FOREIGN)
                    or (found is not None and found.kind is Kind.ZEROMQ and not self._silent_after_greeting()))  # fmt: skip

    def asleep(self, now_s: float) -> bool:
        """Whether somebody is there who takes connections and says nothing, and nothing better is known of it."""
        if self.known or self._denied or self._strange:
            return False
        if self._finding is not None and self._finding.kind is not Kind.SILENT and not self._silent_after_greeting():
            return False
        return self._quiet or (self._open_s is not None and now_s - self._open_s > QUIET_S)

    def _silent_after_greeting(self) -> bool:
        return (self._finding is not None and self._finding.kind is Kind.ZEROMQ
                and (self.shaken or not self._other_security()))  # fmt: skip

    def reason(self, now_s: float) -> str:
        """Why it is not reached; empty while there is hope. Call it some times a second."""
        if self.known:
            return self.known
        self._look(now_s)
        return self.cause() if now_s - self._dialled_s >= self._waits_s() else ""

    def _look(self, now_s: float) -> None:
        """Start a probe when one is due, and take in what the last one found."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            found = self._answer.pop() if self._answer else None
            if found is None or (found.kind in NOT_REACHED and self._open_s is not None):
                self._ask_s = now_s + QUIET_S  # it can be reached since
            else:
                self._finding = found
        if self.port and self._thread is None and now_s >= self._ask_s:
            self._asked_s, self._ask_s = now_s, now_s + RECHECK_S
            self._thread = threading.Thread(target=self._probe, name="ggmq-probe", daemon=True)
            self._thread.start()

    def _probe(self) -> None:
        with contextlib.suppress(OSError, OverflowError):  # no descriptor left, no port of TCP: nothing is found
            self._answer.append(probe(self.host, self.port, CURVE if self.keys is not None else NULL))

    def _waits_s(self) -> float:
        """For how long what is known now may still pass by itself."""
        kind = self._finding.kind if self._finding is not None else None
        if self.shut or kind is Kind.NAME:
            return 0.0
        if kind in (Kind.REFUSED, Kind.NO_ROUTE, Kind.BLOCKED, Kind.CLOSED):
            return min(REFUSED_S, self._patience_s)
        return self._patience_s

    def _other_security(self) -> bool:
        """Whether the keys of the two sides differ."""
        mine = CURVE if self.keys is not None else NULL
        there = self._finding.detail if self._finding is not None else mine
        return there != mine or (self.keys is not None and self._n_closed >= N_CLOSED)

    def cause(self) -> str:
        """The reason as far as it is known; empty when nothing is."""
        if self.known:
            return self.known
        if self._denied:
            return self._another_key()
        if self._strange:
            return f"no ggmq {self.what} listens there: it speaks ZeroMQ's protocol in another way"
        if self._finding is None:
            return self._mute() if self.shaken else ""
        what, port, detail = self.what, self.port, self._finding.detail
        match self._finding.kind:
            case Kind.NAME:
                return f"the name {self.host} is not known ({detail}); check its spelling, or DNS"
            case Kind.REFUSED:
                return f"connection refused: nothing listens on port {port} at that address; start {self._start()}"
            case Kind.NO_ROUTE:
                return f"no way leads there ({detail}); is the host up, and in a network that this one reaches?"
            case Kind.BLOCKED:
                return f"this host does not let the connection out ({detail}); see its firewall"
            case Kind.NO_ANSWER:
                return f"no answer to the connection: the host is down, or a firewall drops what comes to port {port}"
            case Kind.SILENT:
                return (f"it takes the connection and says nothing: the {what} there is asleep or suspended, "
                        "or another program listens")  # fmt: skip
            case Kind.CLOSED:
                return ("it takes the connection and closes it without a word: another program listens there, "
                        "as llama.cpp's rpc-server does")  # fmt: skip
            case Kind.FOREIGN:
                return f"no ggmq {what} listens there: it {detail}"
        return self._differs(detail)

    def _differs(self, mechanism: str) -> str:
        """It speaks ZeroMQ's protocol; it may want another security than this side has."""
        if self.shaken:
            return self._mute()
        if mechanism == CURVE and self.keys is None:
            return (f"the {self.what} there wants a cluster key and this side uses none; copy the key file from the other "
                    "host, or name it with --keys, and leave --insecure out")  # fmt: skip
        if mechanism == NULL and self.keys is not None:
            return (f"the {self.what} there runs without a cluster key, this side with {self._key()}; "
                    "start it with that key, or both with --insecure on a network that you trust")  # fmt: skip
        if self.keys is not None and self._n_closed:
            return self._another_key()
        return f"the {self.what} there begins the handshake and does not end it; it may have no room for more connections"

    def _another_key(self) -> str:
        if self.keys is not None and self.keys.cluster:
            return (f"the {self.what} there does not let in the key of this side ({self._key()}): it was removed, or the "
                    "cluster has another key now; ask for a new one (`ggmq keys new NAME` on the main host)")  # fmt: skip
        return (f"the {self.what} there has another cluster key than this side ({self._key()}); "
                "copy one key file to both hosts")  # fmt: skip

    def _mute(self) -> str:
        key = " and the cluster key" if self.keys is not None else ""
        return (f"it takes the connection{key} and answers no HELLO: the {self.what} there is busy or suspended, "
                "or it is another program that uses ZeroMQ")  # fmt: skip

    def _key(self) -> str:
        return self.keys.path or "a key" if self.keys is not None else "none"

    def _start(self) -> str:
        if self.what == "worker":
            if self.host == "localhost" or self.host.startswith("127."):
                return f"`worker -p {self.port}`"
            return f"`worker -H ADDRESS -p {self.port}` there (without -H only its own host reaches it)"
        return f"`ggmq broker --listen tcp://ADDRESS:{self.port}` there, or its cluster with `ggmq up`"
