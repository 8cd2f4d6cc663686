"""The living definition of every op: plain NumPy in float64, one short function each.

Every other device is held against these. Data that points (row indices, expert ids, positions) is checked before it is
followed, because NumPy would wrap a negative index silently.

Shapes: NumPy order, (n3, n2, n1, n0). Threads: kernels touch only their node's arrays.
Source: ggml-cpu/ops.cpp and vec.h for semantics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from protocol.errors import KernelError
from protocol.graph import Tensor
from protocol.limits import MAX_ROPE_POSITION
from protocol.ops import Op
from protocol.rules import PAGE_CELLS
from workers import tensors
from workers.kernels import paging, recurrent
from workers.kernels.rotary import rope_angles
from workers.tensors import Array


@dataclass(slots=True)
class Node:
    """A node bound to memory: arrays as `tensors.view` makes them, parameters decoded.

    Attributes:
        index: position in its graph, for messages.
        src: arrays of the sources, None where one is left out.
    """

    index: int
    op: Op
    tensor: Tensor
    params: dict[str, Any]
    dst: Array
    src: list[Array | None]
    src_tensor: list[Tensor | None]

    def x(self, i: int = 0) -> Array:
        """Values of source `i`, float64 (integers: int64)."""
        a, t = self.src[i], self.src_tensor[i]
        assert a is not None and t is not None  # the op table promised it
        return tensors.load(a, t.type)

    def opt(self, i: int) -> Array | None:
        return self.x(i) if i < len(self.src) and self.src[i] is not None else None

    def put(self, values: Array) -> None:
        tensors.store(self.dst, self.tensor.type, values)

    def fail(self, message: str) -> KernelError:
        return KernelError(f"node {self.index} ({self.op.name}): {message}")

    def indices(self, i: int, n: int) -> Array:
        """Source `i` as indices into `n` things; KernelError before any of them is followed."""
        ids = self.x(i)
        bad = (ids < 0) | (ids >= n)
        if bad.any():
            raise self.fail(f"expected indices of 0 to {n - 1}, got {int(ids[bad].flat[0])}")
        return ids


KERNELS: dict[str, Callable[[Node], None]] = {}


def kernel(*names: str) -> Callable[[Callable[[Node], None]], Callable[[Node], None]]:
    def add(f: Callable[[Node], None]) -> Callable[[Node], None]:
        KERNELS.update(dict.fromkeys(names, f))
        return f

    return add


def run(node: Node) -> None:
    """Carry out one node. Errors: KernelError when its data points outside what it names."""
    with np.errstate(all="ignore"):
        KERNELS[node.op.name](node)


def tile_to(b: Array, shape: tuple[int, ...]) -> Array:
    """ggml's broadcast: `b` repeated (not only stretched) to `shape`."""
    if b.shape == shape:
        return b
    if 0 in shape:
        return np.empty(shape, b.dtype)
    out = np.empty([part for n, m in zip(shape, b.shape, strict=True) for part in (n // m, m)], b.dtype)
    out[...] = b.reshape([part for m in b.shape for part in (1, m)])  # NumPy's `tile` keeps the interpreter's lock meanwhile
    return out.reshape(shape)


# -- elementwise -------------------------------------------------------------------------------------------------------


@kernel("ADD", "SUB", "MUL", "DIV")
def _binary(n: Node) -> None:
    a, b = n.x(0), n.x(1)
    f = {"ADD": np.add, "SUB": np.subtract, "MUL": np.multiply, "DIV": np.divide}[n.op.name]
    n.put(f(a, tile_to(b, a.shape)))


@kernel("ADD_ID")
def _add_id(n: Node) -> None:
    a, b = n.x(0), n.x(1)
    ids = n.indices(2, b.shape[2])
    n.put(a + b[0, 0][ids[0, 0]][None])


_erf = np.frompyfunc(math.erf, 1, 1)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))


def gelu_erf(x: Array) -> Array:
    return 0.5 * x * (1 + np.asarray(_erf(x / math.sqrt(2)), np.float64))


def gelu_quick(x: Array) -> Array:
    return x * _sigmoid(1.702 * x)


def silu(x: Array) -> Array:
    return x * _sigmoid(x)


UNARY: dict[str, Callable[[Array], Array]] = {
    "ABS": np.abs, "SGN": np.sign, "NEG": np.negative, "STEP": lambda x: x > 0, "TANH": np.tanh,
    "ELU": lambda x: np.where(x > 0, x, np.expm1(x)), "RELU": lambda x: np.maximum(x, 0), "SIGMOID": _sigmoid,
    "GELU": gelu, "GELU_QUICK": gelu_quick, "SILU": silu,
    "HARDSWISH": lambda x: x * np.clip((x + 3) / 6, 0, 1), "HARDSIGMOID": lambda x: np.clip((x + 3) / 6, 0, 1),
    "EXP": np.exp, "EXPM1": np.expm1, "SOFTPLUS": recurrent.softplus,
    "GELU_ERF": gelu_erf, "FLOOR": np.floor, "CEIL": np.ceil,
    "ROUND": lambda x: np.trunc(x + np.copysign(0.5, x)), "TRUNC": np.trunc,
    "SQR": np.square, "SQRT": np.sqrt, "LOG": np.log, "SIN": np.sin, "COS": np.cos,
}  # fmt: skip


@kernel(*UNARY)
def _unary(n: Node) -> None:
    n.put(UNARY[n.op.name](n.x()))


@kernel("XIELU")
def _xielu(n: Node) -> None:
    x, p = n.x(), n.params
    negative = (np.expm1(np.minimum(x, p["eps"])) - x) * p["alpha_n"] + p["beta"] * x
    n.put(np.where(x > 0, p["alpha_p"] * x * x + p["beta"] * x, negative))


@kernel("SCALE")
def _scale(n: Node) -> None:
    n.put(n.x() * n.params["scale"] + n.params["bias"])


@kernel("CLAMP")
def _clamp(n: Node) -> None:
    n.put(np.minimum(np.maximum(n.x(), n.params["low"]), n.params["high"]))


@kernel("LEAKY_RELU")
def _leaky_relu(n: Node) -> None:
    x = n.x()
    n.put(np.where(x > 0, x, x * n.params["slope"]))


@kernel("FILL")
def _fill(n: Node) -> None:
    n.put(np.full(n.tensor.ne[::-1], n.params["c"]))


@kernel("ARANGE")
def _arange(n: Node) -> None:
    n.put(n.params["start"] + n.params["step"] * np.arange(n.tensor.ne[0], dtype=np.float64))


@kernel("REGLU", "GEGLU", "SWIGLU", "SWIGLU_OAI", "GEGLU_ERF", "GEGLU_QUICK", "SWIGLU_CLAMP")
def _glu(n: Node) -> None:
    x, g = n.x(), n.opt(1)
    if g is None:
        half = x.shape[-1] // 2
        x, g = x[..., :half], x[..., half : 2 * half]
        if n.params["swapped"]:
            x, g = g, x
    if n.op.name in ("SWIGLU_OAI", "SWIGLU_CLAMP"):
        limit = n.params["limit"]
        x, g = np.minimum(x, limit), np.clip(g, -limit, limit)
        n.put(x * _sigmoid(n.params["alpha"] * x) * (1 + g) if n.op.name == "SWIGLU_OAI" else silu(x) * g)
        return
    f = {"REGLU": UNARY["RELU"], "GEGLU": gelu, "SWIGLU": silu, "GEGLU_ERF": gelu_erf, "GEGLU_QUICK": gelu_quick}
    n.put(f[n.op.name](x) * g)


# -- rows --------------------------------------------------------------------------------------------------------------


@kernel("SUM_ROWS", "MEAN")
def _sum_rows(n: Node) -> None:
    x = n.x()
    n.put(x.sum(-1, keepdims=True) if n.op.name == "SUM_ROWS" else x.mean(-1, keepdims=True))


@kernel("CUMSUM")
def _cumsum(n: Node) -> None:
    n.put(n.x().cumsum(-1))


@kernel("ARGMAX")
def _argmax(n: Node) -> None:
    n.put(n.x().argmax(-1))


@kernel("ARGSORT")
def _argsort(n: Node) -> None:
    x = n.x()
    n.put(np.argsort(-x if n.params["order"] else x, axis=-1, kind="stable"))


@kernel("TOP_K")
def _top_k(n: Node) -> None:
    k = n.tensor.ne[0]
    top = np.argsort(-n.x(), axis=-1, kind="stable")[..., :k].copy()
    if k > 1:  # ggml's own order, which it calls unspecified: the two largest change places
        top[..., [0, 1]] = top[..., [1, 0]]
    n.put(top)


@kernel("NORM")
def _norm(n: Node) -> None:
    x = n.x()
    y = x - x.mean(-1, keepdims=True)
    n.put(y / np.sqrt((y * y).mean(-1, keepdims=True) + n.params["eps"]))


@kernel("RMS_NORM")
def _rms_norm(n: Node) -> None:
    x = n.x()
    n.put(x / np.sqrt((x * x).mean(-1, keepdims=True) + n.params["eps"]))


@kernel("L2_NORM")
def _l2_norm(n: Node) -> None:
    x = n.x()
    n.put(x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), n.params["eps"]))


