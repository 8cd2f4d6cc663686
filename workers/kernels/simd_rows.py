"""Vector products with quantised rows in GGUF's own layout, for AVX2: what `cpu_products` does, many times faster.

For each type an LLVM function is generated that multiplies one row with 1 or with 4 columns of quantised x. A block of 32
is unpacked to int8, multiplied into 32-bit sums, scaled and added to 8 float lanes; the lanes are added in order at the
row's end. The arithmetic of one output element is the same for 1 and for 4 columns.

Shapes: x as int8 [n_columns, k] with a float32 scale for each 32, and the scale times their sum for types with a minimum.
Source: the block structs of ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from protocol.dtypes import TYPES, GGMLType
from workers.kernels.quants import KVALUES_IQ4NL, KVALUES_MXFP4

i8, i16, i32, i64 = (ir.IntType(k) for k in (8, 16, 32, 64))
f32, f16 = ir.FloatType(), ir.HalfType()
v16i8, v16i16, v8i32, v8f32 = (ir.VectorType(t, n) for t, n in ((i8, 16), (i16, 16), (i32, 8), (f32, 8)))
T = GGMLType


@dataclass(slots=True)
class Sub:
    """32 unpacked elements: two halves of 16 int8, the scale of each, and a minimum or None."""

    low: Any
    high: Any
    scale: Any
    scale_high: Any = None
    minimum: Any = None


class Emit:
    """Writes the instructions that the formats have in common."""

    def __init__(self, b: Any) -> None:
        self.b = b

    def at(self, p: Any, offset: int) -> Any:
        return self.b.add(p, ir.Constant(i64, offset))

    def load(self, p: Any, offset: int, kind: Any, align: int = 1) -> Any:
        value = self.b.load(self.b.inttoptr(self.at(p, offset), ir.PointerType(kind)))
        value.align = align
        return value

    def half(self, p: Any, offset: int) -> Any:
        return self.b.fpext(self.load(p, offset, f16), f32)

    def byte(self, p: Any, offset: int) -> Any:
        return self.b.zext(self.load(p, offset, i8), i32)

    def v(self, value: int) -> Any:
        return ir.Constant(v16i8, [value & 255] * 16)

    def int32(self, value: int) -> Any:
        return ir.Constant(i32, value)

    def nibbles(self, x: Any) -> tuple[Any, Any]:
        return self.b.and_(x, self.v(15)), self.b.lshr(x, self.v(4))

    def crumb(self, x: Any, shift: int, width: int) -> Any:
        """`width` bits from bit `shift` of each byte, moved to bit 4."""
        x = self.b.lshr(x, self.v(shift)) if shift else x
        return self.b.shl(self.b.and_(x, self.v((1 << width) - 1)), self.v(4))

    def function(self, name: str, result: Any, arguments: list[Any]) -> Any:
        return cgutils.get_or_insert_function(self.b.module, ir.FunctionType(result, arguments), name)

    def lookup(self, table: list[int], index: Any) -> Any:
        shuffle = self.function("llvm.x86.ssse3.pshuf.b.128", v16i8, [v16i8, v16i8])
        return self.b.call(shuffle, [ir.Constant(v16i8, [t & 255 for t in table]), index])

    def splat(self, x: Any) -> Any:
        empty = ir.Constant(v8f32, ir.Undefined)
        one = self.b.insert_element(empty, x, self.int32(0))
        return self.b.shuffle_vector(one, empty, ir.Constant(ir.VectorType(i32, 8), [0] * 8))

    def products(self, q: Any, x: Any) -> Any:
        """Eight 32-bit sums of the products of 16 int8."""
        multiply = self.function("llvm.x86.avx2.pmadd.wd", v8i32, [v16i16, v16i16])
        return self.b.call(multiply, [self.b.sext(q, v16i16), self.b.sext(x, v16i16)])


_IQ4NL = [int(k) for k in KVALUES_IQ4NL]
_FP4 = [int(k) for k in KVALUES_MXFP4]


def _unpack(kind: GGMLType, e: Emit, p: Any) -> Iterator[Sub]:
    """The blocks of 32 in the block at address `p`, in order."""
    b = e.b
    if kind == T.Q8_0:
        yield Sub(e.load(p, 2, v16i8), e.load(p, 18, v16i8), e.half(p, 0))
    elif kind == T.Q4_0:
        low, high = e.nibbles(e.load(p, 2, v16i8))
        yield Sub(b.sub(low, e.v(8)), b.sub(high, e.v(8)), e.half(p, 0))
    elif kind == T.Q4_1:
        low, high = e.nibbles(e.load(p, 4, v16i8))
        yield Sub(low, high, e.half(p, 0), minimum=e.half(p, 2))
    elif kind in (T.Q5_0, T.Q5_1):
        skip = 2 if kind == T.Q5_0 else 4
        halves = list(e.nibbles(e.load(p, skip + 4, v16i8)))
        for i in range(2):
            bits = b.bitcast(e.load(p, skip + 2 * i, i16), ir.VectorType(ir.IntType(1), 16))
            halves[i] = b.or_(halves[i], b.shl(b.zext(bits, v16i8), e.v(4)))
            if kind == T.Q5_0:
                halves[i] = b.sub(halves[i], e.v(16))
        yield Sub(halves[0], halves[1], e.half(p, 0), minimum=e.half(p, 2) if kind == T.Q5_1 else None)
    elif kind == T.IQ4_NL:
        low, high = e.nibbles(e.load(p, 2, v16i8))
        yield Sub(e.lookup(_IQ4NL, low), e.lookup(_IQ4NL, high), e.half(p, 0))
    elif kind == T.MXFP4:
        low, high = e.nibbles(e.load(p, 1, v16i8))
        exponent = e.byte(p, 0)
        tiny = b.shl(e.int32(0x00200000), exponent)
        normal = b.shl(b.sub(exponent, e.int32(1)), e.int32(23))
        scale = b.bitcast(b.select(b.icmp_unsigned("<", exponent, e.int32(2)), tiny, normal), f32)
        yield Sub(e.lookup(_FP4, low), e.lookup(_FP4, high), scale)
    elif kind in (T.Q4_K, T.Q5_K):
        yield from _unpack_affine_k(kind, e, p)
    elif kind == T.Q6_K:
        yield from _unpack_q6_k(e, p)
    else:
        yield from _unpack_iq4_xs(e, p)


def _unpack_affine_k(kind: GGMLType, e: Emit, p: Any) -> Iterator[Sub]:
    b = e.b
    d, dmin = e.half(p, 0), e.half(p, 2)
    data = 16 if kind == T.Q4_K else 48
    for j in range(8):
        if j < 4:
            scale = b.and_(e.byte(p, 4 + j), e.int32(63))
            low = b.and_(e.byte(p, 8 + j), e.int32(63))
        else:
            packed = e.byte(p, 8 + j)
            top = b.shl(b.lshr(e.byte(p, j), e.int32(6)), e.int32(4))
            top_low = b.shl(b.lshr(e.byte(p, 4 + j), e.int32(6)), e.int32(4))
            scale = b.or_(b.and_(packed, e.int32(15)), top)
            low = b.or_(b.lshr(packed, e.int32(4)), top_low)
        halves = []
        for i in range(2):
            q = e.nibbles(e.load(p, data + 32 * (j // 2) + 16 * i, v16i8))[j % 2]
            if kind == T.Q5_K:
                q = b.or_(q, e.crumb(e.load(p, 16 + 16 * i, v16i8), j, 1))
            halves.append(q)
        minimum = b.fneg(b.fmul(dmin, b.uitofp(low, f32)))
        yield Sub(halves[0], halves[1], b.fmul(d, b.uitofp(scale, f32)), minimum=minimum)


def _unpack_q6_k(e: Emit, p: Any) -> Iterator[Sub]:
    b, d = e.b, e.half(p, 208)
    for h in range(2):
        for s in range(4):
            halves, scales = [], []
            for i in range(2):
                q = e.nibbles(e.load(p, 64 * h + 32 * (s % 2) + 16 * i, v16i8))[s // 2]
                q = b.or_(q, e.crumb(e.load(p, 128 + 32 * h + 16 * i, v16i8), 2 * s, 2))
                halves.append(b.sub(q, e.v(32)))
                scale = b.sext(e.load(p, 192 + 8 * h + 2 * s + i, i8), i32)
                scales.append(b.fmul(d, b.sitofp(scale, f32)))
            yield Sub(halves[0], halves[1], scales[0], scales[1])


def _unpack_iq4_xs(e: Emit, p: Any) -> Iterator[Sub]:
    b, d = e.b, e.half(p, 0)
    high = b.zext(e.load(p, 2, i16), i32)
    for j in range(8):
        bits = b.and_(b.lshr(e.byte(p, 4 + j // 2), e.int32(4 * (j % 2))), e.int32(15))
        top = b.shl(b.and_(b.lshr(high, e.int32(2 * j)), e.int32(3)), e.int32(4))
        scale = b.sub(b.or_(bits, top), e.int32(32))
        first, second = (e.lookup(_IQ4NL, n) for n in e.nibbles(e.load(p, 8 + 16 * j, v16i8)))
        yield Sub(first, second, b.fmul(d, b.sitofp(scale, f32)))


def _row(kind: GGMLType, n_columns: int) -> Any:
    """An intrinsic: one row times `n_columns` columns.

    Arguments: addresses of the row, x, its scales and its scaled sums, the row's length k, the address of y, and the bytes
    from one column of y to the next.
    """
    info = TYPES[kind]

    @intrinsic
    def dot(typingctx: Any, w: Any, xq: Any, xd: Any, xs: Any, k: Any, y: Any, ldy: Any) -> Any:
        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            w, xq, xd, xs, k, y, ldy = args
            e = Emit(b)
            fma8 = e.function("llvm.fma.v8f32", v8f32, [v8f32] * 3)
            fma1 = e.function("llvm.fma.f32", f32, [f32] * 3)
            total = e.function("llvm.vector.reduce.fadd.v8f32", f32, [f32, v8f32])
            acc = [cgutils.alloca_once_value(b, ir.Constant(v8f32, [0.0] * 8)) for _ in range(n_columns)]
            rest = [cgutils.alloca_once_value(b, ir.Constant(f32, 0.0)) for _ in range(n_columns)]
            d_bytes = b.lshr(k, ir.Constant(i64, 3))  # four bytes for each 32 elements
            with cgutils.for_range(b, b.udiv(k, ir.Constant(i64, info.block))) as loop:
                n = loop.index
                p = b.add(w, b.mul(n, ir.Constant(i64, info.bytes)))
                x0 = b.add(xq, b.mul(n, ir.Constant(i64, info.block)))
                d0, s0 = (b.add(a, b.mul(n, ir.Constant(i64, info.block // 8))) for a in (xd, xs))
                for j, sub in enumerate(_unpack(kind, e, p)):
                    for c in range(n_columns):
                        column = ir.Constant(i64, c)
                        x = b.add(x0, b.mul(column, k))
                        scale_x = e.load(b.add(d0, b.mul(column, d_bytes)), 4 * j, f32, 4)
                        low = e.products(sub.low, e.load(x, 32 * j, v16i8))
                        high = e.products(sub.high, e.load(x, 32 * j + 16, v16i8))
                        if sub.scale_high is None:
                            parts = [(b.add(low, high), sub.scale)]
                        else:
                            parts = [(low, sub.scale), (high, sub.scale_high)]
                        for part, scale in parts:
                            factor = e.splat(b.fmul(scale, scale_x))
                            b.store(b.call(fma8, [b.sitofp(part, v8f32), factor, b.load(acc[c])]), acc[c])
                        if sub.minimum is not None:
                            sum_x = e.load(b.add(s0, b.mul(column, d_bytes)), 4 * j, f32, 4)
                            b.store(b.call(fma1, [sub.minimum, sum_x, b.load(rest[c])]), rest[c])
            for c in range(n_columns):
                result = b.call(total, [b.load(rest[c]), b.load(acc[c])])
                to = b.inttoptr(b.add(y, b.mul(ir.Constant(i64, c), ldy)), ir.PointerType(f32))
                b.store(result, to)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return dot


COLUMNS = 4
_q8_0x1, _q8_0x4 = _row(T.Q8_0, 1), _row(T.Q8_0, COLUMNS)
_q4_0x1, _q4_0x4 = _row(T.Q4_0, 1), _row(T.Q4_0, COLUMNS)
_q4_1x1, _q4_1x4 = _row(T.Q4_1, 1), _row(T.Q4_1, COLUMNS)
_q5_0x1, _q5_0x4 = _row(T.Q5_0, 1), _row(T.Q5_0, COLUMNS)
_q5_1x1, _q5_1x4 = _row(T.Q5_1, 1), _row(T.Q5_1, COLUMNS)
_q4_kx1, _q4_kx4 = _row(T.Q4_K, 1), _row(T.Q4_K, COLUMNS)
_q5_kx1, _q5_kx4 = _row(T.Q5_K, 1), _row(T.Q5_K, COLUMNS)
_q6_kx1, _q6_kx4 = _row(T.Q6_K, 1), _row(T.Q6_K, COLUMNS)
_iq4_nlx1, _iq4_nlx4 = _row(T.IQ4_NL, 1), _row(T.IQ4_NL, COLUMNS)
_iq4_xsx1, _iq4_xsx4 = _row(T.IQ4_XS, 1), _row(T.IQ4_XS, COLUMNS)
_mxfp4x1, _mxfp4x4 = _row(T.MXFP4, 1), _row(T.MXFP4, COLUMNS)
_KINDS = (T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_NL, T.IQ4_XS, T.MXFP4)
Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4 = (int(t) for t in _KINDS)
_ROWS_IN_CACHE = 32


@njit(nogil=True, cache=True)
def _dot4(kind, w, xq, xd, xs, k, y, ldy):  # type: ignore[no-untyped-def]
    if kind == Q8_0:
        _q8_0x4(w, xq, xd, xs, k, y, ldy)
    elif kind == Q4_0:
        _q4_0x4(w, xq, xd, xs, k, y, ldy)
    elif kind == Q4_1:
        _q4_1x4(w, xq, xd, xs, k, y, ldy)
    elif kind == Q5_0:
        _q5_0x4(w, xq, xd, xs, k, y, ldy)
    elif kind == Q5_1:
        _q5_1x4(w, xq, xd, xs, k, y, ldy)
    elif kind == Q4_K:
        _q4_kx4(w, xq, xd, xs, k, y, ldy)
    elif kind == Q5_K:
        _q5_kx4(w, xq, xd, xs, k, y, ldy)
    elif kind == Q6_K:
        _q6_kx4(w, xq, xd, xs, k, y, ldy)
    elif kind == IQ4_NL:
        _iq4_nlx4(w, xq, xd, xs, k, y, ldy)
    elif kind == IQ4_XS:
        _iq4_xsx4(w, xq, xd, xs, k, y, ldy)
    else:
        _mxfp4x4(w, xq, xd, xs, k, y, ldy)


@njit(nogil=True, cache=True)
def _dot1(kind, w, xq, xd, xs, k, y, ldy):  # type: ignore[no-untyped-def]
    if kind == Q8_0:
        _q8_0x1(w, xq, xd, xs, k, y, ldy)
    elif kind == Q4_0:
        _q4_0x1(w, xq, xd, xs, k, y, ldy)
    elif kind == Q4_1:
        _q4_1x1(w, xq, xd, xs, k, y, ldy)
    elif kind == Q5_0:
        _q5_0x1(w, xq, xd, xs, k, y, ldy)
    elif kind == Q5_1:
        _q5_1x1(w, xq, xd, xs, k, y, ldy)
    elif kind == Q4_K:
        _q4_kx1(w, xq, xd, xs, k, y, ldy)
    elif kind == Q5_K:
        _q5_kx1(w, xq, xd, xs, k, y, ldy)
    elif kind == Q6_K:
        _q6_kx1(w, xq, xd, xs, k, y, ldy)
    elif kind == IQ4_NL:
        _iq4_nlx1(w, xq, xd, xs, k, y, ldy)
    elif kind == IQ4_XS:
        _iq4_xsx1(w, xq, xd, xs, k, y, ldy)
    else:
        _mxfp4x1(w, xq, xd, xs, k, y, ldy)


@njit(nogil=True, cache=True, parallel=True)
def rows_product(kind, w, row_bytes, xq, xd, xs, k, y, n_rows, n_columns, n_threads):  # type: ignore[no-untyped-def]
    """Quantised rows times quantised columns. Units: w, xq, xd, xs, y are addresses; y is float32 [n_columns, n_rows]."""
    ldy, n_tiles = 4 * n_rows, n_columns // COLUMNS
    for t in prange(n_threads):
        first, last = n_rows * t // n_threads, n_rows * (t + 1) // n_threads
        for start in range(first, last, _ROWS_IN_CACHE):
            stop = min(start + _ROWS_IN_CACHE, last)
            for tile in range(n_tiles):
                c = tile * COLUMNS
                for r in range(start, stop):
                    _dot4(kind, w + r * row_bytes, xq + c * k, xd + c * (k >> 3), xs + c * (k >> 3), k,
                          y + c * ldy + 4 * r, ldy)  # fmt: skip
            for c in range(n_tiles * COLUMNS, n_columns):
                for r in range(start, stop):
                    _dot1(kind, w + r * row_bytes, xq + c * k, xd + c * (k >> 3), xs + c * (k >> 3), k,
                          y + c * ldy + 4 * r, ldy)  # fmt: skip


@njit(nogil=True, cache=True)
def quantize_rows(x, xq, xd, xs, c0, c1):  # type: ignore[no-untyped-def]
    """Columns c0..c1 as int8 blocks of 32 with a scale and a scaled sum each. Shapes: [n, k], [n, k], [n, k / 32] twice."""
    for c in range(c0, c1):
        for n in range(x.shape[1] // 32):
            peak = np.float32(0)
            for i in range(32):
                peak = max(peak, abs(x[c, 32 * n + i]))
            d = peak / np.float32(127)
            inverse = np.float32(1) / d if d != 0 else np.float32(0)
            total = np.int32(0)
            for i in range(32):
                q = np.int32(np.rint(x[c, 32 * n + i] * inverse))
                total += q
                xq[c, 32 * n + i] = np.int8(q)
            xd[c, n] = d
            xs[c, n] = d * np.float32(total)


@njit(nogil=True, cache=True, parallel=True)
def quantize_rows_parallel(x, xq, xd, xs, n_threads):  # type: ignore[no-untyped-def]
    """`quantize_rows` over all columns, divided over threads."""
    n = x.shape[0]
    for t in prange(n_threads):
        quantize_rows(x, xq, xd, xs, n * t // n_threads, n * (t + 1) // n_threads)
