"""What a worker's state machine has done: one class for each kind of work that a device has, and what is to be sent."""

from __future__ import annotations

from msgspec import Struct

from protocol import messages as m
from protocol.frames import Message
from protocol.graph import Graph

Key = tuple[bytes, int]
"""A session: the peer's token and the session's number."""


class Send(Struct, frozen=True):
    """Send a message to a routing id."""

    rid: bytes
    message: Message


class Work(Struct, frozen=True):
    """Something for the device to do, for the request that it answers. The base of all kinds; `h` is its header."""

    rid: bytes
    key: Key
    request: Message


class Alloc(Work, frozen=True):
    h: m.AllocBuffer


class Free(Work, frozen=True):
    h: m.FreeBuffer


class Write(Work, frozen=True):
    """`last`: the tensor is complete; verify it by its hash, store it, let the device repack it."""

    h: m.SetTensor
    last: bool


class Fetch(Work, frozen=True):
    """Fill a tensor from what is here already."""

    h: m.SetTensorHash


class Read(Work, frozen=True):
    h: m.GetTensor


class Copy(Work, frozen=True):
    h: m.CopyTensor


class Compile(Work, frozen=True):
    h: m.GraphPut
    graph: Graph


class Compute(Work, frozen=True):
    h: m.StageCompute
    graph: Graph


class EndSession(Work, frozen=True):
    """DRAIN: free all that the session holds."""


class GiveUp(Work, frozen=True):
    """RELEASE: free what ended sessions have left."""


class Count(Work, frozen=True):
    """STATS."""


class Describe(Work, frozen=True):
    """DEVICE_INFO: what the device can run."""


class Note(Work, frozen=True):
    """TRACE: note when the next computes of the session run."""

    h: m.TraceQuery


class Seek(Work, frozen=True):
    """HAVE_WEIGHTS: which weights others could read from here."""

    h: m.HaveWeights


class Serve(Work, frozen=True):
    """READ_WEIGHT: a chunk of a weight, for another worker."""

    h: m.ReadWeight


Instruction = Send | Work

Name = tuple[bytes, int]
"""A link to another worker: the token of the broker that asked for it, and its number."""


class Dial(Struct, frozen=True):
    """Connect to a worker. `key`: its public key, if that is not the cluster's."""

    name: Name
    endpoint: str
    key: bytes = b""


class ToPeer(Struct, frozen=True):
    """Send over a link."""

    name: Name
    message: Message


class HangUp(Struct, frozen=True):
    """Close a link's connection."""

    name: Name


class Later(Struct, frozen=True):
    """Take this message in its turn, as if it had come from there."""

    rid: bytes
    message: Message


LinkInstruction = Instruction | Dial | ToPeer | HangUp | Later