@kernel("DIAG_MASK_INF")
def _diag_mask_inf(n: Node) -> None:
    x = n.x()
    row, col = np.arange(x.shape[-2])[:, None], np.arange(x.shape[-1])
    n.put(np.where(col > n.params["n_past"] + row, -np.inf, x))


def alibi_slopes(n_head: int, max_bias: float) -> Array:
    """Slope of each head. Source: Press et al., ALiBi, as ggml computes it for head counts that are no power of 2."""
    if max_bias == 0:
        return np.ones(n_head)
    log2 = 2 ** math.floor(math.log2(n_head))
    m0, m1 = 2 ** (-max_bias / log2), 2 ** (-max_bias / 2 / log2)
    return np.array([m0 ** (h + 1) if h < log2 else m1 ** (2 * (h - log2) + 1) for h in range(n_head)])


@kernel("SOFT_MAX")
def _soft_max(n: Node) -> None:
    x, mask, sinks = n.x() * n.params["scale"], n.opt(1), n.opt(2)
    if mask is not None:
        mask = tile_to(mask[:, :, : x.shape[2]], x.shape)
        x = x + alibi_slopes(x.shape[1], n.params["max_bias"]).reshape(-1, 1, 1) * mask
    peak = x.max(-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1)
        peak = np.maximum(peak, sinks)
    e = np.exp(x - peak)
    total = e.sum(-1, keepdims=True)
    n.put(e / (total if sinks is None else total + np.exp(sinks - peak)))


