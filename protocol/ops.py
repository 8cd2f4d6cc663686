"""The op table: every ggml op that a device may be asked for, declared once.

A declaration gives the sources and their types, the typed parameters with their ranges, the rule that the result's
shape follows (`protocol/rules.py`), the tolerance and one line of mathematics. Validation on both ends, every device,
placement, the op page in docs/, the conformance suite and the fuzzers read it here.

To add an op: one declaration and one id here, one kernel in workers/kernels/reference.py, one in each fast device that
gains by it. Raise PROTOCOL_VERSION.

Source: ggml.c and ggml.h (op_params), ggml-cpu/ops.cpp (semantics).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protocol import rules
from protocol.dtypes import ANY, FLOATS, INTEGERS, INTERMEDIATE, NO_QUANTIZE, GGMLType
from protocol.errors import GraphError
from protocol.graph import Tensor, f32_of
from protocol.rules import Rule

F32, F16, I32, I64 = GGMLType.F32, GGMLType.F16, GGMLType.I32, GGMLType.I64
WEIGHTS = ANY - INTERMEDIATE - INTEGERS
COPYABLE = ANY - INTERMEDIATE
STORABLE = COPYABLE - NO_QUANTIZE
_F32, _I32 = frozenset({F32}), frozenset({I32})
_MOVABLE = FLOATS | INTEGERS


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
            value: Any = word if p.kind == "i32" else f32_of(word)
            if not p.low <= value <= p.high:
                raise GraphError(f"{self.name}: parameter {name}: expected {p.low} to {p.high}, got {value}")
            out[name] = value
        return out


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

_op("NONE", "a leaf: bytes from a buffer or from GRAPH_COMPUTE", [], rules.unbound, out=COPYABLE, allow_empty=True)
for _name, _rule, _line in [
    ("VIEW", rules.view, "y shares the bytes of x at an offset, with shape and strides of its own"),
    ("RESHAPE", rules.reshape, "y is x with another shape"),
    ("PERMUTE", rules.reshape, "y is x with its dimensions in another order"),
    ("TRANSPOSE", rules.reshape, "y is x with dimensions 0 and 1 exchanged"),
]:
    _op(_name, _line, _x(ANY), _rule, out=ANY, view=True, allow_empty=True)

for _name, _line in [("ADD", "y = a + b"), ("SUB", "y = a - b"), ("MUL", "y = a * b"), ("DIV", "y = a / b")]:
    _op(_name, _line + ", b repeated to the shape of a", [Source("a", FLOATS), Source("b", FLOATS)], rules.binary,
        out=FLOATS, inplace=True, nmse=1e-6 if _name == "ADD" else 1e-7, allow_empty=True)  # fmt: skip
_op("ADD_ID", "y[:, i, t] = a[:, i, t] + b[:, ids[i, t]]",
    [Source("a", _F32), Source("b", _F32), Source("ids", _I32)], rules.add_id, inplace=True)  # fmt: skip
for _name, _line in [("SQR", "y = x^2"), ("SQRT", "y = sqrt(x)"), ("LOG", "y = ln(x)"), ("SIN", "y = sin(x)"),
                     ("COS", "y = cos(x)")]:  # fmt: skip
    _op(_name, _line, _x(), rules.same, out=FLOATS, inplace=True)
_op("SCALE", "y = scale * x + bias", _x(), rules.same, {"scale": Param(0, "f32"), "bias": Param(1, "f32")}, FLOATS,
    inplace=True)  # fmt: skip
_op("CLAMP", "y = min(max(x, low), high)", _x(), rules.same, {"low": Param(0, "f32"), "high": Param(1, "f32")}, FLOATS,
    inplace=True)  # fmt: skip
_op("LEAKY_RELU", "y = x if x > 0 else slope * x", _x(), rules.same, {"slope": Param(0, "f32")}, FLOATS, inplace=True)
_op("SUM_ROWS", "y[r] = sum of row r", _x(_F32), rules.rows_to_one)
_op("MEAN", "y[r] = mean of row r", _x(_F32), rules.rows_to_one)
_op("CUMSUM", "y[i] = x[0] + ... + x[i] in each row", _x(_F32), rules.same)
_op("ARGMAX", "y[r] = index of the first largest element of row r", _x(_F32), rules.argmax, out=_I32, nmse=0.0)
_op("ARGSORT", "y = indices that sort each row", _x(_F32), rules.same_shape, {"order": Param(0, "i32", 0, 1)}, _I32)
_op("TOP_K", "y = indices of the k largest of each row, in no promised order", _x(_F32), rules.top_k, out=_I32)
_op("REPEAT", "y = x tiled", _x(_MOVABLE), rules.repeat, out=_MOVABLE)
_op("CONCAT", "y = a then b along a dimension", [Source("a", _MOVABLE), Source("b", _MOVABLE)], rules.concat,
    {"dim": Param(0, "i32", 0, 3)}, _MOVABLE)  # fmt: skip
_op("NORM", "y = (x - mean) / sqrt(var + eps) in each row", _x(_F32), rules.same, _EPS, inplace=True)
_op("RMS_NORM", "y = x / sqrt(mean(x^2) + eps) in each row", _x(_F32), rules.same, _EPS, inplace=True)
_op("L2_NORM", "y = x / max(|x|, eps) in each row", _x(_F32), rules.same, _EPS, inplace=True)
_op("MUL_MAT", "y[i, j] = sum over k of a[k, i] * b[k, j]; a repeated over ne[2], ne[3]",
    [Source("a", WEIGHTS), Source("b", FLOATS)], rules.mul_mat, {"prec": _PREC}, nmse=5e-4)  # fmt: skip
_op("MUL_MAT_ID", "y[:, i, t] = a[:, :, ids[i, t]]^T b[:, i mod n, t]",
    [Source("a", WEIGHTS), Source("b", _F32), Source("ids", _I32)], rules.mul_mat_id, {"prec": _PREC},
    nmse=5e-4)  # fmt: skip
_op("OUT_PROD", "y[i, j] = sum over k of a[i, k] * b[j, k]", [Source("a", WEIGHTS), Source("b", _F32)], rules.out_prod,
    nmse=5e-4)  # fmt: skip
_op("CPY", "y = x, converted and written into the target", [Source("x", COPYABLE), Source("target", STORABLE)], rules.copy,
    out=STORABLE, writes=1, allow_empty=True, nmse=1e-6)  # fmt: skip
_op("DUP", "y = x, converted", _x(COPYABLE), rules.copy, out=STORABLE, allow_empty=True)
_op("CONT", "y = x, made contiguous", _x(COPYABLE), rules.copy, out=STORABLE, allow_empty=True)
_op("GET_ROWS", "y[:, r] = a[:, ids[r]], as F32", [Source("a", COPYABLE), Source("ids", _I32)], rules.get_rows,
    out=frozenset({F32, I32}), allow_empty=True)  # fmt: skip
_op("SET_ROWS", "target[:, ids[r]] = x[:, r], converted",
    [Source("x", frozenset({F32, F16})), Source("ids", frozenset({I32, I64})), Source("target", STORABLE)],
    rules.set_rows, out=STORABLE, writes=2, allow_empty=True, nmse=1e-6)  # fmt: skip
_op("DIAG_MASK_INF", "y[i, j] = -inf where i > n_past + j, else x", _x(_F32), rules.same,
    {"n_past": Param(0, "i32", 0, 1 << 30)}, inplace=True)  # fmt: skip
_op("FILL", "y = c", _x(FLOATS), rules.same, {"c": Param(0, "f32")}, FLOATS, inplace=True)
_op("ARANGE", "y[i] = start + i * step", [], rules.arange,
    {"start": Param(0, "f32"), "stop": Param(1, "f32"), "step": Param(2, "f32")})  # fmt: skip
_op("SOFT_MAX", "y = softmax(scale * x + slope(head) * mask) in each row; sinks join the sum only",
    [Source("x", _F32), Source("mask", frozenset({F32, F16}), True), Source("sinks", _F32, True)], rules.soft_max,
    {"scale": Param(0, "f32", -1e30, 1e30), "max_bias": Param(1, "f32", 0.0, 1e4)}, inplace=True, nmse=1e-6)  # fmt: skip
_op("ROPE", "pairs of x turned by position * freq_base^(-2i / n_dims), with YaRN scaling",
    [Source("x", frozenset({F32, F16})), Source("positions", _I32), Source("factors", _F32, True)], rules.rope,
    {"n_dims": Param(1, "i32", 2, 1 << 16), "mode": Param(2, "i32", 0, 255),
     "n_ctx_orig": Param(4, "i32", 0, 1 << 30), "freq_base": Param(5, "f32", 0.0, 1e30),
     "freq_scale": Param(6, "f32", -1e30, 1e30), "ext_factor": Param(7, "f32", -1e30, 1e30),
     "attn_factor": Param(8, "f32", -1e30, 1e30), "beta_fast": Param(9, "f32", -1e30, 1e30),
     "beta_slow": Param(10, "f32", -1e30, 1e30), **{f"section_{i}": Param(11 + i, "i32", 0, 1 << 16) for i in range(4)},
     "n_offs": Param(15, "i32", 0, 1 << 16)},
    frozenset({F32, F16}), inplace=True)  # fmt: skip
_op("FLASH_ATTN_EXT", "y = softmax(scale * cap(q k^T) + slope(head) * mask) v; sinks join the sum only",
    [Source("q", _F32), Source("k", WEIGHTS), Source("v", WEIGHTS), Source("mask", frozenset({F16}), True),
     Source("sinks", _F32, True)], rules.flash_attn,
    {"scale": Param(0, "f32", -1e30, 1e30), "max_bias": Param(1, "f32", 0.0, 1e4),
     "logit_softcap": Param(2, "f32", 0.0, 1e30), "prec": Param(3, "i32", 0, 1 << 16)},
    nmse=5e-4)  # fmt: skip
_op("PAGED_ATTN", "FLASH_ATTN_EXT over a sequence's cells in their order: cell i lies at pages[i / 64] * 64 + i % 64, and a "
    "token sees the last window of the first n_seen",
    [Source("q", _F32), Source("k", frozenset({F16, GGMLType.Q8_0})), Source("v", frozenset({F16, GGMLType.Q8_0})),
     Source("pages", _I32), Source("n_seen", _I32), Source("rows", _I32, True), Source("sinks", _F32, True)],
    rules.paged_attn,
    {"scale": Param(0, "f32", -1e30, 1e30), "logit_softcap": Param(1, "f32", 0.0, 1e30),
     "window": Param(2, "i32", 0, (1 << 31) - 1)}, nmse=5e-4)  # fmt: skip
_op("SSM_CONV", "y[c, t] = sum over k of x[t + k, c] * w[k, c]", [Source("x", _F32), Source("w", _F32)], rules.ssm_conv)
_op("SSM_SCAN", "h = exp(softplus(dt) a) h + softplus(dt) x b, y = h c; then the last n_states of h, the latest first",
    [Source(n, _F32) for n in ("h", "x", "dt", "a", "b", "c")] + [Source("ids", _I32)], rules.ssm_scan,
    {"n_states": Param(0, "i32", 0, 1 << 16)})  # fmt: skip

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
    _op(_name, _line, _x(), rules.same, _XIELU if _name == "XIELU" else None, FLOATS, kind=_kind, inplace=True)

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
    _op(_name, _line + "; one source holds x and g in its halves", _SPLIT, rules.glu,
        _LIMIT if _name in ("SWIGLU_OAI", "SWIGLU_CLAMP") else _SWAP, FLOATS, kind=_kind)  # fmt: skip

OPS: dict[str, Op] = {o.name: o for o in _TABLE}
"""Every declaration by its finest name (SILU, not UNARY)."""

OP_ID: dict[str, int] = {
    "NONE": 0, "VIEW": 1, "RESHAPE": 2, "PERMUTE": 3, "TRANSPOSE": 4, "ADD": 5, "SUB": 6, "MUL": 7, "DIV": 8,
    "ADD_ID": 9, "SQR": 10, "SQRT": 11, "LOG": 12, "SIN": 13, "COS": 14, "SCALE": 15, "CLAMP": 16, "LEAKY_RELU": 17,
    "SUM_ROWS": 18, "MEAN": 19, "CUMSUM": 20, "ARGMAX": 21, "ARGSORT": 22, "TOP_K": 23, "REPEAT": 24, "CONCAT": 25,
    "NORM": 26, "RMS_NORM": 27, "L2_NORM": 28, "MUL_MAT": 29, "MUL_MAT_ID": 30, "OUT_PROD": 31, "CPY": 32, "DUP": 33,
    "CONT": 34, "GET_ROWS": 35, "SET_ROWS": 36, "DIAG_MASK_INF": 37, "FILL": 38, "ARANGE": 39, "SOFT_MAX": 40,
    "ROPE": 41, "FLASH_ATTN_EXT": 42, "UNARY": 43, "GLU": 44, "SSM_CONV": 45, "SSM_SCAN": 46,
    "PAGED_ATTN": 47,
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
