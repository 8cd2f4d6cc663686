"""The op table: every ggml op that a device may be asked for, declared once.

A declaration gives the sources and their types, the typed parameters with their ranges, the rule that the result's
shape follows, the cost, the tolerance and one line of mathematics. Validation on both ends, every device, placement,
the op page in docs/, the conformance suite and the fuzzers read it here.

To add an op: one declaration here, one kernel in workers/kernels/reference.py, one in each fast device that gains by it.
Ids on the wire are positions in the table: append only, and raise PROTOCOL_VERSION.

Source: ggml.c and ggml.h (shape rules, op_params), ggml-cpu/ops.cpp (semantics).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from protocol import limits
from protocol.dtypes import ANY, FLOATS, INTERMEDIATE, NO_QUANTIZE, GGMLType
from protocol.errors import GraphError
from protocol.graph import Graph, Tensor, check_layout, check_no_overlap

F32, F16, BF16, I16, I32, I64 = (
    GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.I16, GGMLType.I32, GGMLType.I64
)  # fmt: skip
WEIGHTS = ANY - INTERMEDIATE - {GGMLType.I8, I16, I32, I64}
COPYABLE = ANY - INTERMEDIATE
STORABLE = COPYABLE - NO_QUANTIZE
_F32, _I32 = frozenset({F32}), frozenset({I32})
_MOVABLE = FLOATS | {I16, I32, GGMLType.I8, I64}


@dataclass(frozen=True, slots=True)
class Param:
    """A word of op_params: its index, its kind ("i32" or "f32") and the range it must lie in (NaN never does)."""

    index: int
    kind: str
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, slots=True)
class Source:
    """A source: its name, the types allowed, and whether it may be left out."""

    name: str
    types: frozenset[GGMLType]
    optional: bool = False


Rule = Callable[[Tensor, "Sources", dict[str, Any]], None]


class Sources(list["Tensor | None"]):
    """The source tensors of a node; `s[i]` of a required source is never None once counted."""

    def req(self, i: int) -> Tensor:
        t = self[i] if i < len(self) else None
        if t is None:
            raise GraphError(f"source {i} is required")
        return t

    def opt(self, i: int) -> Tensor | None:
        return self[i] if i < len(self) else None


@dataclass(frozen=True, slots=True)
class Op:
    """One declaration.

    Attributes:
        name: ggml's name; unary and GLU kinds have their own, and travel as UNARY or GLU with the kind in a parameter.
        writes: index of the source whose bytes the result is (SET_ROWS, CPY), or -1.
        inplace: the result may be a view of source 0.
        nmse: bound of the normalised mean squared error against ggml's own result.
    """

    name: str
    math: str
    sources: tuple[Source, ...]
    rule: Rule
    params: dict[str, Param]
    out: frozenset[GGMLType]
    kind: int = -1
    view: bool = False
    inplace: bool = False
    writes: int = -1
    allow_empty: bool = False
    nmse: float = 1e-7

    def values(self, words: Sequence[int]) -> dict[str, Any]:
        """The parameters of a node by name, decoded and held against their ranges."""
        out: dict[str, Any] = {}
        for name, p in self.params.items():
            word = words[p.index]
            value: Any = word if p.kind == "i32" else struct.unpack("<f", struct.pack("<i", word))[0]
            if not p.low <= value <= p.high:
                raise GraphError(f"{self.name}: parameter {name}: expected {p.low} to {p.high}, got {value}")
            out[name] = value
        return out


def need(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)


def _same(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a = s.req(0)
    need(t.ne == a.ne and t.type == a.type, f"result {t.ne} type {t.type} must be as source 0, {a.ne} type {a.type}")


def _same_shape(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    need(t.ne == s.req(0).ne, f"result {t.ne} must have the shape of source 0, {s.req(0).ne}")


def _repeats(big: Tensor, small: Tensor, what: str) -> None:
    ok = all(n and b % n == 0 for b, n in zip(big.ne, small.ne, strict=True))
    need(ok, f"{what}: {small.ne} does not repeat to {big.ne}")


def _binary(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    _same_shape(t, s, p)
    _repeats(s.req(0), s.req(1), "source 1")


def _add_id(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b, ids = s.req(0), s.req(1), s.req(2)
    _same(t, s, p)
    need(b.ne[0] == a.ne[0] and b.ne[2] == b.ne[3] == 1, f"source 1 {b.ne} must be [{a.ne[0]}, n_expert]")
    need(ids.ne[:2] == a.ne[1:3] and a.ne[3] == 1, f"ids {ids.ne} must be {a.ne[1:3]}")


def _glu(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b = s.req(0), s.opt(1)
    if b is None:
        need(t.ne == (a.ne[0] // 2, *a.ne[1:]), f"result {t.ne} must be half of source 0, {a.ne}")
    else:
        need(t.ne == a.ne == b.ne and a.type == b.type, f"gate {b.ne} and result {t.ne} must be as source 0, {a.ne}")
    need(t.type == a.type, "the result has the type of source 0")


def _rows_to_one(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    need(t.ne == (1, *s.req(0).ne[1:]), f"result {t.ne} must be one element a row of {s.req(0).ne}")


def _argmax(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a = s.req(0)
    need(a.ne[2] == a.ne[3] == 1 and t.ne == (a.ne[1], 1, 1, 1), f"result {t.ne} must be one index a row of {a.ne}")


def _top_k(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a = s.req(0)
    need(t.ne[1:] == a.ne[1:], f"result {t.ne} must have the rows of {a.ne}")
    need(1 <= t.ne[0] <= a.ne[0], f"k = {t.ne[0]} must lie in 1..{a.ne[0]}")


def _repeat(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    _repeats(t, s.req(0), "source 0")
    need(t.type == s.req(0).type, "the result has the type of source 0")


def _concat(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b, dim = s.req(0), s.req(1), p["dim"]
    need(a.type == b.type == t.type, "sources and result have one type")
    want = tuple(x + y if i == dim else x for i, (x, y) in enumerate(zip(a.ne, b.ne, strict=True)))
    need(all(x == y for i, (x, y) in enumerate(zip(a.ne, b.ne, strict=True)) if i != dim), f"{a.ne} and {b.ne} differ")
    need(t.ne == want, f"result must be {want}, got {t.ne}")


def _mul_mat(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b = s.req(0), s.req(1)
    need(a.ne[0] == b.ne[0], f"rows of {a.ne} and {b.ne} differ in length")
    need(a.ne[2] > 0 and a.ne[3] > 0 and b.ne[2] % a.ne[2] == 0 and b.ne[3] % a.ne[3] == 0,
         f"source 0 {a.ne} does not repeat to {b.ne}")  # fmt: skip
    need(t.ne == (a.ne[1], b.ne[1], b.ne[2], b.ne[3]), f"result {t.ne} does not fit {a.ne} x {b.ne}")


def _mul_mat_id(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b, ids = s.req(0), s.req(1), s.req(2)
    need(a.ne[3] == 1 and b.ne[3] == 1 and ids.ne[2] == ids.ne[3] == 1, "experts, columns and ids are at most 3-d")
    need(a.ne[0] == b.ne[0], f"rows of {a.ne} and {b.ne} differ in length")
    need(b.ne[1] > 0 and ids.ne[0] % b.ne[1] == 0, f"columns {b.ne} do not repeat to ids {ids.ne}")
    need(ids.ne[1] == b.ne[2], f"ids {ids.ne} and columns {b.ne} differ in tokens")
    need(t.ne == (a.ne[1], ids.ne[0], b.ne[2], 1), f"result {t.ne} does not fit {a.ne}, {b.ne}, ids {ids.ne}")


def _out_prod(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b = s.req(0), s.req(1)
    need(a.ne[1] == b.ne[1], f"columns of {a.ne} and {b.ne} differ")
    need(a.ne[2] > 0 and a.ne[3] > 0 and b.ne[2] % a.ne[2] == 0 and b.ne[3] % a.ne[3] == 0,
         f"source 0 {a.ne} does not repeat to {b.ne}")  # fmt: skip
    need(t.ne == (a.ne[0], b.ne[0], b.ne[2], b.ne[3]), f"result {t.ne} does not fit {a.ne} x {b.ne}")


def _view(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    need(t.view_src >= 0, "a view names its view_src")
    need(t.type == s.req(0).type, "a view keeps its type")


def _reshape(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    _view(t, s, p)
    need(t.n_elements == s.req(0).n_elements, f"{s.req(0).ne} does not reshape to {t.ne}")


def _copy(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a = s.req(0)
    need(t.n_elements == a.n_elements, f"source has {a.n_elements} elements, result {t.n_elements}")
    b = s.opt(1)
    if b is not None:
        need(t.ne == b.ne and t.type == b.type, f"result {t.ne} type {t.type} must be its target, {b.ne} type {b.type}")


def _get_rows(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, idx = s.req(0), s.req(1)
    need(idx.ne[3] == 1 and a.ne[2] == idx.ne[1] and a.ne[3] == idx.ne[2], f"rows {a.ne} and indices {idx.ne} differ")
    need(t.ne == (a.ne[0], *idx.ne[:3]), f"result {t.ne} must be {(a.ne[0], *idx.ne[:3])}")
    need(t.type == (I32 if a.type == I32 else F32), f"the result is {'I32' if a.type == I32 else 'F32'}")


def _set_rows(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    b, idx, a = s.req(0), s.req(1), s.req(2)
    need(t.ne == a.ne and t.type == a.type, "the result is its target")
    need(a.ne[0] == b.ne[0] and a.ne[2] == b.ne[2] and a.ne[3] == b.ne[3], f"rows {b.ne} do not fit target {a.ne}")
    need(idx.ne[0] == b.ne[1] and idx.ne[3] == 1, f"{b.ne[1]} rows and {idx.ne[0]} indices")
    need(idx.ne[1] > 0 and idx.ne[2] > 0 and b.ne[2] % idx.ne[1] == 0 and b.ne[3] % idx.ne[2] == 0,
         f"indices {idx.ne} do not repeat to rows {b.ne}")  # fmt: skip


def _soft_max(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, mask, sinks = s.req(0), s.opt(1), s.opt(2)
    _same(t, s, p)
    if mask is not None:
        need(mask.ne[0] == a.ne[0] and mask.ne[1] >= a.ne[1], f"mask {mask.ne} does not cover {a.ne}")
        need(mask.ne[2] > 0 and mask.ne[3] > 0 and a.ne[2] % mask.ne[2] == 0 and a.ne[3] % mask.ne[3] == 0,
             f"mask {mask.ne} does not repeat to {a.ne}")  # fmt: skip
    if sinks is not None:
        need(sinks.ne == (a.ne[2], 1, 1, 1), f"sinks {sinks.ne} must be one a head of {a.ne}")
    need(p["max_bias"] == 0.0 or mask is not None, "max_bias needs a mask")


ROPE_NEOX, ROPE_MROPE, ROPE_VISION, ROPE_IMROPE = 2, 8, 24, 40


def _rope(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, pos, freqs = s.req(0), s.req(1), s.opt(2)
    _same(t, s, p)
    n_dims, mode, first = p["n_dims"], p["mode"], p["n_offs"]
    need(mode in (0, ROPE_NEOX, ROPE_MROPE, ROPE_VISION, ROPE_IMROPE), f"rope mode {mode} is none of 0, 2, 8, 24, 40")
    need(n_dims % 2 == 0 and first % 2 == 0 and first + n_dims <= a.ne[0],
         f"{n_dims} dimensions from {first} on are even and fit a row of {a.ne[0]}")  # fmt: skip
    n_pos = a.ne[2] * (4 if mode & ROPE_MROPE else 1)
    need(pos.ne == (n_pos, 1, 1, 1), f"positions {pos.ne} must be [{n_pos}]")
    if mode & ROPE_MROPE:
        sections = [p[f"section_{i}"] for i in range(4)]
        need(sum(sections) > 0, "mrope needs a section that is not empty")
        if mode == ROPE_VISION:
            need(n_dims == a.ne[0] // 2, f"vision rope turns halves: n_dims {n_dims}, row {a.ne[0]}")
    if freqs is not None:
        need(freqs.ne[0] >= n_dims // 2, f"frequency factors {freqs.ne} are fewer than {n_dims // 2}")
    need(p["freq_base"] > 0, "freq_base is positive")


def _flash_attn(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    q, k, v, mask, sinks = s.req(0), s.req(1), s.req(2), s.opt(3), s.opt(4)
    need(q.ne[0] == k.ne[0], f"rows of q {q.ne} and k {k.ne} differ")
    need(k.ne[1:] == v.ne[1:], f"k {k.ne} and v {v.ne} differ in cells, heads or sequences")
    need(k.ne[2] > 0 and k.ne[3] > 0 and q.ne[2] % k.ne[2] == 0 and q.ne[3] % k.ne[3] == 0,
         f"heads of k {k.ne} do not repeat to q {q.ne}")  # fmt: skip
    need(t.ne == (v.ne[0], q.ne[2], q.ne[1], q.ne[3]), f"result {t.ne} does not fit q {q.ne}, v {v.ne}")
    if mask is not None:
        need(mask.ne[0] == k.ne[1] and mask.ne[1] >= q.ne[1], f"mask {mask.ne} does not cover {q.ne} x {k.ne}")
        need(mask.ne[2] > 0 and mask.ne[3] > 0 and q.ne[2] % mask.ne[2] == 0 and q.ne[3] % mask.ne[3] == 0,
             f"mask {mask.ne} does not repeat to q {q.ne}")  # fmt: skip
    if sinks is not None:
        need(sinks.ne == (q.ne[2], 1, 1, 1), f"sinks {sinks.ne} must be one a head of {q.ne}")
    need(p["max_bias"] == 0.0 or mask is not None, "max_bias needs a mask")


def _any(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    pass


def _arange(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    need(p["step"] != 0 and math.isfinite(p["start"]) and math.isfinite(p["stop"]), "arange is finite, its step not 0")
    n = math.ceil((p["stop"] - p["start"]) / p["step"])
    need(t.ne == (n, 1, 1, 1), f"result must be [{n}], got {t.ne}")


_TABLE: list[Op] = []


def _op(
    name: str,
    maths: str,
    sources: Sequence[Source],
    rule: Rule,
    params: dict[str, Param] | None = None,
    out: frozenset[GGMLType] = _F32,
    **more: Any,
) -> None:
    _TABLE.append(Op(name, maths, tuple(sources), rule, params or {}, out, **more))


def _x(types: frozenset[GGMLType] = FLOATS) -> list[Source]:
    return [Source("x", types)]


_PREC = Param(0, "i32", 0, 1 << 16)
_EPS = {"eps": Param(0, "f32", 0.0, 1e30)}

_op("NONE", "a leaf: bytes from a buffer or from GRAPH_COMPUTE", [], _any, out=COPYABLE, allow_empty=True)
for _name, _rule, _line in [
    ("VIEW", _view, "y shares the bytes of x at an offset, with shape and strides of its own"),
    ("RESHAPE", _reshape, "y is x with another shape"),
    ("PERMUTE", _reshape, "y is x with its dimensions in another order"),
    ("TRANSPOSE", _reshape, "y is x with dimensions 0 and 1 exchanged"),
]:
    _op(_name, _line, _x(ANY), _rule, out=ANY, view=True, allow_empty=True)

for _name, _line in [("ADD", "y = a + b"), ("SUB", "y = a - b"), ("MUL", "y = a * b"), ("DIV", "y = a / b")]:
    _op(_name, _line + ", b repeated to the shape of a", [Source("a", FLOATS), Source("b", FLOATS)], _binary,
        out=FLOATS, inplace=True, nmse=1e-6 if _name == "ADD" else 1e-7, allow_empty=True)  # fmt: skip
_op("ADD_ID", "y[:, i, t] = a[:, i, t] + b[:, ids[i, t]]",
    [Source("a", _F32), Source("b", _F32), Source("ids", _I32)], _add_id, inplace=True)  # fmt: skip
for _name, _line in [("SQR", "y = x^2"), ("SQRT", "y = sqrt(x)"), ("LOG", "y = ln(x)"), ("SIN", "y = sin(x)"),
                     ("COS", "y = cos(x)")]:  # fmt: skip
    _op(_name, _line, _x(), _same, out=FLOATS, inplace=True)
_op("SCALE", "y = scale * x + bias", _x(), _same, {"scale": Param(0, "f32"), "bias": Param(1, "f32")}, FLOATS,
    inplace=True)  # fmt: skip
_op("CLAMP", "y = min(max(x, low), high)", _x(), _same, {"low": Param(0, "f32"), "high": Param(1, "f32")}, FLOATS,
    inplace=True)  # fmt: skip
_op("LEAKY_RELU", "y = x if x > 0 else slope * x", _x(), _same, {"slope": Param(0, "f32")}, FLOATS, inplace=True)
_op("SUM_ROWS", "y[r] = sum of row r", _x(_F32), _rows_to_one)
_op("MEAN", "y[r] = mean of row r", _x(_F32), _rows_to_one)
_op("CUMSUM", "y[i] = x[0] + ... + x[i] in each row", _x(_F32), _same)
_op("ARGMAX", "y[r] = index of the first largest element of row r", _x(_F32), _argmax, out=_I32, nmse=0.0)
_op("ARGSORT", "y = indices that sort each row", _x(_F32), _same_shape, {"order": Param(0, "i32", 0, 1)}, _I32)
_op("TOP_K", "y = indices of the k largest of each row, in no promised order", _x(_F32), _top_k, out=_I32)
_op("REPEAT", "y = x tiled", _x(_MOVABLE), _repeat, out=_MOVABLE)
_op("CONCAT", "y = a then b along a dimension", [Source("a", _MOVABLE), Source("b", _MOVABLE)], _concat,
    {"dim": Param(0, "i32", 0, 3)}, _MOVABLE)  # fmt: skip
_op("NORM", "y = (x - mean) / sqrt(var + eps) in each row", _x(_F32), _same, _EPS, inplace=True)
_op("RMS_NORM", "y = x / sqrt(mean(x^2) + eps) in each row", _x(_F32), _same, _EPS, inplace=True)
_op("L2_NORM", "y = x / max(|x|, eps) in each row", _x(_F32), _same, _EPS, inplace=True)
_op("MUL_MAT", "y[i, j] = sum over k of a[k, i] * b[k, j]; a repeated over ne[2], ne[3]",
    [Source("a", WEIGHTS), Source("b", FLOATS)], _mul_mat, {"prec": _PREC}, nmse=5e-4)  # fmt: skip
_op("MUL_MAT_ID", "y[:, i, t] = a[:, :, ids[i, t]]^T b[:, i mod n, t]",
    [Source("a", WEIGHTS), Source("b", _F32), Source("ids", _I32)], _mul_mat_id, {"prec": _PREC}, nmse=5e-4)  # fmt: skip
_op("OUT_PROD", "y[i, j] = sum over k of a[i, k] * b[j, k]", [Source("a", WEIGHTS), Source("b", _F32)], _out_prod,
    nmse=5e-4)  # fmt: skip
_op("CPY", "y = x, converted and written into the target", [Source("x", COPYABLE), Source("target", STORABLE)], _copy,
    out=STORABLE, writes=1, allow_empty=True, nmse=1e-6)  # fmt: skip
_op("DUP", "y = x, converted", _x(COPYABLE), _copy, out=STORABLE, allow_empty=True)
_op("CONT", "y = x, made contiguous", _x(COPYABLE), _copy, out=STORABLE, allow_empty=True)
_op("GET_ROWS", "y[:, r] = a[:, ids[r]], as F32", [Source("a", COPYABLE), Source("ids", _I32)], _get_rows,
    out=frozenset({F32, I32}), allow_empty=True)  # fmt: skip
_op("SET_ROWS", "target[:, ids[r]] = x[:, r], converted",
    [Source("x", frozenset({F32, F16})), Source("ids", frozenset({I32, I64})), Source("target", STORABLE)],
    _set_rows, out=STORABLE, writes=2, allow_empty=True, nmse=1e-6)  # fmt: skip
_op("DIAG_MASK_INF", "y[i, j] = -inf where i > n_past + j, else x", _x(_F32), _same,
    {"n_past": Param(0, "i32", 0, 1 << 30)}, inplace=True)  # fmt: skip
_op("FILL", "y = c", _x(FLOATS), _same, {"c": Param(0, "f32")}, FLOATS, inplace=True)
_op("ARANGE", "y[i] = start + i * step", [], _arange,
    {"start": Param(0, "f32"), "stop": Param(1, "f32"), "step": Param(2, "f32")})  # fmt: skip
_op("SOFT_MAX", "y = softmax(scale * x + slope(head) * mask) in each row; sinks join the sum only",
    [Source("x", _F32), Source("mask", frozenset({F32, F16}), True), Source("sinks", _F32, True)], _soft_max,
    {"scale": Param(0, "f32", -1e30, 1e30), "max_bias": Param(1, "f32", 0.0, 1e4)}, inplace=True, nmse=1e-6)  # fmt: skip
_op("ROPE", "pairs of x turned by position * freq_base^(-2i / n_dims), with YaRN scaling",
    [Source("x", frozenset({F32, F16})), Source("positions", _I32), Source("factors", _F32, True)], _rope,
    {"n_dims": Param(1, "i32", 2, 1 << 16), "mode": Param(2, "i32", 0, 255),
     "n_ctx_orig": Param(4, "i32", 0, 1 << 30), "freq_base": Param(5, "f32", 0.0, 1e30),
     "freq_scale": Param(6, "f32", -1e30, 1e30), "ext_factor": Param(7, "f32", -1e30, 1e30),
     "attn_factor": Param(8, "f32", -1e30, 1e30), "beta_fast": Param(9, "f32", -1e30, 1e30),
     "beta_slow": Param(10, "f32", -1e30, 1e30), **{f"section_{i}": Param(11 + i, "i32", 0, 1 << 16) for i in range(4)},
     "n_offs": Param(15, "i32", 0, 1 << 16)},
    frozenset({F32, F16}), inplace=True)  # fmt: skip
_op("FLASH_ATTN_EXT", "y = softmax(scale * cap(q k^T) + slope(head) * mask) v; sinks join the sum only",
    [Source("q", _F32), Source("k", WEIGHTS), Source("v", WEIGHTS), Source("mask", frozenset({F16}), True),
     Source("sinks", _F32, True)], _flash_attn,
    {"scale": Param(0, "f32", -1e30, 1e30), "max_bias": Param(1, "f32", 0.0, 1e4),
     "logit_softcap": Param(2, "f32", 0.0, 1e30), "prec": Param(3, "i32", 0, 1 << 16)},
    nmse=5e-4)  # fmt: skip

_XIELU = {n: Param(i + 1, "f32", -1e30, 1e30) for i, n in enumerate(("alpha_n", "alpha_p", "beta", "eps"))}
_UNARY = [
    ("ABS", "y = |x|"), ("SGN", "y = sign(x)"), ("NEG", "y = -x"), ("STEP", "y = 1 if x > 0 else 0"),
    ("TANH", "y = tanh(x)"), ("ELU", "y = x if x > 0 else exp(x) - 1"), ("RELU", "y = max(x, 0)"),
    ("SIGMOID", "y = 1 / (1 + exp(-x))"), ("GELU", "y = x/2 (1 + tanh(sqrt(2/pi) x (1 + 0.044715 x^2)))"),
    ("GELU_QUICK", "y = x / (1 + exp(-1.702 x))"), ("SILU", "y = x / (1 + exp(-x))"),
    ("HARDSWISH", "y = x min(1, max(0, (x + 3) / 6))"), ("HARDSIGMOID", "y = min(1, max(0, (x + 3) / 6))"),
    ("EXP", "y = exp(x)"), ("EXPM1", "y = exp(x) - 1"), ("SOFTPLUS", "y = ln(1 + exp(x)), x above 20"),
    ("GELU_ERF", "y = x/2 (1 + erf(x / sqrt(2)))"),
    ("XIELU", "y = alpha_p x^2 + beta x if x > 0 else alpha_n (expm1(min(x, eps)) - x) + beta x"),
    ("FLOOR", "y = floor(x)"), ("CEIL", "y = ceil(x)"), ("ROUND", "y = x rounded, halves away from 0"),
    ("TRUNC", "y = x cut to an integer"),
]  # fmt: skip
UNARY_KINDS = tuple(name for name, _ in _UNARY)
"""By number: params[0] of UNARY, which counts as ggml's enum does."""
for _kind, (_name, _line) in enumerate(_UNARY):
    _op(_name, _line, _x(), _same, _XIELU if _name == "XIELU" else None, FLOATS, kind=_kind, inplace=True)