# -- moving data -------------------------------------------------------------------------------------------------------


@kernel("CPY", "DUP", "CONT")
def _copy(n: Node) -> None:
    a, t = n.src[0], n.src_tensor[0]
    assert a is not None and t is not None
    if t.type == n.tensor.type:  # the same type is moved bit for bit
        n.dst[...] = np.ascontiguousarray(a).reshape(n.dst.shape)
        return
    n.put(tensors.load(a, t.type).reshape(n.tensor.ne[::-1]))


@kernel("REPEAT")
def _repeat(n: Node) -> None:
    assert n.src[0] is not None
    n.dst[...] = tile_to(n.src[0], n.dst.shape)


@kernel("CONCAT")
def _concat(n: Node) -> None:
    a, b = n.src[0], n.src[1]
    assert a is not None and b is not None
    n.dst[...] = np.concatenate([a, b], 3 - n.params["dim"])


@kernel("GET_ROWS")
def _get_rows(n: Node) -> None:
    a, t = n.src[0], n.src_tensor[0]
    assert a is not None and t is not None
    ids = n.indices(1, a.shape[2])[0]
    outer = np.arange(a.shape[0])[:, None, None], np.arange(a.shape[1])[None, :, None]
    rows = a[(*outer, ids)]
    n.put(tensors.load(rows, t.type))


@kernel("SET_ROWS")
def _set_rows(n: Node) -> None:
    x = n.x()
    ids = n.indices(1, n.dst.shape[2])
    if x.size == 0:
        return
    rows = tensors.convert(x, n.tensor.type, (*x.shape[:3], *n.dst.shape[3:]))
    for i3 in range(x.shape[0]):
        for i2 in range(x.shape[1]):
            n.dst[i3, i2, ids[0, i3 % ids.shape[1], i2 % ids.shape[2]]] = rows[i3, i2]


# -- products ----------------------------------------------------------------------------------------------------------


