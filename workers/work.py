"""What a worker's state machine has done: one class for each kind of work that a device has, and what is to be sent."""

from __future__ import annotations

from dataclasses import dataclass

from protocol import messages as m
from protocol.frames import Message
from protocol.graph import Graph

Key = tuple[bytes, int]
"""A session: the peer's token and the session's number."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a routing id."""

    rid: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class Work:
    """Something for the device to do, for the request that it answers. The base of all kinds; `h` is its header."""

    rid: bytes
    key: Key
    request: Message


@dataclass(frozen=True, slots=True)
class Alloc(Work):
    h: m.AllocBuffer


@dataclass(frozen=True, slots=True)
class Free(Work):
    h: m.FreeBuffer


@dataclass(frozen=True, slots=True)
class Write(Work):
    """`last`: the tensor is complete; verify it by its hash, store it, let the device repack it."""

    h: m.SetTensor
    last: bool


@dataclass(frozen=True, slots=True)
class Fetch(Work):
    """Fill a tensor from what is here already."""

    h: m.SetTensorHash


@dataclass(frozen=True, slots=True)
class Read(Work):
    h: m.GetTensor


@dataclass(frozen=True, slots=True)
class Copy(Work):
    h: m.CopyTensor


@dataclass(frozen=True, slots=True)
class Compile(Work):
    h: m.GraphPut
    graph: Graph


@dataclass(frozen=True, slots=True)
class Compute(Work):
    h: m.StageCompute
    graph: Graph


@dataclass(frozen=True, slots=True)
class EndSession(Work):
    """DRAIN: free all that the session holds."""


@dataclass(frozen=True, slots=True)
class GiveUp(Work):
    """RELEASE: free what ended sessions have left."""


@dataclass(frozen=True, slots=True)
class Count(Work):
    """STATS."""


@dataclass(frozen=True, slots=True)
class Describe(Work):
    """DEVICE_INFO: what the device can run."""


Instruction = Send | Work
