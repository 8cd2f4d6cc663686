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

from workers.kernels.layout import ADD, MUL, SWIGLU
from workers.kernels.simd import (
    Emit,
    as_floats,
    as_halves,
    float_to_half,
    load64,
    loadf,
    store32,
    storef,
    v16f,
)

LANE_BYTES = 64


def _map16(n_sources: int, compute: Callable[[Emit, list[Any]], Any]) -> Any:
    """An intrinsic that computes 16 float32 at an address from those at one or two others."""

    @intrinsic
    def two(typingctx: Any, x: Any, z: Any, y: Any) -> Any:
        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            e = Emit(b)
            e.store(compute(e, [e.load(a, 0, v16f) for a in args[:n_sources]]), args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return two


def _swiglu(e: Emit, v: list[Any]) -> Any:
    x, g = v
    return e.b.fmul(e.b.fdiv(x, e.b.fadd(e.floats(1.0), e.exp(e.b.fneg(x)))), g)


def _geglu(e: Emit, v: list[Any]) -> Any:
    """tanh(u) = 1 - 2 / (e^2u + 1)."""
    b, (x, g) = e.b, v
    cube = e.fma(b.fmul(x, x), e.floats(0.044715), e.floats(1.0))
    u = b.fmul(b.fmul(e.floats(0.7978845608028654), x), cube)
    tanh = b.fsub(e.floats(1.0), b.fdiv(e.floats(2.0), b.fadd(e.exp(b.fadd(u, u)), e.floats(1.0))))
    return b.fmul(b.fmul(b.fmul(e.floats(0.5), x), b.fadd(e.floats(1.0), tanh)), g)


_add16 = _map16(2, lambda e, v: e.b.fadd(*v))
_mul16 = _map16(2, lambda e, v: e.b.fmul(*v))
_swiglu16, _geglu16 = _map16(2, _swiglu), _map16(2, _geglu)


@njit(nogil=True, inline="always")
def _vector16(kind, x, z, y):  # type: ignore[no-untyped-def]
    if kind == ADD:
        _add16(x, z, y)
    elif kind == MUL:
        _mul16(x, z, y)
    elif kind == SWIGLU:
        _swiglu16(x, z, y)
    else:
        _geglu16(x, z, y)


@njit(nogil=True)
def binary(kind, x, x_row, z, z_row, z_rows, y, y_row, n_rows, n, at, t, n_threads):  # type: ignore[no-untyped-def]
    """y = x op z; row r of x meets row r % z_rows of z. What is left of 16 lanes goes through a copy at `at`."""
    n16 = n // 16
    for i in range(n_rows * n16 * t // n_threads, n_rows * n16 * (t + 1) // n_threads):
        r, c = i // n16, i % n16 * LANE_BYTES
        _vector16(kind, x + r * x_row + c, z + r % z_rows * z_row + c, y + r * y_row + c)
    rest = n - 16 * n16
    if rest == 0:
        return
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        skip = LANE_BYTES * n16
        a, b, d = x + r * x_row + skip, z + r % z_rows * z_row + skip, y + r * y_row + skip
        for i in range(rest):
            storef(at + 4 * i, loadf(a + 4 * i))
            storef(at + 64 + 4 * i, loadf(b + 4 * i))
        _vector16(kind, at, at + 64, at + 128)
        for i in range(rest):
            storef(d + 4 * i, loadf(at + 128 + 4 * i))


@njit(nogil=True)
def scale(x, x_row, y, y_row, n_rows, n, factor, bias, t, n_threads):  # type: ignore[no-untyped-def]
    for i in range(n_rows * n * t // n_threads, n_rows * n * (t + 1) // n_threads):
        r, c = i // n, i % n
        storef(y + r * y_row + 4 * c, loadf(x + r * x_row + 4 * c) * factor + bias)


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _sum_squares(x):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(x.shape[0]):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@njit(nogil=True)
def rms_norm(x, x_row, w, y, y_row, n_rows, n, eps, t, n_threads):  # type: ignore[no-untyped-def]
    """RMS_NORM, and the MUL by a row of weights behind it unless `w` is 0. The sum of squares in float64, as ggml's."""
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
def store_halves(x, x_row, n_rows, n, ids, y, y_row, t, n_threads):  # type: ignore[no-untyped-def]
    """Rows of x as float16 into rows `ids` (int64) of y. The ids were checked."""
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a = carray(as_floats(x + r * x_row), n)
        d = carray(as_halves(y + load64(ids + 8 * r) * y_row), n)
        for i in range(n):
            d[i] = float_to_half(a[i])


@njit(nogil=True)
def largest(x, x_row, n_rows, n, y, t, n_threads):  # type: ignore[no-untyped-def]
    """ARGMAX: int32 index of the first largest element of each row."""
    for r in range(n_rows * t // n_threads, n_rows * (t + 1) // n_threads):
        a = carray(as_floats(x + r * x_row), n)
        best, at = a[0], 0
        for i in range(1, n):
            if a[i] > best:
                best, at = a[i], i
        store32(y + 4 * r, at)
