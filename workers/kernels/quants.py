"""Block formats in NumPy, read: `dequantize` for every live type.

Shapes: blocks are uint8 `(n, block_bytes)`, values float32 `(n, block)`. Arithmetic is float32 as in ggml, so values
are ggml's own bits. Threads: pure functions.
Source: the block structs of ggml-common.h and the reference rows of ggml-quants.c; the importance-matrix types
(IQ1, IQ2, IQ3) are read through the `gguf` package, which carries their lattices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.dtypes import TYPES, GGMLType

Arr = npt.NDArray[Any]
U8 = npt.NDArray[Any]
F32 = npt.NDArray[Any]
"""Arrays of uint8 and of float32: NumPy's stubs lose the width of an element in arithmetic, so it stands in the name."""
T = GGMLType

KVALUES_IQ4NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
KVALUES_MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)

_DEQUANT: dict[int, Callable[[U8], F32]] = {}


def _dequant(t: GGMLType) -> Callable[[Callable[[U8], F32]], Callable[[U8], F32]]:
    def add(f: Callable[[U8], F32]) -> Callable[[U8], F32]:
        _DEQUANT[t] = f
        return f

    return add


def dequantize(type_id: int, blocks: U8) -> F32:
    """Values of blocks. Shapes: `(n, block_bytes)` to `(n, block)`."""
    f = _DEQUANT.get(type_id)
    if f is not None:
        return f(blocks)
    import gguf

    info = TYPES[type_id]
    values = gguf.quants.dequantize(np.ascontiguousarray(blocks), gguf.GGMLQuantizationType(type_id))
    return values.reshape(-1, info.block)


# -- small pieces ------------------------------------------------------------------------------------------------------


def _f16(b: U8) -> F32:
    return np.ascontiguousarray(b).view(np.float16).astype(np.float32)


def _nibbles(q: U8) -> U8:
    """Low nibbles, then high ones."""
    return np.concatenate([q & 15, q >> 4], -1)


def _bits32(b: U8) -> U8:
    """32 bits of each row as bytes 0 or 1, lowest first."""
    return np.unpackbits(np.ascontiguousarray(b), axis=-1, bitorder="little")


# -- 32-element blocks -------------------------------------------------------------------------------------------------


@_dequant(T.Q4_0)
def _dq4_0(b: U8) -> F32:
    return (_nibbles(b[:, 2:]).astype(np.float32) - 8) * _f16(b[:, :2])


@_dequant(T.Q4_1)
def _dq4_1(b: U8) -> F32:
    return _nibbles(b[:, 4:]).astype(np.float32) * _f16(b[:, :2]) + _f16(b[:, 2:4])


@_dequant(T.Q5_0)
def _dq5_0(b: U8) -> F32:
    q = _nibbles(b[:, 6:]) | (_bits32(b[:, 2:6]) << 4)
    return (q.astype(np.float32) - 16) * _f16(b[:, :2])


@_dequant(T.Q5_1)
def _dq5_1(b: U8) -> F32:
    q = _nibbles(b[:, 8:]) | (_bits32(b[:, 4:8]) << 4)
    return q.astype(np.float32) * _f16(b[:, :2]) + _f16(b[:, 2:4])


@_dequant(T.Q8_0)
def _dq8_0(b: U8) -> F32:
    return b[:, 2:].view(np.int8).astype(np.float32) * _f16(b[:, :2])


@_dequant(T.Q8_1)
def _dq8_1(b: U8) -> F32:
    return b[:, 4:].view(np.int8).astype(np.float32) * _f16(b[:, :2])


@_dequant(T.IQ4_NL)
def _diq4_nl(b: U8) -> F32:
    return KVALUES_IQ4NL[_nibbles(b[:, 2:])] * _f16(b[:, :2])


def e8m0_half(e: Arr) -> F32:
    """2^(e - 128): the shared exponent of MXFP4, halved because the value table is doubled."""
    e = e.astype(np.int64)
    bits = np.where(e < 2, np.uint32(0x00200000) << e.clip(0, 1).astype(np.uint32), (e - 1).astype(np.uint32) << 23)
    return bits.astype(np.uint32).view(np.float32)


@_dequant(T.MXFP4)
def _dmxfp4(b: U8) -> F32:
    return KVALUES_MXFP4[_nibbles(b[:, 1:])] * e8m0_half(b[:, :1])


def ue4m3(b: U8) -> F32:
    exp, man = (b >> 3).astype(np.int32) & 15, (b & 7).astype(np.float32)
    raw = np.where(exp == 0, man * np.float32(2.0**-9), np.ldexp(1 + man / 8, exp - 7))
    return np.where((b == 0) | (b == 0x7F), 0, raw * 0.5).astype(np.float32)


@_dequant(T.NVFP4)
def _dnvfp4(b: U8) -> F32:
    q = _nibbles(b[:, 4:].reshape(-1, 4, 8))
    return (KVALUES_MXFP4[q] * ue4m3(b[:, :4])[..., None]).reshape(-1, 64)


@_dequant(T.Q1_0)
def _dq1_0(b: U8) -> F32:
    return (_bits32(b[:, 2:]).astype(np.float32) * 2 - 1) * _f16(b[:, :2])


