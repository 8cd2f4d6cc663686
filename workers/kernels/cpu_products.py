"""Products with weights in GGUF's own row layout: every type that has no packed kernel, on any CPU.

A row's block is unpacked once to int8 with a scale (and a minimum) for each 16 elements, then used for every column of
quantised x. The order of every sum is fixed and does not depend on the number of columns or threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from protocol.dtypes import GGMLType
from workers.kernels.quants import KVALUES_IQ4NL, KVALUES_MXFP4
from workers.kernels.simd import half_to_float

_IQ4NL = KVALUES_IQ4NL.astype(np.int8)
_FP4 = KVALUES_MXFP4.astype(np.int8)

BLOCK_TYPES = frozenset({
    GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.Q5_K,
    GGMLType.Q6_K, GGMLType.IQ4_NL, GGMLType.IQ4_XS, GGMLType.MXFP4,
})  # fmt: skip
FLOAT_TYPES = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16})

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4 = (
    int(t) for t in (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0, GGMLType.Q4_K,
                     GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.IQ4_NL, GGMLType.IQ4_XS, GGMLType.MXFP4)
)  # fmt: skip
_F16, _BF16 = int(GGMLType.F16), int(GGMLType.BF16)


@njit(nogil=True, cache=True, inline="always")
def _u16(w, at):  # type: ignore[no-untyped-def]
    return np.uint16(w[at]) | (np.uint16(w[at + 1]) << np.uint16(8))


@njit(nogil=True, cache=True, inline="always")
def _half(w, at):  # type: ignore[no-untyped-def]
    return half_to_float(np.uint16(_u16(w, at)))


@njit(nogil=True, cache=True)
def _unpack32(kind, w, at, q, s, low):  # type: ignore[no-untyped-def]
    """One block of 32: values to q, scale and minimum to both halves."""
    d, m = np.float32(0), np.float32(0)
    if kind == Q8_0:
        d = _half(w, at)
        for i in range(32):
            q[i] = np.int8(w[at + 2 + i])
    elif kind == Q4_0:
        d = _half(w, at)
        for i in range(16):
            q[i] = np.int8(w[at + 2 + i] & 15) - np.int8(8)
            q[i + 16] = np.int8(w[at + 2 + i] >> 4) - np.int8(8)
    elif kind == Q4_1:
        d, m = _half(w, at), _half(w, at + 2)
        for i in range(16):
            q[i] = np.int8(w[at + 4 + i] & 15)
            q[i + 16] = np.int8(w[at + 4 + i] >> 4)
    elif kind in (Q5_0, Q5_1):
        skip = 2 if kind == Q5_0 else 4
        d = _half(w, at)
        if kind == Q5_1:
            m = _half(w, at + 2)
        high = np.uint32(_u16(w, at + skip)) | (np.uint32(_u16(w, at + skip + 2)) << np.uint32(16))
        zero = np.int8(16) if kind == Q5_0 else np.int8(0)
        for i in range(16):
            b = w[at + skip + 4 + i]
            q[i] = np.int8((b & 15) | (((high >> np.uint32(i)) & 1) << 4)) - zero
            q[i + 16] = np.int8((b >> 4) | (((high >> np.uint32(i + 16)) & 1) << 4)) - zero
    elif kind == IQ4_NL:
        d = _half(w, at)
        for i in range(16):
            q[i] = _IQ4NL[w[at + 2 + i] & 15]
            q[i + 16] = _IQ4NL[w[at + 2 + i] >> 4]
    else:
        e = np.int64(w[at])
        d = np.float32(2.0 ** (e - 128))
        for i in range(16):
            q[i] = _FP4[w[at + 1 + i] & 15]
            q[i + 16] = _FP4[w[at + 1 + i] >> 4]
    s[0] = s[1] = d
    low[0] = low[1] = m


@njit(nogil=True, cache=True)
def _unpack256(kind, w, at, q, s, low):  # type: ignore[no-untyped-def]
    """One block of 256: values to q, 16 scales and 16 minima (added, so those of the K types are negative)."""
    if kind in (Q4_K, Q5_K):
        d, dmin = _half(w, at), _half(w, at + 2)
        for j in range(8):
            if j < 4:
                sc, mn = w[at + 4 + j] & 63, w[at + 8 + j] & 63
            else:
                sc = (w[at + 8 + j] & 15) | ((w[at + j] >> 6) << 4)
                mn = (w[at + 8 + j] >> 4) | ((w[at + 4 + j] >> 6) << 4)
            s[2 * j] = s[2 * j + 1] = d * np.float32(sc)
            low[2 * j] = low[2 * j + 1] = -dmin * np.float32(mn)
        data = at + (16 if kind == Q4_K else 48)
        for j in range(4):
            for i in range(32):
                b = w[data + 32 * j + i]
                q[64 * j + i] = np.int8(b & 15)
                q[64 * j + 32 + i] = np.int8(b >> 4)
        if kind == Q5_K:
            for j in range(8):
                for i in range(32):
                    q[32 * j + i] += np.int8(((w[at + 16 + i] >> np.uint8(j)) & 1) << 4)
    elif kind == Q6_K:
        d = _half(w, at + 208)
        for j in range(16):
            s[j] = d * np.float32(np.int8(w[at + 192 + j]))
            low[j] = 0
        for h in range(2):
            for i in range(32):
                a, b, t = w[at + 64 * h + i], w[at + 64 * h + 32 + i], w[at + 128 + 32 * h + i]
                q[128 * h + i] = np.int8((a & 15) | ((t & 3) << 4)) - np.int8(32)
                q[128 * h + 32 + i] = np.int8((b & 15) | (((t >> 2) & 3) << 4)) - np.int8(32)
                q[128 * h + 64 + i] = np.int8((a >> 4) | (((t >> 4) & 3) << 4)) - np.int8(32)
                q[128 * h + 96 + i] = np.int8((b >> 4) | ((t >> 6) << 4)) - np.int8(32)
    else:  # IQ4_XS
        d = _half(w, at)
        high = _u16(w, at + 2)
        for j in range(8):
            ls = ((w[at + 4 + j // 2] >> np.uint8(4 * (j % 2))) & 15) | (((high >> (2 * j)) & 3) << 4)
            s[2 * j] = s[2 * j + 1] = d * (np.float32(ls) - np.float32(32))
            low[2 * j] = low[2 * j + 1] = 0
            for i in range(16):
                b = w[at + 8 + 16 * j + i]
                q[32 * j + i] = _IQ4NL[b & 15]
                q[32 * j + 16 + i] = _IQ4NL[b >> 4]


@njit(nogil=True, cache=True)
def _dot_block(q, s, low, n16, xq, xd, xs16, c, k16):  # type: ignore[no-untyped-def]
    """One unpacked block times one column."""
    acc = np.float32(0)
    for j in range(n16):
        t = np.int32(0)
        for i in range(16):
            t += np.int32(q[16 * j + i]) * np.int32(xq[c, 16 * (k16 + j) + i])
        acc += (s[j] * np.float32(t) + low[j] * np.float32(xs16[c, k16 + j])) * xd[c, (k16 + j) >> 1]
    return acc


@njit(nogil=True, cache=True)
def _blocks_part(kind, w, row_bytes, block, block_bytes, xq, xd, xs16, y, r0, r1):  # type: ignore[no-untyped-def]
    n_columns, n_cols_x = y.shape[0], xq.shape[1]
    q, s, low = np.empty(256, np.int8), np.empty(16, np.float32), np.zeros(16, np.float32)
    n16 = block // 16
    for r in range(r0, r1):
        for c in range(n_columns):
            y[c, r] = 0
        for k in range(n_cols_x // block):
            at = r * row_bytes + k * block_bytes
            if block == 32:
                _unpack32(kind, w, at, q, s, low)
            else:
                _unpack256(kind, w, at, q, s, low)
            for c in range(n_columns):
                y[c, r] += _dot_block(q, s, low, n16, xq, xd, xs16, c, k * n16)


@njit(nogil=True, cache=True, parallel=True)
def blocks_product(kind, w, row_bytes, block, block_bytes, xq, xd, xs16, y, n_threads):  # type: ignore[no-untyped-def]
    """Quantised rows times quantised columns.

    Shapes: w uint8 flat; xq int8 [n_columns, k]; xd float32 [n_columns, k / 32]; xs16 int32 [n_columns, k / 16];
    y float32 [n_columns, n_rows].
    """
    n = y.shape[1]
    for t in prange(n_threads):
        _blocks_part(kind, w, row_bytes, block, block_bytes, xq, xd, xs16, y, n * t // n_threads,
                     n * (t + 1) // n_threads)  # fmt: skip


@njit(nogil=True, cache=True)
def quantize_plain(x, xq, xd, xs16):  # type: ignore[no-untyped-def]
    """Columns as int8 blocks of 32, with the sum of each 16. Shapes: as `blocks_product` reads them."""
    for c in range(x.shape[0]):
        for k in range(x.shape[1] // 32):
            peak = np.float32(0)
            for i in range(32):
                peak = max(peak, abs(x[c, 32 * k + i]))
            d = peak / np.float32(127)
            inverse = np.float32(1) / d if d != 0 else np.float32(0)
            xd[c, k] = d
            for h in range(2):
                total = np.int32(0)
                for i in range(16):
                    v = np.int32(np.rint(x[c, 32 * k + 16 * h + i] * inverse))
                    total += v
                    xq[c, 32 * k + 16 * h + i] = np.int8(v)
                xs16[c, 2 * k + h] = total


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _dot_floats(a, b, n):  # type: ignore[no-untyped-def]
    acc = np.float32(0)
    for i in range(n):
        acc += a[i] * b[i]
    return acc


@njit(nogil=True, cache=True)
def _floats_part(kind, w32, w16, row_elements, x, y, r0, r1):  # type: ignore[no-untyped-def]
    k = x.shape[1]
    row = np.empty(k, np.float32)
    for r in range(r0, r1):
        at = r * row_elements
        if kind == _F16:
            for i in range(k):
                row[i] = half_to_float(w16[at + i])
        elif kind == _BF16:
            bits = row.view(np.uint32)
            for i in range(k):
                bits[i] = np.uint32(w16[at + i]) << np.uint32(16)
        else:
            for i in range(k):
                row[i] = w32[at + i]
        for c in range(x.shape[0]):
            y[c, r] = _dot_floats(row, x[c], k)


@njit(nogil=True, cache=True, parallel=True)
def floats_product(kind, w32, w16, row_elements, x, y, n_threads):  # type: ignore[no-untyped-def]
    """F32, F16 or BF16 rows times float columns. Shapes: w flat; x float32 [n_columns, k]; y float32 [n_columns, rows].

    Of `w32` and `w16` the one that `kind` names is read.
    """
    n = y.shape[1]
    for t in prange(n_threads):
        _floats_part(kind, w32, w16, row_elements, x, y, n * t // n_threads, n * (t + 1) // n_threads)