_SPLIT = [Source("x", FLOATS), Source("gate", FLOATS, True)]
_SWAP = {"swapped": Param(1, "i32", 0, 1)}
_LIMIT = {**_SWAP, "alpha": Param(2, "f32", -1e30, 1e30), "limit": Param(3, "f32", 0.0, 1e30)}
_GLU = [
    ("REGLU", "y = relu(x) g"), ("GEGLU", "y = gelu(x) g"), ("SWIGLU", "y = silu(x) g"),
    ("SWIGLU_OAI", "x' = min(x, limit), y = x' / (1 + exp(-alpha x')) (1 + clamp(g, -limit, limit))"),
    ("GEGLU_ERF", "y = gelu_erf(x) g"), ("GEGLU_QUICK", "y = gelu_quick(x) g"),
    ("SWIGLU_CLAMP", "y = silu(min(x, limit)) clamp(g, -limit, limit)"),
]  # fmt: skip
GLU_KINDS = tuple(name for name, _ in _GLU)
"""The same for GLU."""
for _kind, (_name, _line) in enumerate(_GLU):
    _op(_name, _line + "; one source holds x and g in its halves", _SPLIT, _glu,
        _LIMIT if _name in ("SWIGLU_OAI", "SWIGLU_CLAMP") else _SWAP, FLOATS, kind=_kind)  # fmt: skip