def _spread(a: Array, b: Array) -> Array:
    """Source 0 of a product repeated over the batch dimensions of source 1: consecutive copies, as ggml does."""
    for axis in (0, 1):
        if a.shape[axis] != b.shape[axis]:
            a = tensors.spread(a, b.shape[axis] // a.shape[axis], axis)
    return a


@kernel("MUL_MAT")
def _mul_mat(n: Node) -> None:
    a, b = n.x(0), n.x(1)
    n.put(b @ _spread(a, b).swapaxes(-1, -2))


@kernel("MUL_MAT_ID")
def _mul_mat_id(n: Node) -> None:
    a, t, b = n.src[0], n.src_tensor[0], n.x(1)[0]
    assert a is not None and t is not None
    ids = n.indices(2, a.shape[1])[0, 0]
    out = np.zeros((*ids.shape, a.shape[2]))
    column = np.arange(ids.shape[1]) % b.shape[1]
    for e in np.unique(ids):
        weights = tensors.load(a[:, e : e + 1], t.type)[0, 0]
        token, slot = np.nonzero(ids == e)
        out[token, slot] = b[token, column[slot]] @ weights.T
    n.put(out[None])


@kernel("OUT_PROD")
def _out_prod(n: Node) -> None:
    a, b = n.x(0), n.x(1)
    n.put(b.swapaxes(-1, -2) @ _spread(a, b))


@kernel("FLASH_ATTN_EXT")
def _flash_attn(n: Node) -> None:
    q, k, v, mask, sinks = n.x(0), n.x(1), n.x(2), n.opt(3), n.opt(4)
    k, v = _spread(k, q), _spread(v, q)
    score = (q @ k.swapaxes(-1, -2)) * n.params["scale"]
    cap = n.params["logit_softcap"]
    if cap:
        score = cap * np.tanh(score / cap)
    if mask is not None:
        mask = tile_to(mask[:, :, : q.shape[2]], score.shape)
        score = score + alibi_slopes(q.shape[1], n.params["max_bias"]).reshape(-1, 1, 1) * mask
    peak = score.max(-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1)
        peak = np.maximum(peak, sinks)
    e = np.where(np.isneginf(score), 0, np.exp(score - peak))
    total = e.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - peak)
    y = (e @ v) / np.where(total == 0, 1, total)  # a row that may see nothing gives zeros
    n.put(y.transpose(0, 2, 1, 3))


# -- states ------------------------------------------------------------------------------------------------------------


@kernel("SSM_CONV")
def _ssm_conv(n: Node) -> None:
    n.put(recurrent.causal_conv(n.x(0)[0], n.x(1)[0, 0]))


@kernel("SSM_SCAN")
def _ssm_scan(n: Node) -> None:
    pool, t = n.src[0], n.src_tensor[0]
    assert pool is not None and t is not None
    state = tensors.load(pool[n.indices(6, pool.shape[0])[0, 0, 0]], t.type)
    x, dt, a, b, c = (n.x(i) for i in range(1, 6))
    y, states = recurrent.selective_scan(state, x, dt[0], a[0, 0], b, c, max(1, n.params["n_states"]))
    n.put(np.concatenate([y.reshape(-1), states.reshape(-1)]))


@kernel("PAGED_ATTN")
def _paged_attn(n: Node) -> None:
    k, v, pages = n.src[1], n.src[2], n.x(3)[0, 0]
    assert k is not None and v is not None
    k_type, v_type = (t.type for t in n.src_tensor[1:3] if t is not None)
    n_seen = n.indices(4, PAGE_CELLS * pages.shape[1] + 1).reshape(-1)
    rows = n.indices(5, len(pages)).reshape(-1) if n.opt(5) is not None else np.zeros_like(n_seen)
    bad = paging.missing(pages, n_seen, rows, n.params["window"], k.shape[2] // PAGE_CELLS)
    if bad is not None:
        raise n.fail(f"expected pages of 0 to {k.shape[2] // PAGE_CELLS - 1}, got {bad}")
    n.put(paging.attention(
        n.x(0)[0], lambda at: tensors.load(k[:, :, at], k_type)[0], lambda at: tensors.load(v[:, :, at], v_type)[0],
        pages, n_seen, rows, n.opt(6), n.params["scale"], n.params["logit_softcap"], n.params["window"],
    ))  # fmt: skip


# -- rotary positions --------------------------------------------------------------------------------------------------


@kernel("ROPE")
def _rope(n: Node) -> None:
    x, positions = n.x(0), n.indices(1, MAX_ROPE_POSITION).reshape(-1)
    cos, sin, _ = rope_angles(n.params, n.tensor.ne[0], positions, n.opt(2))
    cos, sin = cos[:, None, :], sin[:, None, :]  # (tokens, heads, pairs)
    p = n.params
    first, n_dims = p["n_offs"], p["n_dims"]
    y = x.copy()
    if p["mode"] == 0:
        a, b = slice(first, first + n_dims, 2), slice(first + 1, first + n_dims, 2)
    else:
        half = cos.shape[-1]
        a, b = slice(first, first + half), slice(first + half, first + 2 * half)
    y[..., a] = x[..., a] * cos - x[..., b] * sin
    y[..., b] = x[..., a] * sin + x[..., b] * cos
    n.put(y)