@_dequant(T.Q2_0)
def _dq2_0(b: U8) -> F32:
    q = (b[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return (q.reshape(-1, 64).astype(np.float32) - 1) * _f16(b[:, :2])


# -- 256-element blocks ------------------------------------------------------------------------------------------------


def _crumbs(q: U8) -> U8:
    """Two-bit fields in the order of Q2_K: 32 bytes hold 128 values, 32 a shift."""
    q = q.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    return (q & 3).reshape(-1, 256)


@_dequant(T.Q2_K)
def _dq2_k(b: U8) -> F32:
    scales, q = b[:, :16], _crumbs(b[:, 16:80]).reshape(-1, 16, 16)
    d, dmin = _f16(b[:, 80:82]), _f16(b[:, 82:84])
    y = (d * (scales & 15))[..., None] * q.astype(np.float32) - (dmin * (scales >> 4))[..., None]
    return y.reshape(-1, 256).astype(np.float32)


@_dequant(T.Q3_K)
def _dq3_k(b: U8) -> F32:
    hmask, q, packed = b[:, :32], _crumbs(b[:, 32:96]), b[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    high = ((packed[:, 8:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3).transpose(0, 2, 1).reshape(-1, 16)
    scales = (low | high << 4).astype(np.int8) - 32
    bit = ((hmask[:, None, :] >> np.arange(8, dtype=np.uint8).reshape(8, 1)) & 1).reshape(-1, 256)
    y = (q.astype(np.int8) - 4 * (1 - bit.astype(np.int8))).reshape(-1, 16, 16)
    d = _f16(b[:, 108:110]) * scales.astype(np.float32)
    return (d[..., None] * y).reshape(-1, 256).astype(np.float32)


def _scale_min_k4(s: U8) -> tuple[U8, U8]:
    """The eight 6-bit scales and minima that Q4_K and Q5_K pack into 12 bytes."""
    a, m, h = s[:, :4], s[:, 4:8], s[:, 8:12]
    scale = np.concatenate([a & 63, (h & 15) | (a >> 6) << 4], 1)
    low = np.concatenate([m & 63, (h >> 4) | (m >> 6) << 4], 1)
    return scale, low


def _affine_k(b: U8, q: U8) -> F32:
    scale, low = _scale_min_k4(b[:, 4:16])
    y = (_f16(b[:, :2]) * scale)[..., None] * q.reshape(-1, 8, 32).astype(np.float32)
    return (y - (_f16(b[:, 2:4]) * low)[..., None]).reshape(-1, 256).astype(np.float32)


@_dequant(T.Q4_K)
def _dq4_k(b: U8) -> F32:
    return _affine_k(b, _nibbles(b[:, 16:].reshape(-1, 4, 32)))


@_dequant(T.Q5_K)
def _dq5_k(b: U8) -> F32:
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(8, 1)) & 1
    low = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _affine_k(b, low | high << 4)


@_dequant(T.Q6_K)
def _dq6_k(b: U8) -> F32:
    ql, qh = b[:, :128].reshape(-1, 2, 2, 32), b[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([ql & 15, ql >> 4], 2)
    high = (qh >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)) & 3
    q = (low | high << 4).astype(np.int8) - 32
    scales = b[:, 192:208].view(np.int8).astype(np.float32) * _f16(b[:, 208:210])
    return (scales[..., None] * q.reshape(-1, 16, 16)).reshape(-1, 256).astype(np.float32)


@_dequant(T.Q8_K)
def _dq8_k(b: U8) -> F32:
    return b[:, 4:260].view(np.int8).astype(np.float32) * np.ascontiguousarray(b[:, :4]).view(np.float32)


@_dequant(T.IQ4_XS)
def _diq4_xs(b: U8) -> F32:
    high = np.ascontiguousarray(b[:, 2:4]).view(np.uint16).astype(np.int32)
    low = (b[:, 4:8, None] >> np.array([0, 4], np.uint8)).reshape(-1, 8) & 15
    scale = low | ((high >> (2 * np.arange(8))) & 3) << 4
    d = _f16(b[:, :2]) * (scale.astype(np.float32) - 32)
    q = KVALUES_IQ4NL[_nibbles(b[:, 8:].reshape(-1, 8, 16))]
    return (d[..., None] * q).reshape(-1, 256).astype(np.float32)


_POW3 = np.array([1, 3, 9, 27, 81], np.uint8)


@_dequant(T.TQ1_0)
def _dtq1_0(b: U8) -> F32:
    def trits(q: U8, n: int) -> Arr:
        digits = (q[:, None, :] * _POW3[:n].reshape(-1, 1)).astype(np.uint8)
        return ((digits.astype(np.uint16) * 3) >> 8).astype(np.int8).reshape(len(q), -1)

    q = np.concatenate([trits(b[:, :32], 5), trits(b[:, 32:48], 5), trits(b[:, 48:52], 4)], 1)
    return (q.astype(np.float32) - 1) * _f16(b[:, 52:54])


@_dequant(T.TQ2_0)
def _dtq2_0(b: U8) -> F32:
    return (_crumbs(b[:, :64]).astype(np.float32) - 1) * _f16(b[:, 64:66])