OPS: dict[str, Op] = {o.name: o for o in _TABLE}
"""Every declaration by its finest name (SILU, not UNARY)."""

OP_ID: dict[str, int] = {
    "NONE": 0, "VIEW": 1, "RESHAPE": 2, "PERMUTE": 3, "TRANSPOSE": 4, "ADD": 5, "SUB": 6, "MUL": 7, "DIV": 8,
    "ADD_ID": 9, "SQR": 10, "SQRT": 11, "LOG": 12, "SIN": 13, "COS": 14, "SCALE": 15, "CLAMP": 16, "LEAKY_RELU": 17,
    "SUM_ROWS": 18, "MEAN": 19, "CUMSUM": 20, "ARGMAX": 21, "ARGSORT": 22, "TOP_K": 23, "REPEAT": 24, "CONCAT": 25,
    "NORM": 26, "RMS_NORM": 27, "L2_NORM": 28, "MUL_MAT": 29, "MUL_MAT_ID": 30, "OUT_PROD": 31, "CPY": 32, "DUP": 33,
    "CONT": 34, "GET_ROWS": 35, "SET_ROWS": 36, "DIAG_MASK_INF": 37, "FILL": 38, "ARANGE": 39, "SOFT_MAX": 40,
    "ROPE": 41, "FLASH_ATTN_EXT": 42, "UNARY": 43, "GLU": 44,
}  # fmt: skip
"""What travels for a name. An id is never changed nor used again; a new op has the next one."""
OP_NAME: dict[int, str] = {number: name for name, number in OP_ID.items()}

