"""The small ops of a transformer over float32 rows, each a thread's share of the work.

Units: addresses and counts; `_row` and `_head` strides in bytes. A thread t of n takes its part of the rows, or of the
columns where there is but one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from workers.kernels.simd import (
    Emit,
    as_doubles,
    as_floats,
    as_halves,
    float_to_half,
    half_to_float,
    load32,
    load64,
    loadf,
    store8,
    store16,
    store32,
    storef,
    v16f,
)
from workers.kernels.steps import BY_ROW, FUNCTION_CODE

LANE_BYTES = 64
_ADD, _SUB, _MUL, _ = (FUNCTION_CODE[name] for name in BY_ROW)


def _swiglu(e: Emit, x: Any, g: Any, p: Any) -> Any:
    return e.b.fmul(e.b.fdiv(x, e.b.fadd(e.floats(1.0), e.exp(e.b.fneg(x)))), g)


def _gelu(e: Emit, x: Any) -> Any:
    b = e.b
    cube = e.fma(b.fmul(x, x), e.floats(0.044715), e.floats(1.0))
    u = b.fmul(b.fmul(e.floats(0.7978845608028654), x), cube)
    return b.fmul(b.fmul(e.floats(0.5), x), b.fadd(e.floats(1.0), e.tanh(u)))


def _swiglu_oai(e: Emit, x: Any, g: Any, p: Any) -> Any:
    b, alpha, limit = e.b, p[0], p[1]
    x = b.select(b.fcmp_ordered(">", x, limit), limit, x)
    low = b.fneg(limit)
    g = b.select(b.fcmp_ordered(">", g, limit), limit, b.select(b.fcmp_ordered("<", g, low), low, g))
    return b.fmul(b.fmul(x, e.sigmoid(b.fmul(alpha, x))), b.fadd(e.floats(1.0), g))


def _clamp(e: Emit, x: Any, z: Any, p: Any) -> Any:
    low, high = p[0], p[1]
    x = e.b.select(e.b.fcmp_ordered("<", x, low), low, x)
    return e.b.select(e.b.fcmp_ordered(">", x, high), high, x)


def _where_positive(e: Emit, x: Any, value: Any) -> Any:
    return e.b.select(e.b.fcmp_ordered(">", x, e.floats(0.0)), value, e.floats(0.0))


def _xielu(e: Emit, x: Any, z: Any, p: Any) -> Any:
    b, (alpha_n, alpha_p, beta, eps) = e.b, p
    held = b.select(b.fcmp_ordered("<", x, eps), x, eps)
    near = e.floats(1.0)  # e^held - 1 - held: near 0, where that cancels, by its series
    for i in range(9, 2, -1):
        near = e.fma(b.fmul(near, held), e.floats(1 / i), e.floats(1.0))
    square = b.fmul(held, held)
    near, far = b.fmul(b.fmul(near, e.floats(0.5)), square), b.fsub(b.fsub(e.exp(held), e.floats(1.0)), held)
    curve = b.select(b.fcmp_ordered("<", square, e.floats(0.25)), near, far)
    low = b.fmul(alpha_n, b.fadd(curve, b.fsub(held, x)))
    high = b.fmul(alpha_p, b.fmul(x, x))
    return b.fadd(b.select(b.fcmp_ordered(">", x, e.floats(0.0)), high, low), b.fmul(beta, x))


_FUNCTIONS: dict[str, Callable[[Emit, Any, Any, Any], Any]] = {
    "ADD": lambda e, x, z, p: e.b.fadd(x, z),
    "SUB": lambda e, x, z, p: e.b.fsub(x, z),
    "MUL": lambda e, x, z, p: e.b.fmul(x, z),
    "DIV": lambda e, x, z, p: e.b.fdiv(x, z),
    "SWIGLU": _swiglu,
    "GEGLU": lambda e, x, z, p: e.b.fmul(_gelu(e, x), z),
    "SWIGLU_OAI": _swiglu_oai,
    "SCALE": lambda e, x, z, p: e.b.fadd(e.b.fmul(x, p[0]), p[1]),
    "CLAMP": _clamp,
    "TANH": lambda e, x, z, p: e.tanh(x),
    "SILU": lambda e, x, z, p: e.b.fmul(x, e.sigmoid(x)),
    "GELU": lambda e, x, z, p: _gelu(e, x),
    "SIGMOID": lambda e, x, z, p: e.sigmoid(x),
    "STEP": lambda e, x, z, p: _where_positive(e, x, e.floats(1.0)),
    "RELU": lambda e, x, z, p: _where_positive(e, x, x),
    "XIELU": _xielu,
    "SAME": lambda e, x, z, p: x,
}
"""Of 16 float32 x and z and parameters p."""


@intrinsic
def _vector16(typingctx: Any, kind: Any, x: Any, z: Any, y: Any, p0: Any, p1: Any, p2: Any, p3: Any) -> Any:
    """16 float32 at y from those at x and z, and the parameters."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emit(b)
        for name, code in FUNCTION_CODE.items():
            with b.if_then(b.icmp_signed("==", args[0], e.const(code))):
                x, z = e.load(args[1], 0, v16f), e.load(args[2], 0, v16f)
                e.store(_FUNCTIONS[name](e, x, z, [e.splat(p) for p in args[4:]]), args[3])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, *[types.float32] * 4), codegen


