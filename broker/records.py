"""What a broker remembers: of clients, of workers, and of requests under way, one class for each kind of them."""

from __future__ import annotations

from msgspec import Struct, field

from broker.events import Link
from protocol import limits
from protocol import messages as m
from protocol.frames import Frame, Message

Pair = tuple[int, int]
"""Two devices, the first of which hands its outputs straight to the second."""
PendingKey = tuple[Link, bool, int]
"""Where a request went: a worker's control or bulk channel, and the seq there."""


class Client(Struct):
    """Attributes:
    drains: replies that a DRAIN still waits for, by its seq.
    linking: what a LINK still waits for, by its seq.
    linked: pairs whose link is up.
    passes: its last compute over several stages passed through here, so others may be on their way.
    """

    session: int
    n_inflight: int = 0
    drains: dict[int, int] = field(default_factory=dict)
    linking: dict[int, Linking] = field(default_factory=dict)
    linked: set[Pair] = field(default_factory=set)
    passes: bool = False


class Linking(Struct):
    """A LINK under way: its pairs, and how many of them are not known yet. `waited`: the client has no answer yet."""

    pairs: list[Pair]
    n_left: int
    found: bool = True
    waited: bool = True


class Worker(Struct):
    """Attributes:
    ready: has said HELLO under the current epoch, on both channels.
    silent: why it was asked to say HELLO again, over a connection that is there.
    lost: why it is of no use: its connection is closed, or it never said HELLO.
    instance: the token of its process.
    hello: what it said on the first of its channels, until the other is there too.
    opened_s, heard_s: when this epoch began, or `hello` was said, and when the worker last showed life.
    dial: of one that dialled in, the number of its try; 0: none.
    key: its public key, if it has one of its own. `named`: such keys of others that it was told, for their links to it.
    pinged_s: when the oldest PING left that nothing came after; 0: there is none. `asked_s`: when the last one left.
    carried: bytes that its connections had carried when they were looked at last; -1: not since that PING left.
    network_s: what the network takes there and back beyond what is usual.
    """

    epoch: int
    opened_s: float
    ready: bool = False
    silent: str = ""
    lost: str = ""
    instance: bytes = b""
    seq: int = 0
    bulk_seq: int = 0
    pinged_s: float = 0.0
    asked_s: float = 0.0
    heard_s: float = 0.0
    carried: int = -1
    network_s: float = 0.0
    hello: m.Hello | None = None
    dial: int = 0
    key: bytes = b""
    named: frozenset[bytes] = frozenset()

    @property
    def awaited(self) -> bool:
        """Whether it has not answered something yet for which a link may take its time."""
        return self.hello is not None or (self.ready and self.pinged_s > 0)

    def late(self, now_s: float) -> bool:
        """Whether it should have answered a PING by now."""
        return self.pinged_s > 0 and now_s - self.pinged_s > limits.PING_DEADLINE_S + self.network_s


class Pending(Struct):
    """A request under way at the worker of one device. The base of all kinds.

    Attributes:
        rid: whom its reply goes to; empty: nobody any more.
        request: the client's.
    """

    rid: bytes
    request: Message
    device: int
    deadline_s: float


class Forwarded(Pending):
    """The worker's reply is the client's."""


class PassedCompute(Pending):
    """A stage of a compute whose activations pass through the broker. `route` and `frames`: what is still to come."""

    route: list[m.RouteStep]
    frames: list[Frame]


class RelayedCompute(Pending):
    """A stage of a compute whose stages hand on to each other."""

    relay: Relay


class LinkStep(Pending):
    """Of a LINK, what one of its pairs waits for."""

    pair: Pair


class Drained(Pending):
    """A session ends on one device."""

    session: int


class Relay(Struct):
    """A compute whose stages hand on to each other. The last one's reply, or the first error, is the client's."""

    pairs: list[Pair]
    keys: list[PendingKey] = field(default_factory=list)
