"""Vector kernels written as LLVM IR inside Numba functions.

Q4_0 weights are held 8 rows interleaved (`pack_q4_0x8`): for each block of 32 columns 144 bytes, 8 float16 scales, then 4
chunks of 32 bytes; in chunk c byte 4r+t holds (row r, column 4c+t) in its low nibble and (row r, column 16+4c+t) in its
high nibble. Eight rows then share every load of x, and the sums of a block fit 16 bits.

The arithmetic of one output element is the same for 1 and for 4 columns, so its bits do not depend on the batch.
Needs AVX2, FMA and F16C; `HAVE_AVX2` says whether this CPU has them.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

_FEATURES = llvm.get_host_cpu_features()
HAVE_AVX2 = all(_FEATURES.get(f, False) for f in ("avx2", "fma", "f16c"))

GROUP = 8
BLOCK_BYTES = 144
PREFETCH_BYTES = 1152

i8, i16, i32, i64 = (ir.IntType(k) for k in (8, 16, 32, 64))
f32, f16 = ir.FloatType(), ir.HalfType()


@intrinsic
def half_to_float(typingctx: Any, bits: Any) -> Any:
    """float32 of the float16 whose bits are a uint16."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.fpext(b.bitcast(args[0], f16), f32)

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_half(typingctx: Any, x: Any) -> Any:
    """Bits of the float16 nearest to a float32, ties to even."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.bitcast(b.fptrunc(args[0], f16), i16)

    return types.uint16(types.float32), codegen


@intrinsic
def as_halves(typingctx: Any, address: Any) -> Any:
    """A pointer to uint16 at an address, for `carray`."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.inttoptr(args[0], ir.PointerType(i16))

    return types.CPointer(types.uint16)(types.int64), codegen


