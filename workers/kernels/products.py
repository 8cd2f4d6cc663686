"""Matrix products over packed weights: 16 rows at a time, one column or tiles of columns.

A column of x is quantised to blocks of 32: 32 int8, then as float32 their scale and the scaled sums of all 32, of the
first 16 and of the second 16. One output element is always the same sum in the same order, block after block, whether it
is computed alone or in a tile, from packed rows or from GGUF's own: its bits do not depend on the company it is in.

Units: every argument is an address or a count unless said otherwise; strides are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from protocol.dtypes import GGMLType
from workers.kernels.dots import Chunk, dots
from workers.kernels.formats import (
    BLOCK,
    BLOCK_BYTES,
    FLOAT_FIELDS,
    FORMATS,
    Format,
    Sub,
    float_row,
)
from workers.kernels.layout import GROUP, KIND_OF, KINDS, N_QUANTIZED, PANEL_BYTES, PIECE, X_BLOCK
from workers.kernels.packing import copy_bytes, pack_group
from workers.kernels.pieces import Body, call, piece
from workers.kernels.simd import (
    TARGET,
    Emit,
    f32,
    half_to_float,
    i32,
    i64,
    load8,
    load16,
    load32,
    load64,
    loadf,
    store32,
    store64,
    storef,
    v16f,
    v16i,
    vec,
)

PREFETCH_BYTES = 3072
MIN_PAIRED = 24
"""Fewer columns than this do not fill tiles of two groups well."""
MIN_TILED = 16
"""Fewer columns than this are multiplied straight from packed rows, which are unpacked again for each few."""

_PEAKS = (15, 31, 63, 255) if TARGET.name != "AVX-512 VNNI" else (255,)


def _class(f: Format) -> tuple[int, int]:
    """What a product of unpacked bytes must know of their format: columns of a scale, and the peak (0: signed)."""
    return f.sub, 0 if f.signed else next(p for p in _PEAKS if p >= f.peak)


CLASSES = tuple(sorted({_class(f) for f in FORMATS.values()}))
CLASS_OF = tuple(CLASSES.index(_class(FORMATS[t])) for t in KINDS[:N_QUANTIZED])


def _pieces(prefix: str, n_arguments: int, bodies: dict[str, Body]) -> list[str]:
    """One piece for each of the ways in which a kernel is written, and their names in the same order."""
    return [piece(f"ggmq_{prefix}_{which}", n_arguments, body) for which, body in bodies.items()]


def _switch(b: Any, index: Any, names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Call the piece that stands at `index`."""
    for i, name in enumerate(names):
        with b.if_then(b.icmp_signed("==", index, ir.Constant(i64, i))):
            call(b, name, arguments)


def _fused(e: Emit, sub: Sub, dot: Any, x: Any, half: int | None, acc: Any) -> None:
    """acc += scale * (x's scale * dot) + minimum * (x's sum): the one place that fixes this arithmetic."""
    b = e.b
    scale_x = e.splat(e.load(x, 32, f32))
    total = e.fma(b.sitofp(dot, v16f), b.fmul(sub.scale, scale_x), b.load(acc))
    if sub.minimum is not None:
        sum_x = e.splat(e.load(x, 36 if half is None else 40 + 4 * half, f32))
        total = e.fma(sub.minimum, sum_x, total)
    b.store(total, acc)


# -- few columns, straight from packed rows: GEMV ----------------------------------------------------------------------


