"""Tensors and graphs as both ends know them: ggml's `ne`/`nb`, handles instead of addresses.

A graph is a list of tensors in an order that can be computed. A tensor is a leaf (op NONE) or a node. A leaf's bytes
come from a buffer handle (`buffer`, `offset`) or, when it is named in `inputs`, with each GRAPH_COMPUTE. A node with a
buffer handle is stored there; one without lives in the plan's scratch memory. Views name their root's parent in
`view_src` and the byte offset in `view_offs`, as ggml does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from protocol import limits
from protocol.dtypes import TYPES, contiguous_nb

ZERO_PARAMS = (0,) * limits.MAX_OP_PARAMS

Shape = tuple[int, int, int, int]


def f32_bits(value: float) -> int:
    """The word of op_params that holds a float32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def f32_of(word: int) -> float:
    """The float32 that a word of op_params holds."""
    return float(struct.unpack("<f", struct.pack("<i", word))[0])


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
