"""What a broker and a worker noted of computes, as the payload of TRACE's reply: one bounded msgpack frame.

Units: nanoseconds of the process's own monotonic clock; 0 for what did not happen.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from protocol import limits
from protocol.errors import ProtocolError
from protocol.frames import Frame
from protocol.messages import U64, Digest, Short


class TracedStep(Struct, frozen=True, array_like=True, gc=False):
    """One step of a plan. `node`: that of the graph it begins with, -1 for what belongs to none."""

    title: Short
    node: Annotated[int, Meta(ge=-1, lt=limits.MAX_GRAPH_TENSORS)]
    begun_ns: U64
    ended_ns: U64


class TracedCompute(Struct, gc=False):
    """A STAGE_COMPUTE on a worker.

    Attributes:
        digest: names its graph.
        arrived_ns, handed_ns: when it came, and when the activations that it takes did.
        begun_ns: when its turn came; ran_ns: when its plan began to run, compiled if it had to be.
        ended_ns, sent_ns: when the plan had run, and when its outputs were on their way.
        n_in_bytes, n_out_bytes: of its inputs and outputs.
    """

    digest: Digest
    arrived_ns: U64 = 0
    handed_ns: U64 = 0
    begun_ns: U64 = 0
    ran_ns: U64 = 0
    ended_ns: U64 = 0
    sent_ns: U64 = 0
    n_in_bytes: U64 = 0
    n_out_bytes: U64 = 0
    steps: list[TracedStep] = []


class TracedHop(Struct, frozen=True, array_like=True, gc=False):
    """A message that a broker took in, and what it sent for it.

    Attributes:
        seq: the client's, of the GRAPH_COMPUTE that it is about.
        from_client: it came from the client, not from a worker.
        devices: to which a STAGE_COMPUTE went; empty: nothing but a reply, if anything.
        replied: the client was answered.
        begun_ns, ended_ns: from when it had been received until what followed was sent.
    """

    seq: U64
    from_client: bool
    devices: Annotated[list[U64], Meta(max_length=limits.MAX_ROUTE_STEPS + 1)]
    replied: bool
    begun_ns: U64
    ended_ns: U64


class Noted(Struct, gc=False):
    """What was noted, in order. n_dropped: what came after there was no more room."""

    computes: list[TracedCompute] = []
    hops: list[TracedHop] = []
    n_dropped: U64 = 0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Noted)


def encode_noted(noted: Noted) -> bytes:
    return _encoder.encode(noted)


def decode_noted(payload: tuple[Frame, ...]) -> Noted:
    """Errors: ProtocolError for anything but one frame of it within the limits."""
    if len(payload) != 1 or len(payload[0]) > limits.MAX_TRACE_BYTES:
        raise ProtocolError(f"TRACE: expected one frame of at most {limits.MAX_TRACE_BYTES} bytes, got "
                            f"{[len(f) for f in payload]}")  # fmt: skip
    try:
        return _decoder.decode(payload[0])
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as e:
        raise ProtocolError(f"TRACE: {e}") from None