def _gemv(f: Format, n: int) -> Body:
    def body(e: Emit, args: Sequence[Any]) -> None:
        b = e.b
        w, n_blocks, columns, outputs, offset = args
        xs = [e.load(columns, 8 * c, i64) for c in range(n)]
        acc = [cgutils.alloca_once_value(b, e.floats(0.0)) for _ in range(n)]
        x_bytes = f.columns // 32 * X_BLOCK
        with cgutils.for_range(b, n_blocks) as loop:
            p = b.add(w, b.mul(loop.index, e.const(f.group_bytes)))
            step = b.mul(loop.index, e.const(x_bytes))
            x0 = [b.add(x, step) for x in xs]
            lines = range(0, f.group_bytes, 64)
            n_sub = f.columns // f.sub
            for j, sub in enumerate(f.unpack(e, p)):
                before = b.load(acc[0])
                for line in lines[len(lines) * j // n_sub : len(lines) * (j + 1) // n_sub]:
                    e.prefetch(p, PREFETCH_BYTES + line, before)
                at, half = (j, None) if f.sub == 32 else (j // 2, j % 2)
                there = [e.at(x, at * X_BLOCK) for x in x0]
                totals = dots(e, [sub.chunks], there, 16 * (half or 0), f.peak)[0]
                for c in range(n):
                    _fused(e, sub, totals[c], there[c], half, acc[c])
        for c in range(n):
            e.store(b.load(acc[c]), b.add(e.load(outputs, 8 * c, i64), offset))

    return body


def _gemvs(n: int) -> Any:
    names = _pieces(f"gemv{n}", 5, {t.name: _gemv(FORMATS[t], n) for t in KINDS[:N_QUANTIZED]})

    @intrinsic
    def gemv(typingctx: Any, kind: Any, w: Any, n_blocks: Any, columns: Any, outputs: Any, offset: Any) -> Any:
        """A packed group of rows times `n` quantised columns. `columns` and `outputs`: arrays of addresses."""

        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            _switch(b, args[0], names, args[1:])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return gemv


FEW = min(4, TARGET.columns[0])
_gemv_one, _gemv_many = _gemvs(1), _gemvs(FEW)


# -- many columns, unpacked once, in tiles: GEMM -----------------------------------------------------------------------


def _unpack_panel(f: Format) -> Body:
    def body(e: Emit, args: Sequence[Any]) -> None:
        b = e.b
        w, n_blocks, panel = args
        n_sub = f.columns // f.sub
        with cgutils.for_range(b, n_blocks) as loop:
            p = b.add(w, b.mul(loop.index, e.const(f.group_bytes)))
            q = b.add(panel, b.mul(loop.index, e.const(GROUP * f.columns)))
            s = b.add(panel, b.add(b.mul(loop.index, e.const(64 * n_sub)), e.const(512 * PIECE)))
            for j, sub in enumerate(f.unpack(e, p)):
                for c, chunk in enumerate(sub.chunks):
                    e.store(chunk(), q, GROUP * f.sub * j + 64 * c)
                e.store(sub.scale, s, 64 * j)
                if sub.minimum is not None:
                    e.store(sub.minimum, s, 64 * j + 128 * PIECE)

    return body


_PANELS = _pieces("panel", 3, {t.name: _unpack_panel(FORMATS[t]) for t in KINDS[:N_QUANTIZED]})


@intrinsic
def unpack_panel(typingctx: Any, kind: Any, w: Any, n_blocks: Any, panel: Any) -> Any:
    """Blocks of a packed group as bytes, scales and minima: PANEL_BYTES for at most PIECE * 32 columns."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        _switch(b, args[0], _PANELS, args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _tile(sub: int, peak: int, n: int, n_groups: int = 1) -> Body:
    def body(e: Emit, args: Sequence[Any]) -> None:
        b = e.b
        panel, n32, columns, x_offset, outputs, offset, first = args
        xs = [b.add(e.load(columns, 8 * c, i64), x_offset) for c in range(n)]
        ys = [b.add(e.load(outputs, 8 * c, i64), offset) for c in range(n)]
        acc = [[cgutils.alloca_once_value(b, e.floats(0.0)) for _ in range(n)] for _ in range(n_groups)]
        with b.if_then(b.icmp_signed("==", first, e.const(0))):
            for g in range(n_groups):
                for c in range(n):
                    b.store(e.load(ys[c], 64 * g, v16f), acc[g][c])
        n_sub = 32 // sub
        with cgutils.for_range(b, n32) as loop:
            q = b.add(panel, b.mul(loop.index, e.const(512)))
            s = b.add(panel, b.add(b.mul(loop.index, e.const(64 * n_sub)), e.const(512 * PIECE)))
            step = b.mul(loop.index, e.const(X_BLOCK))
            at = [b.add(x, step) for x in xs]
            for j in range(n_sub):
                half = None if n_sub == 1 else j
                weights = []
                for g in range(n_groups):
                    there = g * PANEL_BYTES
                    chunks: list[Chunk] = [partial(e.chunk, q, there + GROUP * sub * j + 64 * c) for c in range(sub // 4)]
                    minimum = e.load(s, there + 64 * j + 128 * PIECE, v16f) if peak else None
                    weights.append(Sub(chunks, e.load(s, there + 64 * j, v16f), minimum))
                totals = dots(e, [w.chunks for w in weights], at, 16 * (half or 0), peak)
                for g in range(n_groups):
                    for c in range(n):
                        _fused(e, weights[g], totals[g][c], at[c], half, acc[g][c])
        for g in range(n_groups):
            for c in range(n):
                e.store(b.load(acc[g][c]), ys[c], 64 * g)

    return body


def _tiles(n: int, n_groups: int = 1) -> Any:
    names = _pieces(f"tile{n_groups}x{n}", 7, {f"{sub}_{peak}": _tile(sub, peak, n, n_groups) for sub, peak in CLASSES})

    @intrinsic
    def tile(
        typingctx: Any, kind: Any, panel: Any, n32: Any, columns: Any, x_offset: Any, outputs: Any, offset: Any,
        first: Any,
    ) -> Any:
        """Panels, one behind the other, times `n` columns. `columns` and `outputs`: arrays of addresses, to which the
        offsets are added."""

        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            _switch(b, args[0], names, args[1:])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


_WIDE, _MIDDLE, _SINGLE = (TARGET.columns + (1, 1))[:3]
_tile_wide, _tile_middle, _tile_single = _tiles(_WIDE), _tiles(_MIDDLE), _tiles(1)
_PAIRED = TARGET.paired
_tile_paired = _tiles(max(1, _PAIRED), 2)


# -- floats ------------------------------------------------------------------------------------------------------------


def _float_tile(t: GGMLType, n_groups: int, n: int) -> Body:
    size = FLOAT_FIELDS[t][0].unit * GROUP

    def body(e: Emit, args: Sequence[Any]) -> None:
        b = e.b
        w, k, stride, columns, outputs, offset = args
        xs = [e.load(columns, 8 * c, i64) for c in range(n)]
        ys = [b.add(e.load(outputs, 8 * c, i64), offset) for c in range(n)]
        ws = [b.add(w, b.mul(stride, e.const(g))) for g in range(n_groups)]
        acc = [[cgutils.alloca_once_value(b, e.floats(0.0)) for _ in range(n)] for _ in range(n_groups)]
        with cgutils.for_range(b, k) as loop:
            step, at = b.mul(loop.index, e.const(size)), b.mul(loop.index, e.const(4))
            rows = [float_row(e, t, b.add(p, step)) for p in ws]
            for c in range(n):
                x = e.splat(e.load(b.add(xs[c], at), 0, f32))
                for g in range(n_groups):
                    b.store(e.fma(rows[g], x, b.load(acc[g][c])), acc[g][c])
        for g in range(n_groups):
            for c in range(n):
                e.store(b.load(acc[g][c]), ys[c], 64 * g)

    return body


def _float_tiles(n_groups: int, n: int) -> Any:
    names = _pieces(f"float{n_groups}x{n}", 6, {t.name: _float_tile(t, n_groups, n) for t in KINDS[N_QUANTIZED:]})

    @intrinsic
    def tile(
        typingctx: Any, kind: Any, w: Any, k: Any, stride: Any, columns: Any, outputs: Any, offset: Any
    ) -> Any:
        """Packed groups of floats, `stride` bytes apart, times `n` columns of float32, over k columns of weights."""

        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            _switch(b, b.sub(args[0], ir.Constant(i64, N_QUANTIZED)), names, args[1:])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return tile


_floats_wide, _floats_one, _floats_four = _float_tiles(1, _WIDE), _float_tiles(1, 1), _float_tiles(4, 1)


# -- x -----------------------------------------------------------------------------------------------------------------


@intrinsic
def _quantize_block(typingctx: Any, x: Any, out: Any) -> Any:
    """32 float32 as int8 with scale and sums."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emit(b)
        x, out = args
        values = [e.load(x, 0, v16f), e.load(x, 64, v16f)]
        largest = e.function("llvm.vector.reduce.umax.v16i32", i32, [v16i])
        add = e.function("llvm.vector.reduce.add.v16i32", i32, [v16i])
        nearest = e.function("llvm.rint.v16f32", v16f, [v16f])
        sizes = [b.and_(b.bitcast(v, v16i), e.ints(0x7FFFFFFF)) for v in values]
        either = b.select(b.icmp_unsigned(">", sizes[0], sizes[1]), sizes[0], sizes[1])
        peak = b.bitcast(b.call(largest, [either]), f32)
        d = b.fdiv(peak, ir.Constant(f32, 127.0))
        zero = ir.Constant(f32, 0.0)
        inverse = b.select(b.fcmp_unordered("!=", d, zero), b.fdiv(ir.Constant(f32, 1.0), d), zero)
        sums = []
        for i, v in enumerate(values):
            q = b.fptosi(b.call(nearest, [b.fmul(v, e.splat(inverse))]), v16i)
            e.store(b.trunc(q, vec(e.bytes(0).type.element, 16)), out, 16 * i)
            sums.append(b.sitofp(b.call(add, [q]), f32))
        e.store(d, out, 32)
        for at, total in ((36, b.fadd(*sums)), (40, sums[0]), (44, sums[1])):
            e.store(b.fmul(d, total), out, at)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@njit(nogil=True)
def quantize(x, x_row, n, k, y, t, n_threads):  # type: ignore[no-untyped-def]
    """n columns of k float32 as blocks; divided over threads by blocks."""
    n32 = k // 32
    for i in range(n * n32 * t // n_threads, n * n32 * (t + 1) // n_threads):
        c, j = i // n32, i % n32
        _quantize_block(x + c * x_row + 128 * j, y + i * X_BLOCK)


# -- the product -------------------------------------------------------------------------------------------------------

_CLASS_OF = np.array(CLASS_OF)


@njit(nogil=True)
def _quantized_groups(kind, group, n_groups, group_bytes, n_blocks, columns, outputs, n, offset, panel):  # type: ignore[no-untyped-def]
    """One packed group, or two that follow each other, times n columns."""
    if n < MIN_TILED:
        done = 0
        while n - done >= FEW:
            _gemv_many(kind, group, n_blocks, columns + 8 * done, outputs + 8 * done, offset)
            done += FEW
        while done < n:
            _gemv_one(kind, group, n_blocks, columns + 8 * done, outputs + 8 * done, offset)
            done += 1
        return
    per_block = BLOCK[kind] // 32
    size, step, shape = GROUP * BLOCK_BYTES[kind], PIECE // per_block, _CLASS_OF[kind]
    for k in range(0, n_blocks, step):
        m = min(step, n_blocks - k)
        for g in range(n_groups):
            unpack_panel(kind, group + g * group_bytes + k * size, m, panel + g * PANEL_BYTES)
        x_at, first, start = k * per_block * X_BLOCK, 1 if k == 0 else 0, 0
        if n_groups == 2:
            while n - start >= _PAIRED:
                _tile_paired(shape, panel, m * per_block, columns + 8 * start, x_at, outputs + 8 * start, offset, first)
                start += _PAIRED
        for g in range(n_groups):
            p, y_at, c = panel + g * PANEL_BYTES, offset + 64 * g, start
            while n - c >= _WIDE:
                _tile_wide(shape, p, m * per_block, columns + 8 * c, x_at, outputs + 8 * c, y_at, first)
                c += _WIDE
            while n - c >= _MIDDLE:
                _tile_middle(shape, p, m * per_block, columns + 8 * c, x_at, outputs + 8 * c, y_at, first)
                c += _MIDDLE
            while c < n:
                _tile_single(shape, p, m * per_block, columns + 8 * c, x_at, outputs + 8 * c, y_at, first)
                c += 1


@njit(nogil=True)
def _float_group(kind, group, k, columns, outputs, n, offset):  # type: ignore[no-untyped-def]
    c = 0
    while n - c >= _WIDE:
        _floats_wide(kind, group, k, 0, columns + 8 * c, outputs + 8 * c, offset)
        c += _WIDE
    while c < n:
        _floats_one(kind, group, k, 0, columns + 8 * c, outputs + 8 * c, offset)
        c += 1


@njit(nogil=True)
def product(  # type: ignore[no-untyped-def]
    kind, w, row_bytes, n_rows, n_packed, k, columns, outputs, n, scratch, t, n_threads
):  # fmt: skip
    """Rows times n columns, row groups divided over threads.

    `columns` and `outputs` are arrays of addresses: of quantised x (of float32 for weights of floats) and of float32 y.
    The first `n_packed` rows are packed groups, the others lie in GGUF's layout. `scratch` is the thread's own:
    two times PANEL_BYTES, then the bytes of a group, then 16 float32 and an address for each column.
    """
    n_groups = (n_rows + GROUP - 1) // GROUP
    n_blocks = k // BLOCK[kind]
    each = 2 if _PAIRED and kind < N_QUANTIZED and n >= MIN_PAIRED else 1
    n_shares = (n_groups + each - 1) // each
    first, last = each * (n_shares * t // n_threads), min(n_groups, each * (n_shares * (t + 1) // n_threads))
    g = first
    while g < last:
        whole = GROUP * (g + 1) <= n_packed
        if whole and kind >= N_QUANTIZED and n < _WIDE and g + 4 <= last and GROUP * (g + 4) <= n_packed:
            for c in range(n):
                _floats_four(kind, w + GROUP * g * row_bytes, k, GROUP * row_bytes, columns + 8 * c, outputs + 8 * c, 64 * g)
            g += 4
            continue
        if _PAIRED and kind < N_QUANTIZED and n >= MIN_PAIRED and g + 2 <= last and GROUP * (g + 2) <= n_packed:
            _quantized_groups(kind, w + GROUP * g * row_bytes, 2, GROUP * row_bytes, n_blocks, columns, outputs, n, 64 * g,
                              scratch)  # fmt: skip
            g += 2
            continue
        group, out, offset = w + GROUP * g * row_bytes, outputs, 64 * g
        valid = min(GROUP, n_rows - GROUP * g)
        if not whole:
            group = scratch + 2 * PANEL_BYTES
            pack_group(kind, w + GROUP * g * row_bytes, row_bytes, valid, n_blocks, group)
        rest = scratch + 2 * PANEL_BYTES + GROUP * row_bytes
        if valid < GROUP:
            out, offset = rest + 64 * n, 0
            for c in range(n):
                store64(out + 8 * c, rest + 64 * c)
        if kind < N_QUANTIZED:
            _quantized_groups(kind, group, 1, 0, n_blocks, columns, out, n, offset, scratch)
        else:
            _float_group(kind, group, k, columns, out, n, offset)
        if valid < GROUP:
            for c in range(n):
                copy_bytes(rest + 64 * c, load64(outputs + 8 * c) + 64 * g, 4 * valid)
        g += 1


# -- rows of weights ---------------------------------------------------------------------------------------------------

_SUB = np.array([FORMATS[t].sub for t in KINDS[:N_QUANTIZED]])
KIND_F32, KIND_F16 = KIND_OF[GGMLType.F32], KIND_OF[GGMLType.F16]
_SIGNED = np.array([FORMATS[t].signed for t in KINDS[:N_QUANTIZED]])


@njit(nogil=True)
def _unpacked_row(kind, group, lane, n_blocks, y, panel):  # type: ignore[no-untyped-def]
    """A row of a packed group as float32: products with one rounding, as the definition of each type has them."""
    if kind >= N_QUANTIZED:
        for i in range(n_blocks):
            if kind == KIND_F32:
                store32(y + 4 * i, load32(group + 64 * i + 4 * lane))
            elif kind == KIND_F16:
                storef(y + 4 * i, half_to_float(load16(group + 32 * i + 2 * lane)))
            else:
                store32(y + 4 * i, np.int32(load16(group + 32 * i + 2 * lane)) << 16)
        return
    columns, sub = BLOCK[kind], _SUB[kind]
    step = PIECE * 32 // columns
    for k in range(0, n_blocks, step):
        m = min(step, n_blocks - k)
        unpack_panel(kind, group + GROUP * BLOCK_BYTES[kind] * k, m, panel)
        for i in range(m * columns):
            scales = panel + 512 * PIECE + 64 * (i // sub) + 4 * lane
            byte = np.int64(load8(panel + 64 * (i // 4) + 4 * lane + i % 4))
            if _SIGNED[kind]:
                v = np.float64(loadf(scales)) * np.float64(byte - 256 * (byte >> 7))
            else:
                v = np.float64(loadf(scales)) * np.float64(byte) + np.float64(loadf(scales + 128 * PIECE))
            storef(y + 4 * (k * columns + i), np.float32(v))


@njit(nogil=True)
def get_rows(  # type: ignore[no-untyped-def]
    kind, w, row_bytes, n_rows, n_packed, n, ids, id_step, n_ids, y, scratch, t, n_threads
):  # fmt: skip
    """Rows of weights as float32 [n_ids, n], by int32 ids `id_step` bytes apart. False: an id points outside."""
    n_blocks = n // BLOCK[kind]
    for i in range(n_ids * t // n_threads, n_ids * (t + 1) // n_threads):
        row = load32(ids + id_step * i)
        if row < 0 or row >= n_rows:
            return False
        group, lane = w + row // GROUP * GROUP * row_bytes, row % GROUP
        if row >= n_packed:
            group, lane = scratch + PANEL_BYTES, 0
            pack_group(kind, w + row * row_bytes, row_bytes, 1, n_blocks, group)
        _unpacked_row(kind, group, lane, n_blocks, y + 4 * n * i, scratch)
    return True
