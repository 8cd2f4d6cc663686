"""The small ops of a transformer in Numba: float32, rows contiguous. What they do not take runs the reference kernel.

Shapes: arrays are 2-d or 3-d views made by the plan; rows are the last dimension.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit, prange

from workers.kernels.simd import as_floats, as_halves, float_to_half, half_to_float


@njit(nogil=True, cache=True)
def add_rows(a, b, y):  # type: ignore[no-untyped-def]
    """y = a + b; b has the rows of a, or fewer that repeat."""
    m = b.shape[0]
    for r in range(a.shape[0]):
        s = r % m
        for i in range(a.shape[1]):
            y[r, i] = a[r, i] + b[s, i]


@njit(nogil=True, cache=True)
def mul_rows(a, b, y):  # type: ignore[no-untyped-def]
    """y = a * b, as `add_rows`."""
    m = b.shape[0]
    for r in range(a.shape[0]):
        s = r % m
        for i in range(a.shape[1]):
            y[r, i] = a[r, i] * b[s, i]


@njit(nogil=True, cache=True)
def scale_rows(x, y, scale, bias):  # type: ignore[no-untyped-def]
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            y[r, i] = x[r, i] * scale + bias


@njit(nogil=True, cache=True)
def rms_norm_rows(x, y, eps):  # type: ignore[no-untyped-def]
    """The sum of squares in float64, as ggml does it."""
    n = x.shape[1]
    for r in range(x.shape[0]):
        total = 0.0
        for i in range(n):
            total += np.float64(x[r, i]) * np.float64(x[r, i])
        scale = np.float32(1.0 / math.sqrt(total / n + eps))
        for i in range(n):
            y[r, i] = x[r, i] * scale


@njit(nogil=True, cache=True)
def swiglu_rows(x, g, y):  # type: ignore[no-untyped-def]
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            v = x[r, i]
            y[r, i] = v / (np.float32(1) + np.exp(-v)) * g[r, i]


@njit(nogil=True, cache=True)
def geglu_rows(x, g, y):  # type: ignore[no-untyped-def]
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            v = x[r, i]
            t = np.tanh(np.float32(0.7978845608028654) * v * (np.float32(1) + np.float32(0.044715) * v * v))
            y[r, i] = np.float32(0.5) * v * (np.float32(1) + t) * g[r, i]


@njit(nogil=True, cache=True)
def store_halves(x, ids, target):  # type: ignore[no-untyped-def]
    """Rows of x as float16 bits into rows `ids` of the target. The ids were checked."""
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            target[ids[r], i] = float_to_half(x[r, i])


@njit(nogil=True, cache=True)
def rope_rows(x, y, cos, sin, neox, n_dims):  # type: ignore[no-untyped-def]
    """Shapes: x, y [n_tokens, n_head, d]; cos, sin [n_tokens, n_dims / 2]."""
    half = n_dims // 2
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(half):
                a = i if neox else 2 * i
                b = i + half if neox else 2 * i + 1
                u, v = x[t, h, a], x[t, h, b]
                y[t, h, a] = u * cos[t, i] - v * sin[t, i]
                y[t, h, b] = u * sin[t, i] + v * cos[t, i]
            for i in range(n_dims, x.shape[2]):
                y[t, h, i] = x[t, h, i]


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _dot_half(q, k):  # type: ignore[no-untyped-def]
    acc = np.float32(0)
    for i in range(q.shape[0]):
        acc += q[i] * half_to_float(k[i])
    return acc


@njit(nogil=True, cache=True)
def _add_half(y, e, v):  # type: ignore[no-untyped-def]
    for i in range(y.shape[0]):
        y[i] += e * half_to_float(v[i])


@njit(nogil=True, cache=True)
def _attend_one(q, k, k_row, v, v_row, n_kv, mask, scale, softcap, sink, score, y):  # type: ignore[no-untyped-def]
    """One query of one head. Cells in order, so that cells hidden at the end change no bit.

    `k`, `v`, `mask` are addresses; a mask of 0 hides nothing; a sink of -inf is none.
    """
    d, d_v = q.shape[0], y.shape[0]
    peak = sink
    for j in range(n_kv):
        m = half_to_float(carray(as_halves(mask), n_kv)[j]) if mask != 0 else np.float32(0)
        if m == -np.inf:
            score[j] = -np.inf
            continue
        s = _dot_half(q, carray(as_halves(k + j * k_row), d)) * scale
        if softcap != 0:
            s = softcap * np.tanh(s / softcap)
        s += m
        score[j] = s
        peak = max(peak, s)
    for i in range(d_v):
        y[i] = 0
    total = np.float32(0)
    for j in range(n_kv):
        if score[j] == -np.inf:
            continue
        e = np.exp(score[j] - peak)
        total += e
        _add_half(y, e, carray(as_halves(v + j * v_row), d_v))
    if sink != -np.inf:
        total += np.exp(sink - peak)
    if total != 0:
        inverse = np.float32(1) / total
        for i in range(d_v):
            y[i] *= inverse


@njit(nogil=True, cache=True, parallel=True)
def flash_attn(  # type: ignore[no-untyped-def]
    q, q_head, q_row, d, n_head, n_tokens, k, k_head, k_row, v, v_head, v_row, d_v, n_head_kv, n_kv, mask, mask_row,
    scale, softcap, sinks, y, n_threads,
):  # fmt: skip
    """Attention over a float16 cache with grouped heads.

    Units: q, k, v, mask, sinks and y are addresses, `_head` and `_row` strides in bytes. Of the mask and the sinks 0
    means none. Shapes: y float32 [n_tokens, n_head, d_v], contiguous.
    """
    group = n_head // n_head_kv
    work = n_head * n_tokens
    for t in prange(n_threads):
        score = np.empty(n_kv, np.float32)
        for task in range(work * t // n_threads, work * (t + 1) // n_threads):
            h, i = task // n_tokens, task % n_tokens
            sink = carray(as_floats(sinks), n_head)[h] if sinks != 0 else np.float32(-np.inf)
            row = carray(as_floats(q + h * q_head + i * q_row), d)
            out = carray(as_floats(y + 4 * d_v * (i * n_head + h)), d_v)
            _attend_one(row, k + (h // group) * k_head, k_row, v + (h // group) * v_head, v_row, n_kv,
                        mask + i * mask_row if mask != 0 else 0, scale, softcap, sink, score, out)  # fmt: skip
