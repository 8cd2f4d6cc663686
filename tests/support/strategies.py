"""Hypothesis strategies made from the op table and the message types, so that a new op or command is fuzzed too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from hypothesis import strategies as st

from protocol import PROTOCOL_VERSION
from protocol import messages as m
from protocol.dtypes import FLOATS, TYPES, GGMLType, contiguous_nb
from protocol.frames import Message
from protocol.graph import Graph, Shape, Tensor, f32_bits
from protocol.messages import REQUEST, Command
from protocol.ops import GLU_KINDS, OPS, UNARY_KINDS, Op
from protocol.rules import PAGE_CELLS
from workers.tensors import convert

small = st.integers(1, 4)


def headers(kind: type[m.Header]) -> st.SearchStrategy[m.Header]:
    """Any valid header of a type, from its annotations."""
    fields = {f.encode_name: _field(f.type) for f in msgspec.inspect.type_info(kind).fields}  # type: ignore[attr-defined]
    return st.fixed_dictionaries(fields).map(lambda d: msgspec.convert(d, kind))


def _field(t: Any) -> st.SearchStrategy[Any]:
    i = msgspec.inspect
    match t:
        case i.IntType():
            return st.integers(t.ge if t.ge is not None else 0, min(t.le if t.le is not None else 99, (1 << 63) - 1))
        case i.FloatType():
            return st.floats(0, 1e6)
        case i.BoolType():
            return st.booleans()
        case i.StrType():
            return st.text(max_size=20)
        case i.BytesType():
            low, high = t.min_length or 0, t.max_length if t.max_length is not None else 40
            return st.binary(min_size=low, max_size=high)
        case i.ListType():
            return st.lists(_field(t.item_type), max_size=3)
        case i.TupleType():
            return st.tuples(*(_field(x) for x in t.item_types))
        case i.NoneType():
            return st.none()
        case i.UnionType():
            return st.one_of(*(_field(x) for x in t.types))
        case i.StructType():
            return st.fixed_dictionaries({f.encode_name: _field(f.type) for f in t.fields})
    raise AssertionError(f"no strategy for {t}")


@st.composite
def messages(draw: st.DrawFn) -> Message:
    """Any request with as many payload frames as it says."""
    command = draw(st.sampled_from(sorted(REQUEST)))
    header = draw(headers(REQUEST[command]))
    n = m.PAYLOAD_FRAMES.get(command, 0)
    if isinstance(header, m.GraphCompute):
        header = msgspec.structs.replace(header, route=[])
    if isinstance(header, m.GraphCompute | m.StageCompute | m.HandOver):
        header = msgspec.structs.replace(header, n_payload=draw(st.integers(0, 3)))
        n = header.n_payload
    if isinstance(header, m.Hello):
        header = msgspec.structs.replace(header, version=PROTOCOL_VERSION)
    payload = tuple(draw(st.lists(st.binary(max_size=64), min_size=n, max_size=n)))
    return Message(Command(command), header, payload, False, draw(st.integers(0, 9)), draw(st.integers(0, 9)),
                   draw(st.integers(0, 1 << 40)))  # fmt: skip


ELEMENTWISE = sorted(
    o.name for o in OPS.values()
    if o.inplace and all(s.types >= FLOATS or s.types == {GGMLType.F32} for s in o.sources) and len(o.sources) <= 2
    and o.name not in ("ROPE", "SOFT_MAX", "DIAG_MASK_INF", "ADD_ID")
)  # fmt: skip
ROWS = ["SUM_ROWS", "MEAN", "CUMSUM", "ARGSORT", "ARGMAX", "SOFT_MAX", "CONT", "DUP"]


def params_of(op: Op, values: dict[str, float]) -> tuple[int, ...]:
    words = [0] * 16
    if op.kind >= 0:
        words[0] = op.kind
    for name, p in op.params.items():
        v = values.get(name, 1 if p.kind == "f32" else 0)
        words[p.index] = int(v) if p.kind == "i32" else f32_bits(v)
    return tuple(words)


def node_name(op: Op) -> str:
    if op.kind < 0:
        return op.name
    return "UNARY" if op.name in UNARY_KINDS else "GLU"


@st.composite
def node_graphs(draw: st.DrawFn) -> tuple[str, Graph, list[bytes]]:
    """One node over input leaves, with their bytes: any elementwise, row, product or recurrent op, small shapes, finite
    values."""
    name = draw(st.sampled_from([*ELEMENTWISE, *ROWS, *GLU_KINDS, "MUL_MAT", "ROPE", "PAGED_ATTN", "SSM_CONV", "SSM_SCAN"]))
    op = OPS[name]
    if name == "PAGED_ATTN":
        return name, *draw(_paged_attention(op))
    if name.startswith("SSM"):
        return name, *draw(_recurrences(op))
    ne = (draw(st.sampled_from([1, 3, 32, 64])), draw(small), draw(small), draw(st.integers(1, 2)))
    if name == "ARGMAX":
        ne = (ne[0], ne[1], 1, 1)
    if name == "ROPE":
        ne = (32, ne[1], ne[2], 1)
    leaves = [ne]
    params: dict[str, float] = {"scale": 0.5, "eps": 1e-5, "freq_base": 10000.0, "freq_scale": 1.0, "beta_fast": 32.0,
                                "attn_factor": 1.0, "low": -0.5, "high": 0.5, "limit": 1.0, "n_dims": 16,
                                "max_bias": 0.0, "ext_factor": 0.0, "mode": draw(st.sampled_from([0, 2]))}  # fmt: skip
    out = ne
    types = [GGMLType.F32]
    if name in ("ADD", "SUB", "MUL", "DIV"):
        leaves.append(draw(st.sampled_from([ne, (ne[0], 1, 1, 1), (1, ne[1], 1, 1), (1, 1, 1, 1)])))
    elif name in GLU_KINDS:
        leaves.append(ne)
    elif name in ("SUM_ROWS", "MEAN"):
        out = (1, *ne[1:])
    elif name == "ARGMAX":
        out = (ne[1], 1, 1, 1)
    elif name == "ROPE":
        leaves.append((ne[2], 1, 1, 1))
        types.append(GGMLType.I32)
    elif name == "MUL_MAT":
        n = draw(st.integers(1, 9))
        leaves, out = [ne, (ne[0], n, ne[2], ne[3])], (ne[1], n, ne[2], ne[3])
        types[0] = draw(st.sampled_from([GGMLType.F32, GGMLType.F16, GGMLType.BF16]))
        if ne[0] % 32 == 0:
            types[0] = draw(st.sampled_from([types[0], GGMLType.Q8_0, GGMLType.Q4_0]))
    types += [GGMLType.F32] * (len(leaves) - len(types))
    return name, *draw(_single(op, types, leaves, out, params))


@st.composite
def _single(
    draw: st.DrawFn, op: Op, types: list[GGMLType], leaves: list[Shape], out: Shape, params: dict[str, float]
) -> tuple[Graph, list[bytes]]:
    """One node with a result of shape `out` over leaves of these types and shapes, and their bytes."""
    rng_bytes = [draw(_leaf_bytes(t, shape)) for t, shape in zip(types, leaves, strict=True)]
    tensors = [leaf(t, shape) for t, shape in zip(types, leaves, strict=True)]
    out_type = GGMLType.I32 if op.out == {GGMLType.I32} else GGMLType.F32
    node = replace(leaf(out_type, out), op=node_name(op), src=tuple(range(len(leaves))), params=params_of(op, params))
    tensors.append(node)
    return Graph(tuple(tensors), tuple(range(len(leaves))), (len(leaves),)), rng_bytes


@st.composite
def _paged_attention(draw: st.DrawFn, op: Op) -> tuple[Graph, list[bytes]]:
    """Tokens of some sequences, whose pages lie anywhere in a pool and may be shared."""
    n_seqs, n_pages, n_pool, group = draw(small), draw(small), draw(st.integers(1, 7)), draw(st.sampled_from([1, 3]))
    d, n_head_kv, n_tokens = draw(st.sampled_from([32, 64])), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 7, 40]))
    kinds = [draw(st.sampled_from([GGMLType.F16, GGMLType.Q8_0])) for _ in range(2)]
    types = [GGMLType.F32, *kinds, GGMLType.I32, GGMLType.I32, GGMLType.I32, GGMLType.F32]
    pool = (d, PAGE_CELLS * n_pool, n_head_kv, 1)
    leaves: list[Shape] = [(d, n_tokens, n_head_kv * group, 1), pool, pool, (n_pages, n_seqs, 1, 1), (n_tokens, 1, 1, 1),
                           (n_tokens, 1, 1, 1), (n_head_kv * group, 1, 1, 1)]  # fmt: skip
    params = {"scale": 0.3, "logit_softcap": draw(st.sampled_from([0.0, 5.0])),
              "window": draw(st.sampled_from([0, 1, 20, 90]))}  # fmt: skip
    out = (d, n_head_kv * group, n_tokens, 1)
    graph, data = draw(_single(op, types, leaves, out, params))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    bounds = {3: (n_pool, n_pages * n_seqs), 4: (PAGE_CELLS * n_pages + 1, n_tokens), 5: (n_seqs, n_tokens)}
    for i, (high, n) in bounds.items():
        data[i] = rng.integers(0, high, n).astype(np.int32).tobytes()
    return graph, data


@st.composite
def _recurrences(draw: st.DrawFn, op: Op) -> tuple[Graph, list[bytes]]:
    n_tokens, n_seqs, n_head, d_head = draw(small), draw(small), draw(st.sampled_from([2, 4])), draw(st.sampled_from([1, 8]))
    types = [GGMLType.F32] * len(op.sources)
    if op.name == "SSM_CONV":
        d_conv, n = draw(small), n_head * d_head
        leaves: list[Shape] = [(d_conv - 1 + n_tokens, n, n_seqs, 1), (d_conv, n, 1, 1)]
        return draw(_single(op, types, leaves, (n, n_tokens, n_seqs, 1), {}))
    d_state, n_group, n_states = draw(st.sampled_from([1, 16])), draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
    shared = (d_state, n_group, n_tokens, n_seqs)
    leaves = [(d_state, d_head, n_head, 500), (d_head, n_head, n_tokens, n_seqs), (n_head, n_tokens, n_seqs, 1),
              (draw(st.sampled_from([1, d_state])), n_head, 1, 1), shared, shared, (n_seqs, 1, 1, 1)]  # fmt: skip
    types[-1] = GGMLType.I32
    n = d_head * n_head * n_seqs * (n_tokens + n_states * d_state)
    return draw(_single(op, types, leaves, (n, 1, 1, 1), {"n_states": n_states}))


def leaf(type_id: int, ne: tuple[int, int, int, int], buffer: int = 0, offset: int = 0) -> Tensor:
    return Tensor(type_id, "NONE", ne, contiguous_nb(type_id, ne), buffer=buffer, offset=offset)


@st.composite
def _leaf_bytes(draw: st.DrawFn, type_id: int, ne: tuple[int, int, int, int]) -> bytes:
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    n = ne[0] * ne[1] * ne[2] * ne[3]
    if type_id == GGMLType.I32:
        return rng.integers(0, 500, n, np.int32).tobytes()
    values = rng.uniform(0.1, 2.0, n) * rng.choice([-1, 1], n)
    if TYPES[type_id].quantized or type_id == GGMLType.BF16:
        info = TYPES[type_id]
        shape = (n // info.block, info.bytes) if info.quantized else (n,)
        return convert(values.astype(np.float32), type_id, shape).tobytes()
    return values.astype({GGMLType.F32: np.float32, GGMLType.F16: np.float16}[GGMLType(type_id)]).tobytes()