@njit(nogil=True)
def elementwise(  # type: ignore[no-untyped-def]
    kind, x, x_row, z, z_row, z_rows, y, y_row, n_rows, n, p0, p1, p2, p3, scratch, t, n_threads
):  # fmt: skip
    """What is left of 16 lanes goes through a copy in scratch memory."""
    n16 = n // 16
    for i in range(n_rows * n16 * t // n_threads, n_rows * n16 * (t + 1) // n_threads):
        r, c = i // n16, i % n16 * LANE_BYTES
        _vector16(kind, x + r * x_row + c, z + r % z_rows * z_row + c, y + r * y_row + c, p0, p1, p2, p3)
    rest = n - 16 * n16
    if rest == 0:
        return
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        skip = LANE_BYTES * n16
        a, b, d = x + r * x_row + skip, z + r % z_rows * z_row + skip, y + r * y_row + skip
        for i in range(rest):
            storef(scratch + 4 * i, loadf(a + 4 * i))
            storef(scratch + 64 + 4 * i, loadf(b + 4 * i))
        _vector16(kind, scratch, scratch + 64, scratch + 128, p0, p1, p2, p3)
        for i in range(rest):
            storef(d + 4 * i, loadf(scratch + 128 + 4 * i))


@njit(nogil=True)
def by_row(kind, x, x_row, z, z_step, n_z, y, y_row, n_rows, n, t, n_threads):  # type: ignore[no-untyped-def]
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a, d, v = carray(as_floats(x + r * x_row), n), carray(as_floats(y + r * y_row), n), loadf(z + r % n_z * z_step)
        if kind == _ADD:
            for i in range(n):
                d[i] = a[i] + v
        elif kind == _SUB:
            for i in range(n):
                d[i] = a[i] - v
        elif kind == _MUL:
            for i in range(n):
                d[i] = a[i] * v
        else:
            for i in range(n):
                d[i] = a[i] / v


@njit(nogil=True)
def soft_max(x, x_row, y, y_row, n_rows, n, scale, t, n_threads):  # type: ignore[no-untyped-def]
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a, d = carray(as_floats(x + r * x_row), n), carray(as_floats(y + r * y_row), n)
        peak = a[0] * scale
        for i in range(1, n):
            peak = max(peak, a[i] * scale)
        total = 0.0
        for i in range(n):
            e = math.exp(np.float64(a[i] * scale - peak))
            total += e
            d[i] = np.float32(e)
        for i in range(n):
            d[i] = np.float32(d[i] / total)


@njit(nogil=True)
def top_k(x, x_row, n_rows, n, y, n_top, t, n_threads):  # type: ignore[no-untyped-def]
    """int32 indices of the largest; of equals the first. As ggml leaves them, the first two have changed places."""
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a, d, found, least = carray(as_floats(x + r * x_row), n), y + 4 * n_top * r, 0, np.float32(0)
        for i in range(n):
            v = a[i]
            if found == n_top and not v > least:
                continue
            j = min(found, n_top - 1)
            while j > 0 and v > a[load32(d + 4 * (j - 1))]:
                store32(d + 4 * j, load32(d + 4 * (j - 1)))
                j -= 1
            store32(d + 4 * j, i)
            found = min(found + 1, n_top)
            least = a[load32(d + 4 * (found - 1))]
        if n_top > 1:
            first = load32(d)
            store32(d, load32(d + 4))
            store32(d + 4, first)


@njit(nogil=True)
def get_rows(  # type: ignore[no-untyped-def]
    x, x_row, x_plane, n_x, n, ids, id_step, id_row, y, n_ids, n_planes, t, n_threads
):  # fmt: skip
    """Rows of float32 by int32 ids, a plane of each for each plane of x. False: an id points outside."""
    work = n_ids * n_planes
    for i in range(work * t // n_threads, work * (t + 1) // n_threads):
        plane, j = i // n_ids, i % n_ids
        row = load32(ids + plane * id_row + j * id_step)
        if row < 0 or row >= n_x:
            return False
        a, d = carray(as_floats(x + plane * x_plane + row * x_row), n), carray(as_floats(y + 4 * n * i), n)
        for c in range(n):
            d[c] = a[c]
    return True


@njit(nogil=True)
def sum_rows(x, x_row, n_rows, n, y, t, n_threads):  # type: ignore[no-untyped-def]
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a, total = carray(as_floats(x + r * x_row), n), 0.0
        for i in range(n):
            total += np.float64(a[i])
        storef(y + 4 * r, np.float32(total))


@njit(nogil=True)
def norm(x, x_row, y, y_row, n_rows, n, eps, t, n_threads):  # type: ignore[no-untyped-def]
    """NORM: mean and variance in float64."""
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a, d, total, square = carray(as_floats(x + r * x_row), n), carray(as_floats(y + r * y_row), n), 0.0, 0.0
        for i in range(n):
            total += np.float64(a[i])
        mean = total / n
        for i in range(n):
            square += (np.float64(a[i]) - mean) * (np.float64(a[i]) - mean)
        factor = 1.0 / math.sqrt(square / n + eps)
        for i in range(n):
            d[i] = np.float32((np.float64(a[i]) - mean) * factor)


@njit(nogil=True)
def add_id(  # type: ignore[no-untyped-def]
    x, x_row, z, z_row, n_z, ids, ids_row, n_used, y, y_row, n_rows, n, t, n_threads
):  # fmt: skip
    """y[token, slot] = x[token, slot] + z[ids[token, slot]]. False: an id points outside."""
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        which = load32(ids + r // n_used * ids_row + 4 * (r % n_used))
        if which < 0 or which >= n_z:
            return False
        a, b = carray(as_floats(x + r * x_row), n), carray(as_floats(z + which * z_row), n)
        d = carray(as_floats(y + r * y_row), n)
        for i in range(n):
            d[i] = a[i] + b[i]
    return True


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _sum_squares(x):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(x.shape[0]):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@njit(nogil=True)
def rms_norm(x, x_row, w, y, y_row, n_rows, n, eps, t, n_threads):  # type: ignore[no-untyped-def]
    """The sum of squares in float64, as ggml's."""
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a, d = carray(as_floats(x + r * x_row), n), carray(as_floats(y + r * y_row), n)
        factor = np.float32(1.0 / math.sqrt(_sum_squares(a) / n + eps))
        if w == 0:
            for i in range(n):
                d[i] = a[i] * factor
        else:
            g = carray(as_floats(w), n)
            for i in range(n):
                d[i] = a[i] * factor * g[i]


@njit(nogil=True)
def rope(  # type: ignore[no-untyped-def]
    x, x_head, x_row, y, y_head, y_row, n_tokens, n_head, d, cos, sin, neox, n_dims, t, n_threads
):  # fmt: skip
    """Shapes: x, y [n_tokens, n_head, d] by their strides; cos, sin float32 [n_tokens, n_dims / 2]."""
    half = n_dims // 2
    first, step = (1, half) if neox else (2, 1)
    for i in range(n_tokens * n_head * t // n_threads, n_tokens * n_head * (t + 1) // n_threads):
        token, h = i // n_head, i % n_head
        a = carray(as_floats(x + token * x_row + h * x_head), d)
        b = carray(as_floats(y + token * y_row + h * y_head), d)
        c, s = carray(as_floats(cos + 4 * token * half), half), carray(as_floats(sin + 4 * token * half), half)
        for j in range(half):
            u, v = a[first * j], a[first * j + step]
            b[first * j] = u * c[j] - v * s[j]
            b[first * j + step] = u * s[j] + v * c[j]
        for j in range(n_dims, d):
            b[j] = a[j]


@njit(nogil=True)
def rope_table(positions, step, turn, n_tokens, half, bound, cos, sin, t, n_threads):  # type: ignore[no-untyped-def]
    """Cosines and sines of int32 positions, `step` bytes apart. False: a position outside 0..bound.

    Shapes: turn float64 [half + 1], angles of one position and behind them the magnitude; cos, sin [n_tokens, half].
    """
    angles = carray(as_doubles(turn), half + 1)
    for token in range(n_tokens * t // n_threads, n_tokens * (t + 1) // n_threads):
        position = load32(positions + step * token)
        if position < 0 or position > bound:
            return False
        c, s = carray(as_floats(cos + 4 * token * half), half), carray(as_floats(sin + 4 * token * half), half)
        for j in range(half):
            angle = position * angles[j]
            c[j] = np.float32(math.cos(angle) * angles[half])
            s[j] = np.float32(math.sin(angle) * angles[half])
    return True


@njit(nogil=True)
def arange(start, step, n, y, t, n_threads):  # type: ignore[no-untyped-def]
    d = carray(as_floats(y), n)
    for i in range(n * t // n_threads, n * (t + 1) // n_threads):
        d[i] = np.float32(np.float64(start) + np.float64(step) * i)


@njit(nogil=True)
def narrow(x, x_row, y, y_row, n_rows, n, t, n_threads):  # type: ignore[no-untyped-def]
    """float32 to float16."""
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a, d = carray(as_floats(x + r * x_row), n), carray(as_halves(y + r * y_row), n)
        for i in range(n):
            d[i] = float_to_half(a[i])


@njit(nogil=True)
def widen(x, x_row, y, y_row, n_rows, n, t, n_threads):  # type: ignore[no-untyped-def]
    """float16 to float32."""
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a, d = carray(as_halves(x + r * x_row), n), carray(as_floats(y + r * y_row), n)
        for i in range(n):
            d[i] = half_to_float(a[i])


@njit(nogil=True)
def _id(ids, id_bytes, r):  # type: ignore[no-untyped-def]
    return load64(ids + 8 * r) if id_bytes == 8 else np.int64(load32(ids + 4 * r))


@njit(nogil=True)
def _inside(ids, id_bytes, n_ids, n):  # type: ignore[no-untyped-def]
    """Whether all ids are of 0..n - 1."""
    for i in range(n_ids):
        which = _id(ids, id_bytes, i)
        if which < 0 or which >= n:
            return False
    return True


@njit(nogil=True)
def store_halves(x, x_row, n_rows, n, ids, id_bytes, y, y_row, n_y, t, n_threads):  # type: ignore[no-untyped-def]
    """False: an id points outside; nothing is stored then, whatever the others do."""
    if not _inside(ids, id_bytes, n_rows, n_y):
        return False
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a = carray(as_floats(x + r * x_row), n)
        d = carray(as_halves(y + _id(ids, id_bytes, r) * y_row), n)
        for i in range(n):
            d[i] = float_to_half(a[i])
    return True


@njit(nogil=True)
def store_floats(x, x_row, n_rows, n, ids, id_bytes, y, y_row, n_y, t, n_threads):  # type: ignore[no-untyped-def]
    """As `store_halves`."""
    if not _inside(ids, id_bytes, n_rows, n_y):
        return False
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a = carray(as_floats(x + r * x_row), n)
        d = carray(as_floats(y + _id(ids, id_bytes, r) * y_row), n)
        for i in range(n):
            d[i] = a[i]
    return True


@njit(nogil=True)
def argmax(x, x_row, n_rows, n, y, t, n_threads):  # type: ignore[no-untyped-def]
    """ARGMAX: int32 index of the first largest element of each row."""
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a = carray(as_floats(x + r * x_row), n)
        best, at = a[0], 0
        for i in range(1, n):
            if a[i] > best:
                best, at = a[i], i
        store32(y + 4 * r, at)


@njit(nogil=True)
def store_q8(x, x_row, n_rows, n, ids, id_bytes, y, y_row, n_y, t, n_threads):  # type: ignore[no-untyped-def]
    """Blocks as ggml makes them. False: an id points outside; nothing is stored then, whatever the others do."""
    if not _inside(ids, id_bytes, n_rows, n_y):
        return False
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a, to = carray(as_floats(x + r * x_row), n), y + _id(ids, id_bytes, r) * y_row
        for j in range(n // 32):
            peak = np.float32(0)
            for i in range(32 * j, 32 * j + 32):
                peak = max(peak, abs(a[i]))
            scale = peak / np.float32(127)
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            store16(to + 34 * j, float_to_half(scale))
            for i in range(32):
                z = a[32 * j + i] * inverse
                store8(to + 34 * j + 2 + i, np.int8(math.floor(abs(z) + np.float32(0.5)) * (1 if z >= 0 else -1)))
    return True
