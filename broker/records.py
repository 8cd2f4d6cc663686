"""What a broker remembers: of clients, of workers, of requests under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from broker.events import Link
from protocol import messages as m
from protocol.frames import Frame, Message

Pair = tuple[int, int]
"""Two devices, the first of which hands its outputs straight to the second."""
PendingKey = tuple[Link, bool, int]
"""Where a request went: a worker's control or bulk channel, and the seq there."""


@dataclass(slots=True)
class Client:
    """Attributes:
    drains: replies that a DRAIN still waits for, by its seq.
    linking: what a LINK still waits for, by its seq.
    linked: pairs whose link is up.
    """

    session: int
    n_inflight: int = 0
    drains: dict[int, int] = field(default_factory=dict)
    linking: dict[int, Linking] = field(default_factory=dict)
    linked: set[Pair] = field(default_factory=set)


@dataclass(slots=True)
class Linking:
    """A LINK under way: its pairs, and how many of them are not known yet."""

    pairs: list[Pair]
    n_left: int
    found: bool = True


@dataclass(slots=True)
class Worker:
    """Attributes:
    ready: has said HELLO under the current epoch, on both channels when it dialled in.
    hello: what it said on the first of them.
    first_device: global index of its device 0.
    pinged_s, ponged_s: when the last unanswered PING left, and when the worker last showed life.
    """

    epoch: int
    ready: bool = False
    lost: str = ""
    token: bytes = b""
    first_device: int = -1
    seq: int = 0
    bulk_seq: int = 0
    pinged_s: float = 0.0
    ponged_s: float = 0.0
    n_computing: int = 0
    hello: m.Hello | None = None


@dataclass(slots=True)
class Pending:
    """A request under way, at one worker.

    Attributes:
        rid: whom its reply goes to; empty: nobody any more.
        route, frames: what is still to come of a compute that passes through the broker.
        relay: the others that this part of a compute belongs with.
        pair: of a LINK, the two devices that this step of it is about.
    """

    rid: bytes
    request: Message
    device: int
    deadline_s: float
    route: list[m.RouteStep] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    relay: Relay | None = None
    pair: Pair | None = None


@dataclass(slots=True)
class Relay:
    """A compute whose stages hand on to each other. The last one's reply, or the first error, is the client's."""

    pairs: list[Pair]
    keys: list[PendingKey] = field(default_factory=list)


@dataclass(slots=True)
class DeviceEntry:
    link: Link
    local: int
    info: m.DeviceInfo
    allocated: dict[tuple[int, int], int] = field(default_factory=dict)