if OP_ID.keys() - {"UNARY", "GLU"} != {o.name for o in _TABLE if o.kind < 0} or len(OP_NAME) != len(OP_ID):
    raise AssertionError("protocol/ops.py: each op has an id of its own in OP_ID, and each id an op")


def op_of(t: Tensor) -> Op:
    """The declaration of a node: unary and GLU kinds are told apart by params[0]."""
    if t.op in ("UNARY", "GLU"):
        kinds = UNARY_KINDS if t.op == "UNARY" else GLU_KINDS
        if not 0 <= t.params[0] < len(kinds):
            raise GraphError(f"{t.op} kind {t.params[0]} is not in the table of {len(kinds)}")
        return OPS[kinds[t.params[0]]]
    op = OPS.get(t.op)
    if op is None or op.kind >= 0:
        raise GraphError(f"op {t.op!r} is not in the table")
    return op


def validate(graph: Graph) -> None:
    """Hold every tensor of a graph against the table. Iterative, linear, and touches no data.

    Errors: GraphError names the first tensor that is wrong.
    """
    tensors = graph.tensors
    if len(tensors) > limits.MAX_GRAPH_TENSORS:
        raise GraphError(f"graph: at most {limits.MAX_GRAPH_TENSORS} tensors, got {len(tensors)}")
    roots: list[int] = []
    starts: list[int] = []
    for what, indices in (("input", graph.inputs), ("output", graph.outputs)):
        if len(set(indices)) != len(indices) or any(not 0 <= i < len(tensors) for i in indices):
            raise GraphError(f"graph: {what} indices {indices[:8]} repeat or point outside {len(tensors)} tensors")
    inputs = set(graph.inputs)
    scratch = 0
    for i, t in enumerate(tensors):
        check_layout(tensors, i, roots, starts)
        try:
            _validate_node(tensors, t, i)
        except GraphError as e:
            wrong = GraphError(f"tensor {i} ({t.op}): {e}")
            wrong.tensor = i
            raise wrong from None
        if op_of(t).writes >= 0:
            target = t.src[op_of(t).writes]
            if (roots[i], starts[i], t.nb) != (roots[target], starts[target], tensors[target].nb):
                raise GraphError(f"tensor {i} ({t.op}): its bytes must be those of its target, tensor {target}")
        if t.op == "NONE" and t.view_src < 0:
            if i in inputs and t.buffer:
                raise GraphError(f"tensor {i}: an input has no buffer of its own")
            if i not in inputs and not t.buffer:
                raise GraphError(f"tensor {i}: a leaf is an input or has a buffer; this one has neither")
        elif i in inputs:
            raise GraphError(f"tensor {i}: only a leaf can be an input")
        if t.view_src < 0 and not t.buffer:
            scratch += t.extent_bytes()
            if scratch > limits.MAX_TENSOR_BYTES:
                raise GraphError(f"graph: its results need more than {limits.MAX_TENSOR_BYTES} bytes")