@intrinsic
def as_floats(typingctx: Any, address: Any) -> Any:
    """A pointer to float32 at an address, for `carray`."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.inttoptr(args[0], ir.PointerType(f32))

    return types.CPointer(types.float32)(types.int64), codegen


def _dot8(n_columns: int) -> Any:
    """An intrinsic: 8 rows of packed Q4_0 times `n_columns` columns of quantised x.

    Arguments, addresses but for the counts: weights, x int8 [block][column][32], scales [block][column], corrections
    -8 * scale * sum [block][column], number of blocks, y, bytes from one column of y to the next.
    """

    @intrinsic
    def dot(typingctx: Any, w: Any, xq: Any, xd: Any, xs: Any, n_blocks: Any, y: Any, ldy: Any) -> Any:
        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            w, xq, xd, xs, n_blocks, y, ldy = args
            vec = ir.VectorType
            v8 = vec(f32, 8)

            def function(name: str, result: Any, arguments: list[Any]) -> Any:
                return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)

            mul_add_bytes = function("llvm.x86.avx2.pmadd.ub.sw", vec(i16, 16), [vec(i8, 32)] * 2)
            mul_add_words = function("llvm.x86.avx2.pmadd.wd", vec(i32, 8), [vec(i16, 16)] * 2)
            fma = function("llvm.fma.v8f32", v8, [v8] * 3)
            prefetch = function("llvm.prefetch.p0", ir.VoidType(), [ir.PointerType(i8), i32, i32, i32])

            def const(v: int) -> Any:
                return ir.Constant(i64, v)

            def load(address: Any, kind: Any, align: int) -> Any:
                value = b.load(b.inttoptr(address, ir.PointerType(kind)))
                value.align = align
                return value

            def splat(v: Any) -> Any:
                empty = ir.Constant(vec(v.type, 8), ir.Undefined)
                one = b.insert_element(empty, v, ir.Constant(i32, 0))
                return b.shuffle_vector(one, empty, ir.Constant(vec(i32, 8), [0] * 8))

            nibble, four = ir.Constant(vec(i8, 32), [15] * 32), ir.Constant(vec(i8, 32), [4] * 32)
            ones = ir.Constant(vec(i16, 16), [1] * 16)
            acc = [cgutils.alloca_once_value(b, ir.Constant(v8, [0.0] * 8)) for _ in range(n_columns)]
            with cgutils.for_range(b, n_blocks) as loop:
                k = loop.index
                p = b.add(w, b.mul(k, const(BLOCK_BYTES)))
                xp = b.add(xq, b.mul(k, const(32 * n_columns)))
                dp = b.add(xd, b.mul(k, const(4 * n_columns)))
                sp = b.add(xs, b.mul(k, const(4 * n_columns)))
                for ahead in (0, 64, 128):
                    at = b.inttoptr(b.add(p, const(PREFETCH_BYTES + ahead)), ir.PointerType(i8))
                    b.call(prefetch, [at, ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)])
                d = b.fpext(load(p, vec(f16, 8), 2), v8)
                low, high = [], []
                for c in range(4):
                    q = load(b.add(p, const(16 + 32 * c)), vec(i8, 32), 1)
                    low.append(b.and_(q, nibble))
                    high.append(b.lshr(q, four))
                for j in range(n_columns):
                    parts = []
                    for c in range(4):
                        xl = b.bitcast(splat(load(b.add(xp, const(32 * j + 4 * c)), i32, 1)), vec(i8, 32))
                        xh = b.bitcast(splat(load(b.add(xp, const(32 * j + 16 + 4 * c)), i32, 1)), vec(i8, 32))
                        parts.append(b.add(b.call(mul_add_bytes, [low[c], xl]), b.call(mul_add_bytes, [high[c], xh])))
                    t = b.add(b.add(parts[0], parts[1]), b.add(parts[2], parts[3]))
                    s = b.sitofp(b.call(mul_add_words, [t, ones]), v8)
                    scale = splat(load(b.add(dp, const(4 * j)), f32, 4))
                    correction = splat(load(b.add(sp, const(4 * j)), f32, 4))
                    inner = b.call(fma, [s, scale, correction])
                    b.store(b.call(fma, [d, inner, b.load(acc[j])]), acc[j])
            for j in range(n_columns):
                to = b.inttoptr(b.add(y, b.mul(ldy, const(j))), ir.PointerType(v8))
                b.store(b.load(acc[j]), to).align = 4
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return dot


_dot8x1, _dot8x4 = _dot8(1), _dot8(4)
COLUMNS = 4
_ROWS_IN_CACHE = 16


@njit(nogil=True, cache=True)
def _q4_0x8_part(w, xq, xd, xs, n_blocks, y, ldy, g0, g1, n_tiles, n_single):  # type: ignore[no-untyped-def]
    """Row groups g0..g1 times all columns: tiles of 4 first, then single ones. Units: addresses and bytes."""
    tile_q, tile_d = n_blocks * 32 * COLUMNS, n_blocks * 4 * COLUMNS
    for start in range(g0, g1, _ROWS_IN_CACHE):
        stop = min(start + _ROWS_IN_CACHE, g1)
        for t in range(n_tiles):
            for g in range(start, stop):
                _dot8x4(w + g * n_blocks * BLOCK_BYTES, xq + t * tile_q, xd + t * tile_d, xs + t * tile_d, n_blocks,
                        y + 4 * GROUP * g + t * COLUMNS * ldy, ldy)  # fmt: skip
        for s in range(n_single):
            q, d = n_tiles * tile_q + s * n_blocks * 32, n_tiles * tile_d + s * n_blocks * 4
            for g in range(start, stop):
                _dot8x1(w + g * n_blocks * BLOCK_BYTES, xq + q, xd + d, xs + d, n_blocks,
                        y + 4 * GROUP * g + (n_tiles * COLUMNS + s) * ldy, ldy)  # fmt: skip


@njit(nogil=True, cache=True, parallel=True)
def q4_0x8_parallel(w, xq, xd, xs, n_blocks, y, ldy, n_groups, n_tiles, n_single, n_threads):  # type: ignore[no-untyped-def]
    """Packed Q4_0 times quantised columns, rows divided over threads."""
    for t in prange(n_threads):
        _q4_0x8_part(w, xq, xd, xs, n_blocks, y, ldy, n_groups * t // n_threads, n_groups * (t + 1) // n_threads,
                     n_tiles, n_single)  # fmt: skip


@njit(nogil=True, cache=True)
def q4_0x8_serial(w, xq, xd, xs, n_blocks, y, ldy, n_groups, n_tiles, n_single, n_threads):  # type: ignore[no-untyped-def]
    """The same on one thread."""
    _q4_0x8_part(w, xq, xd, xs, n_blocks, y, ldy, 0, n_groups, n_tiles, n_single)


@njit(nogil=True, cache=True)
def quantize_columns(x, xq, xd, xs, n_blocks, n_tiles, c0, c1):  # type: ignore[no-untyped-def]
    """Columns c0..c1 of x as int8 blocks of 32 in the order that the products read: tiles of 4, then single ones.

    Shapes: x float32 [n_columns, 32 * n_blocks]; xq int8, xd and xs float32, all flat.
    """
    for c in range(c0, c1):
        tiled = c < n_tiles * COLUMNS
        step = COLUMNS if tiled else 1
        base = (c // COLUMNS) * COLUMNS * n_blocks + c % COLUMNS if tiled else c * n_blocks
        for k in range(n_blocks):
            peak = np.float32(0)
            for i in range(32):
                peak = max(peak, abs(x[c, 32 * k + i]))
            d = peak / np.float32(127)
            inverse = np.float32(1) / d if d != 0 else np.float32(0)
            total = np.int32(0)
            at = base + k * step
            for i in range(32):
                q = np.int32(np.rint(x[c, 32 * k + i] * inverse))
                total += q
                xq[32 * at + i] = np.int8(q)
            xd[at] = d
            xs[at] = np.float32(-8) * d * np.float32(total)


@njit(nogil=True, cache=True, parallel=True)
def quantize_columns_parallel(x, xq, xd, xs, n_blocks, n_tiles, n_columns, n_threads):  # type: ignore[no-untyped-def]
    """`quantize_columns` over all columns, divided over threads."""
    for t in prange(n_threads):
        quantize_columns(x, xq, xd, xs, n_blocks, n_tiles, n_columns * t // n_threads, n_columns * (t + 1) // n_threads)


_Q4_0 = np.dtype([("d", "<u2"), ("q", "u1", 16)])
_Q4_0X8 = np.dtype([("d", "<u2", 8), ("q", "u1", (4, 8, 4))])
_GROUPS_AT_ONCE = 256


def pack_q4_0x8(memory: npt.NDArray[np.uint8], n_rows: int, n_blocks: int) -> None:
    """Interleave Q4_0 rows by eights, in place. Shapes: `memory` flat, n_rows * n_blocks * 18 bytes, n_rows % 8 == 0."""
    rows = memory.view(_Q4_0).reshape(n_rows // GROUP, GROUP, n_blocks)
    packed = memory.view(_Q4_0X8).reshape(n_rows // GROUP, n_blocks)
    for g in range(0, len(rows), _GROUPS_AT_ONCE):
        part = rows[g : g + _GROUPS_AT_ONCE].copy()
        packed["d"][g : g + _GROUPS_AT_ONCE] = part["d"].transpose(0, 2, 1)
        q = part["q"].reshape(*part.shape, 4, 4)
        packed["q"][g : g + _GROUPS_AT_ONCE] = q.transpose(0, 2, 3, 1, 4)


def unpack_q4_0x8(memory: npt.NDArray[np.uint8], n_rows: int, n_blocks: int) -> npt.NDArray[np.uint8]:
    """The rows of packed memory as they were, in new memory."""
    packed = memory.view(_Q4_0X8).reshape(n_rows // GROUP, n_blocks)
    rows = np.empty((n_rows // GROUP, GROUP, n_blocks), _Q4_0)
    rows["d"] = packed["d"].transpose(0, 2, 1)
    rows["q"] = packed["q"].transpose(0, 3, 1, 2, 4).reshape(*rows.shape, 16)
    return rows.reshape(-1).view(np.uint8)


def rows_of_q4_0x8(
    memory: npt.NDArray[np.uint8], n_blocks: int, ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """Some rows of packed memory as plain Q4_0 blocks. Shapes: returns uint8 [len(ids), n_blocks, 18]."""
    packed = memory.view(_Q4_0X8).reshape(-1, n_blocks)[ids // GROUP]
    r = ids % GROUP
    rows = np.empty((len(ids), n_blocks), _Q4_0)
    rows["d"] = np.take_along_axis(packed["d"], r[:, None, None], 2)[..., 0]
    q = np.take_along_axis(packed["q"], r[:, None, None, None, None], 3)[..., 0, :]
    rows["q"] = q.reshape(len(ids), n_blocks, 16)
    return rows.view(np.uint8).reshape(len(ids), n_blocks, 18)
