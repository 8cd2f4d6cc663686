"""What happens to a broker and what it decides to do. Small frozen values; the state machine's whole interface."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.frames import Message

Link = str
"""A worker's connection: `tcp://host:port` of one that listens, `dial/<id>` of one that dialled in."""


@dataclass(frozen=True, slots=True)
class FromClient:
    rid: bytes
    message: Message
    now_s: float


@dataclass(frozen=True, slots=True)
class FromWorker:
    """`key`: the public key of a worker that dialled in with one of its own."""

    link: Link
    message: Message
    now_s: float
    bulk: bool = False
    key: bytes = b""


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """The loop connects to a worker that listens."""

    link: Link
    now_s: float


@dataclass(frozen=True, slots=True)
class LinkLost:
    """A connection is closed."""

    link: Link
    reason: str
    now_s: float


@dataclass(frozen=True, slots=True)
class Unreached:
    """Why a worker that is dialled does not answer, as far as is known. It is dialled on."""

    link: Link
    reason: str
    now_s: float


@dataclass(frozen=True, slots=True)
class LinkStuck:
    """A worker that is silent takes new connections: the one that there is will not carry anything for a while."""

    link: Link
    now_s: float


@dataclass(frozen=True, slots=True)
class LinkCarried:
    """What TCP tells of a worker's connections (`config.carrying`): told while a PING is unanswered."""

    link: Link
    n_bytes: int
    network_s: float
    now_s: float


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """A process that was started here is no more."""

    worker: str
    reason: str
    now_s: float


@dataclass(frozen=True, slots=True)
class ClientLost:
    rid: bytes
    now_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    now_s: float


Event = (FromClient | FromWorker | LinkOpened | LinkLost | LinkStuck | LinkCarried | Unreached | WorkerEnded | ClientLost
         | Tick)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ToClient:
    rid: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class ToWorker:
    link: Link
    bulk: bool
    message: Message


@dataclass(frozen=True, slots=True)
class CloseLink:
    """The connection will not be used again."""

    link: Link


@dataclass(frozen=True, slots=True)
class Redial:
    """Connect to a worker that listens once more, from the beginning: nothing that was on its way may arrive late."""

    link: Link


Instruction = ToClient | ToWorker | CloseLink | Redial
