"""Graphs: the codec, and each threat that a graph can carry, refused before anything is computed."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol.dtypes import GGMLType, contiguous_nb, tensor_bytes
from protocol.encoding import RECORD, decode_graph, encode_graph
from protocol.errors import GraphError
from protocol.graph import Graph, Tensor, f32_bits
from protocol.ops import GLU_KINDS, OP_ID, OPS, UNARY_KINDS
from protocol.validation import validate
from tests.support.strategies import leaf, node_graphs

F32, F16, Q4_0, I32 = GGMLType.F32, GGMLType.F16, GGMLType.Q4_0, GGMLType.I32
X = leaf(F32, (32, 4, 1, 1), buffer=1)
BITS_NAN = f32_bits(float("nan"))


def node(op: str, src: tuple[int, ...], like: Tensor = X, **more: object) -> Tensor:
    return replace(like, op=op, src=src, buffer=0, offset=0, **more)


def graph(*tensors: Tensor) -> Graph:
    return Graph(tensors)


@given(node_graphs())
def test_a_graph_comes_back_as_it_was(case: tuple[str, Graph, list[bytes]]) -> None:
    assert decode_graph(encode_graph(case[1])) == case[1]


@given(st.binary(max_size=3 * RECORD.size))
def test_arbitrary_bytes_are_refused_or_valid(frame: bytes) -> None:
    try:
        validate(decode_graph(frame))
    except GraphError:
        pass


@given(node_graphs(), st.data())
def test_one_byte_changed_is_refused_or_still_valid(case: tuple[str, Graph, list[bytes]], data: st.DataObject) -> None:
    frame = bytearray(encode_graph(case[1]))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        validate(decode_graph(bytes(frame)))
    except GraphError:
        pass


VIEW = node("VIEW", (0,), view_src=0)
ROWS = leaf(I32, (4, 1, 1, 1), buffer=1)
THREATS: dict[str, Graph] = {
    "type id out of range": graph(replace(X, type=200)),
    "type id retired": graph(replace(X, type=4)),
    "ne[0] no multiple of the block": graph(replace(X, type=Q4_0, ne=(33, 1, 1, 1), nb=(18, 18, 18, 18))),
    "negative ne": graph(replace(X, ne=(-32, 4, 1, 1))),
    "empty source": graph(leaf(F32, (0, 4, 1, 1), buffer=1), node("RMS_NORM", (0,), leaf(F32, (0, 4, 1, 1)))),
    "negative stride": graph(X, replace(VIEW, nb=(4, -128, 512, 512))),
    "strides that overlap in a write": graph(X, node("SCALE", (0,), view_src=0, nb=(4, 64, 512, 512))),
    "size-1 dimension with absurd stride": graph(X, replace(VIEW, nb=(4, 128, 1 << 60, 512))),
    "last byte outside": graph(X, replace(VIEW, ne=(32, 2, 1, 1), nb=(4, 508, 512, 512))),
    "offset outside": graph(X, replace(VIEW, view_offs=4)),
    "negative offset": graph(X, replace(VIEW, view_offs=-4)),
    "offset that wraps": graph(X, replace(VIEW, view_offs=(1 << 63) - 4)),
    "misaligned view": graph(X, replace(VIEW, ne=(16, 1, 1, 1), nb=(4, 64, 64, 64), view_offs=2)),
    "op of the wrong source type": graph(leaf(I32, (32, 1, 1, 1), buffer=1),
                                         node("RMS_NORM", (0,), leaf(F32, (32, 1, 1, 1)))),
    "too few sources": graph(X, node("ADD", (0,))),
    "too many sources": graph(X, node("SQR", (0, 0, 0))),
    "source after the node": graph(X, node("SQR", (2,)), node("SQR", (0,))),
    "source is itself": graph(X, node("SQR", (1,))),
    "dangling source": graph(X, node("SQR", (99,))),
    "negative source": graph(X, node("SQR", (-5,))),
    "view after the node": graph(X, replace(VIEW, view_src=1)),
    "leaf with sources": graph(X, replace(X, src=(0,))),
    "leaf without bytes": graph(replace(X, buffer=0)),
    "nan parameter": graph(X, node("SCALE", (0,), params=(BITS_NAN, *(0,) * 15))),
    "negative eps": graph(X, node("RMS_NORM", (0,), params=(-1082130432, *(0,) * 15))),
    "order of 7": graph(X, replace(node("ARGSORT", (0,)), type=I32, params=(7, *(0,) * 15))),
    "k larger than n": graph(X, node("TOP_K", (0,), leaf(I32, (33, 4, 1, 1)))),
    "unary kind outside": graph(X, node("UNARY", (0,), params=(99, *(0,) * 15))),
    "unary kind negative": graph(X, node("UNARY", (0,), params=(-1, *(0,) * 15))),
    "rope with odd dimensions": graph(X, ROWS, node("ROPE", (0, 1), params=(0, 7, *(0,) * 14))),
    "result of another shape": graph(X, node("SQR", (0,), leaf(F32, (32, 5, 1, 1)))),
    "result of another type": graph(X, node("SQR", (0,), leaf(F16, (32, 4, 1, 1)))),
    "in place where that is not allowed": graph(X, node("SUM_ROWS", (0,), leaf(F32, (1, 4, 1, 1)), view_src=0,
                                                        nb=(4, 128, 512, 512))),
    "set_rows elsewhere than its target": graph(
        X, ROWS, leaf(F32, (32, 4, 1, 1), buffer=1), node("SET_ROWS", (0, 1, 2), view_src=0)),
    "absurd size": graph(leaf(F32, (1 << 40, 1 << 20, 1, 1), buffer=1)),
    "product of ne that wraps": graph(leaf(F32, (1 << 32, 1 << 32, 4, 1), buffer=1)),
    "output twice": Graph((X, node("SQR", (0,))), (), (1, 1)),
    "output outside": Graph((X,), (), (7,)),
    "input that is a node": Graph((X, node("SQR", (0,))), (1,), ()),
    "input with a buffer": Graph((X,), (0,), ()),
}  # fmt: skip


@pytest.mark.parametrize("threat", THREATS)
def test_threats_in_graphs_are_refused(threat: str) -> None:
    with pytest.raises(GraphError):
        validate(THREATS[threat])


def test_the_threats_are_refused_for_their_own_sake() -> None:
    validate(graph(X, VIEW, node("SQR", (1,))))


def test_what_travels_for_an_op_never_changes() -> None:
    """Some of the first and the last: who moves an id breaks every worker of the same protocol version."""
    known = {"NONE": 0, "ADD": 5, "MUL_MAT": 29, "FLASH_ATTN_EXT": 42, "UNARY": 43, "GLU": 44}
    assert {name: OP_ID[name] for name in known} == known
    assert (UNARY_KINDS.index("SILU"), UNARY_KINDS.index("XIELU"), GLU_KINDS.index("SWIGLU_OAI")) == (10, 17, 3)


def test_op_ids_outside_the_table_and_bad_records_are_refused() -> None:
    frame = bytearray(encode_graph(graph(X)))
    struct.pack_into("<H", frame, 2, max(OP_ID.values()) + 1)
    for bad in (bytes(frame), b"", bytes(frame)[:-1], bytes(RECORD.size)):
        with pytest.raises(GraphError):
            decode_graph(bad)


def test_a_long_chain_is_taken_and_a_longer_one_refused() -> None:
    def chain(n: int) -> bytes:
        return encode_graph(graph(X, *(node("SQR", (i,)) for i in range(n - 1))))

    assert len(decode_graph(chain(5000)).tensors) == 5000
    one = encode_graph(graph(X))
    for n in (300_000, 1_000_000):
        with pytest.raises(GraphError, match="at most"):
            decode_graph(one * n)
    assert limits.MAX_GRAPH_TENSORS < 300_000


@given(st.sampled_from(sorted(GGMLType)), st.integers(1, 3), st.integers(1, 4))
def test_contiguous_strides_and_bytes_agree(t: GGMLType, blocks: int, rows: int) -> None:
    from protocol.dtypes import TYPES

    ne = (TYPES[t].block * blocks, rows, 2, 1)
    x = Tensor(t, "NONE", ne, contiguous_nb(t, ne), buffer=1)
    assert x.contiguous and x.extent_bytes() == tensor_bytes(t, ne)


def test_every_op_says_what_it_is() -> None:
    for op in OPS.values():
        assert op.math and op.out, op.name
        assert 0 <= op.nmse <= 5e-4, op.name