def _validate_node(tensors: Sequence[Tensor], t: Tensor, i: int) -> None:
    op = op_of(t)
    if t.op == "NONE":
        need(not t.src, "a leaf has no sources")
        return
    if len(t.src) > len(op.sources):
        raise GraphError(f"at most {len(op.sources)} sources, got {len(t.src)}")
    s = Sources()
    for j, source in enumerate(op.sources):
        index = t.src[j] if j < len(t.src) else -1
        if index < 0:
            need(index == -1 and source.optional, f"source {j} ({source.name}) is required, got {index}")
            s.append(None)
            continue
        need(index < i, f"source {j} is tensor {index}, which does not come before it")
        a = tensors[index]
        need(a.type in source.types, f"source {j} ({source.name}) may not be of type {a.type}")
        need(op.allow_empty or 0 not in a.ne, f"source {j} ({source.name}) is empty: {a.ne}")
        s.append(a)
    need(t.type in op.out, f"the result may not be of type {t.type}")
    need(op.allow_empty or 0 not in t.ne, f"the result is empty: {t.ne}")
    op.rule(t, s, op.values(t.params))
    if op.view:
        return
    if op.writes >= 0:
        need(t.view_src >= 0, f"writes into source {op.writes}; its view_src must say so")
    elif t.view_src >= 0:
        need(op.inplace, "cannot work in place")
    if t.view_src >= 0:
        check_no_overlap(t, i)

