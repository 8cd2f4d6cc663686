"""Tensors and graphs as they cross the wire: fixed-size records, ggml's `ne`/`nb`, handles instead of addresses.

A graph is a list of tensors in an order that can be computed. A tensor is a leaf (op NONE) or a node. A leaf's bytes
come from a buffer handle (`buffer`, `offset`) or, when it is named in `inputs`, with each GRAPH_COMPUTE. A node with a
buffer handle is stored there; one without lives in the plan's scratch memory. Views name their root's parent in
`view_src` and the byte offset in `view_offs`, as ggml does.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from protocol import limits
from protocol.dtypes import TYPES, contiguous_nb, tensor_bytes
from protocol.errors import GraphError

RECORD = struct.Struct("<HHBB2x4q4q16i10iiqQQ")
"""type, op id, n_src, flags, pad, ne[4], nb[4], op_params[16], src[10], view_src, view_offs, buffer, offset."""

FLAG_INPUT, FLAG_OUTPUT = 1, 2
ZERO_PARAMS = (0,) * limits.MAX_OP_PARAMS

Shape = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a graph.

    Shapes: `ne` and `nb` are ggml's (ne[0] is contiguous). Units: `nb`, `view_offs` and `offset` in bytes.
    Attributes:
        op: ggml's op name, `NONE` for a leaf.
        params: op_params, 16 words; floats by their bits.
        src: indices of the sources, -1 where an optional one is left out.
        view_src: index of the tensor whose bytes this one shares, or -1.
        buffer: id of a buffer of the session, 0 for none.
    """

    type: int
    op: str
    ne: Shape
    nb: Shape
    params: tuple[int, ...] = ZERO_PARAMS
    src: tuple[int, ...] = ()
    view_src: int = -1
    view_offs: int = 0
    buffer: int = 0
    offset: int = 0

    @property
    def n_elements(self) -> int:
        return self.ne[0] * self.ne[1] * self.ne[2] * self.ne[3]

    @property
    def n_rows(self) -> int:
        return self.ne[1] * self.ne[2] * self.ne[3]

    @property
    def contiguous(self) -> bool:
        return self.nb == contiguous_nb(self.type, self.ne)

    def extent_bytes(self) -> int:
        """Bytes from the tensor's first to past its last, over all corners; 0 for an empty tensor."""
        if 0 in self.ne:
            return 0
        info = TYPES[self.type]
        last = (self.ne[0] // info.block - 1) * self.nb[0] + info.bytes
        return last + sum((self.ne[i] - 1) * self.nb[i] for i in (1, 2, 3))


@dataclass(frozen=True, slots=True)
class Graph:
    """Tensors in order, and which of them come with, and go back from, each GRAPH_COMPUTE (indices)."""

    tensors: tuple[Tensor, ...]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def root(self, index: int) -> tuple[int, int]:
        """The tensor that owns the bytes of `index`, and the byte offset of `index` in it."""
        offset = 0
        while self.tensors[index].view_src >= 0:
            offset += self.tensors[index].view_offs
            index = self.tensors[index].view_src
        return index, offset


def encode_graph(graph: Graph) -> bytes:
    """The graph as one frame of records; its layout is part of the protocol version."""
    from protocol.ops import OP_ID

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
    from protocol.ops import OP_NAME, validate

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


def check_layout(tensors: Sequence[Tensor], i: int, roots: list[int], starts: list[int]) -> None:
    """Type, shape, strides and extent of tensor `i`; fills in its root and the offset of its first byte in the root.

    Every corner of the extent is checked, in Python integers, which do not wrap.
    """
    t = tensors[i]
    info = TYPES.get(t.type)
    if info is None:
        raise GraphError(f"tensor {i}: type id {t.type} is not a live ggml type")
    if any(n < 0 for n in t.ne) or any(n < 0 for n in t.nb):
        raise GraphError(f"tensor {i}: ne and nb must not be negative, got ne {t.ne}, nb {t.nb}")
    if t.ne[0] % info.block:
        raise GraphError(f"tensor {i}: {info.type.name} has blocks of {info.block}, got ne[0] = {t.ne[0]}")
    if t.n_elements > limits.MAX_TENSOR_BYTES or tensor_bytes(t.type, t.ne) > limits.MAX_TENSOR_BYTES:
        raise GraphError(f"tensor {i}: ne {t.ne} is larger than {limits.MAX_TENSOR_BYTES} bytes")
    if t.view_src < 0:
        if t.view_src != -1 or t.view_offs:
            raise GraphError(f"tensor {i}: no view, but view_src {t.view_src}, view_offs {t.view_offs}")
        if not t.contiguous:
            raise GraphError(f"tensor {i}: a tensor that is no view is contiguous; got nb {t.nb} for ne {t.ne}")
        roots.append(i)
        starts.append(0)
        return
    if t.view_src >= i:
        raise GraphError(f"tensor {i}: view of tensor {t.view_src}, which does not come before it")
    if t.view_offs < 0:
        raise GraphError(f"tensor {i}: view offset {t.view_offs} is negative")
    if t.buffer:
        raise GraphError(f"tensor {i}: a view has its root's buffer and none of its own")
    root, start = roots[t.view_src], starts[t.view_src] + t.view_offs
    size = tensor_bytes(tensors[root].type, tensors[root].ne)
    bound = max(size, info.bytes)
    if 0 not in t.ne:
        if any(n > bound for n in t.nb):
            raise GraphError(f"tensor {i}: strides {t.nb} reach past its root of {size} bytes")
        if info.quantized and t.nb[0] != info.bytes:
            raise GraphError(f"tensor {i}: blocks of {info.type.name} lie {info.bytes} bytes apart, got nb[0] = {t.nb[0]}")
        if any(n % _alignment(t.type) for n in (*t.nb, start)):
            raise GraphError(f"tensor {i}: strides {t.nb} or offset {start} are not aligned to its type")
    if start + t.extent_bytes() > size:
        raise GraphError(
            f"tensor {i}: view of bytes {start}..{start + t.extent_bytes()} of a root that has {size}; "
            "its last element lies outside"
        )
    roots.append(root)
    starts.append(start)


def _alignment(type_id: int) -> int:
    info = TYPES[type_id]
    return info.bytes if not info.quantized else 1


def check_no_overlap(t: Tensor, i: int) -> None:
    """Refuse a written view whose elements share bytes (ordered strides must not fold back)."""
    info = TYPES[t.type]
    dims = sorted(
        (nb, n) for nb, n in zip(t.nb, (t.ne[0] // info.block, *t.ne[1:]), strict=True) if n > 1
    )
    reach = info.bytes
    for nb, n in dims:
        if nb < reach:
            raise GraphError(f"tensor {i}: strides {t.nb} of ne {t.ne} make elements overlap; it cannot be written")
        reach = nb * (n - 1) + reach
