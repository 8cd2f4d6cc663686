"""A graph as one frame of fixed-size records: a length that lies cannot make the receiver allocate."""

from __future__ import annotations

import hashlib
import struct

from protocol import limits
from protocol.errors import GraphError
from protocol.graph import Graph, Tensor
from protocol.ops import OP_ID, OP_NAME
from protocol.validation import validate

RECORD = struct.Struct("<HHBB2x4q4q16i10iiqQQ")
"""type, op id, n_src, flags, pad, ne[4], nb[4], op_params[16], src[10], view_src, view_offs, buffer, offset."""

FLAG_INPUT, FLAG_OUTPUT = 1, 2


def encode_graph(graph: Graph) -> bytes:
    """The graph as one frame of records; its layout is part of the protocol version."""
    flags = [0] * len(graph.tensors)
    for i in graph.inputs:
        flags[i] |= FLAG_INPUT
    for i in graph.outputs:
        flags[i] |= FLAG_OUTPUT
    out = bytearray(RECORD.size * len(graph.tensors))
    for i, t in enumerate(graph.tensors):
        src = t.src + (-1,) * (limits.MAX_SRC - len(t.src))
        RECORD.pack_into(
            out, i * RECORD.size, t.type, OP_ID[t.op], len(t.src), flags[i], *t.ne, *t.nb, *t.params, *src,
            t.view_src, t.view_offs, t.buffer, t.offset,
        )  # fmt: skip
    return bytes(out)


def decode_graph(frame: bytes | memoryview) -> Graph:
    """Parse and validate a graph frame. Iterative, and linear in its length.

    Errors: GraphError names the first tensor that is wrong, what was expected and what came.
    """
    n, rest = divmod(len(frame), RECORD.size)
    if rest or n == 0:
        raise GraphError(f"graph frame: expected a multiple of {RECORD.size} bytes and at least one, got {len(frame)}")
    if n > limits.MAX_GRAPH_TENSORS:
        raise GraphError(f"graph: at most {limits.MAX_GRAPH_TENSORS} tensors, got {n}; send it in parts")
    tensors: list[Tensor] = []
    inputs: list[int] = []
    outputs: list[int] = []
    for i, (type_id, op, n_src, flags, *v) in enumerate(RECORD.iter_unpack(frame)):
        name = OP_NAME.get(op)
        if name is None:
            raise GraphError(f"tensor {i}: op id {op} is not in the table of {len(OP_NAME)} ops")
        if n_src > limits.MAX_SRC:
            raise GraphError(f"tensor {i}: at most {limits.MAX_SRC} sources, got {n_src}")
        if any(s != -1 for s in v[24 + n_src : 34]):
            raise GraphError(f"tensor {i}: source slots past n_src = {n_src} must be -1")
        if flags & ~(FLAG_INPUT | FLAG_OUTPUT):
            raise GraphError(f"tensor {i}: unknown flag bits {flags:#x}")
        tensors.append(
            Tensor(type_id, name, tuple(v[0:4]), tuple(v[4:8]), tuple(v[8:24]), tuple(v[24 : 24 + n_src]),
                   *v[34:38])
        )  # fmt: skip
        if flags & FLAG_INPUT:
            inputs.append(i)
        if flags & FLAG_OUTPUT:
            outputs.append(i)
    graph = Graph(tuple(tensors), tuple(inputs), tuple(outputs))
    validate(graph)
    return graph


def graph_digest(frame: bytes | memoryview) -> bytes:
    """The 16-byte name of a graph frame."""
    return hashlib.blake2b(frame, digest_size=16).digest()
