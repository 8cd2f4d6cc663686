"""A block of attention, and how blocks come together: what `flash` and `paged` share.

The context is taken in blocks of 64 cells, and 8 blocks are a chunk, both counted from a sequence's first cell. Within a
chunk the softmax runs online, a block at a time; chunks are merged in order. A block that a query does not see changes
nothing. So a query's bits do not depend on who else is in the batch, on the cells behind it, or on the threads.
Source: Dao et al., FlashAttention-2; Dao et al., Flash-Decoding for the chunks.

Units: addresses, counts, strides in bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from workers.kernels.layout import BLOCK, TILE, TOGETHER
from workers.kernels.simd import (
    Emit,
    f32,
    half_to_float,
    i16,
    i32,
    i64,
    load16,
    load64,
    loadf,
    store16,
    store64,
    storef,
    v16f,
    vec,
    widen_half,
)

HIDDEN = 0xFC00
"""Bits of a float16 minus infinity: a cell that is not seen."""


# -- vector pieces -----------------------------------------------------------------------------------------------------


@intrinsic
def _transpose16(typingctx: Any, k: Any, k_row: Any, out: Any) -> Any:
    """16 float16 of each of 16 cells as float32 [16][BLOCK]: four rounds of interleaving."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emit(b)
        k, k_row, out = args
        rows = [e.halves(b.add(k, b.mul(k_row, e.const(i))), 0) for i in range(16)]
        mix = [ir.Constant(vec(i32, 16), [x for i in range(8) for x in (i + at, i + at + 16)]) for at in (0, 8)]
        for _ in range(4):
            rows = [b.shuffle_vector(rows[i // 2], rows[i // 2 + 8], mix[i % 2]) for i in range(16)]
        for i, row in enumerate(rows):
            e.store(row, out, 4 * BLOCK * i)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _scores(n: int) -> Any:
    @intrinsic
    def scores(typingctx: Any, queries: Any, keys: Any, d: Any, out: Any) -> Any:
        """`n` queries (an array of addresses) times a block of transposed keys. Shapes: out float32 [n][BLOCK]."""

        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            e = Emit(b)
            queries, keys, d, out = args
            q = [e.load(queries, 8 * i, i64) for i in range(n)]
            for part in range(0, BLOCK // 16, 2):
                acc = [[cgutils.alloca_once_value(b, e.floats(0.0)) for _ in range(2)] for _ in range(n)]
                for a in (x for pair in acc for x in pair):
                    b.store(e.floats(0.0), a)
                with cgutils.for_range(b, d) as loop:
                    at, step = b.mul(loop.index, e.const(4 * BLOCK)), b.mul(loop.index, e.const(4))
                    row = b.add(keys, at)
                    k = [e.load(row, 64 * (part + j), v16f) for j in range(2)]
                    for i in range(n):
                        x = e.splat(e.load(b.add(q[i], step), 0, f32))
                        for j in range(2):
                            b.store(e.fma(x, k[j], b.load(acc[i][j])), acc[i][j])
                for i in range(n):
                    for j in range(2):
                        e.store(b.load(acc[i][j]), out, 4 * BLOCK * i + 64 * (part + j))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return scores


def _weighted(n: int, width: int) -> Any:
    @intrinsic
    def weighted(typingctx: Any, weights: Any, v: Any, v_row: Any, n_cells: Any, outputs: Any, offset: Any) -> Any:
        """Add cells of values (float16), weighted, to `width` * 16 elements of `n` outputs (an array of addresses)."""

        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            e = Emit(b)
            weights, v, v_row, n_cells, outputs, offset = args
            y = [b.add(e.load(outputs, 8 * i, i64), b.mul(offset, e.const(2))) for i in range(n)]
            acc = [[cgutils.alloca_once(b, v16f) for _ in range(width)] for _ in range(n)]
            for i in range(n):
                for j in range(width):
                    b.store(e.load(y[i], 64 * j, v16f), acc[i][j])
            with cgutils.for_range(b, n_cells) as loop:
                row = b.add(b.add(v, offset), b.mul(loop.index, v_row))
                values = [e.halves(row, 32 * j) for j in range(width)]
                at = b.add(weights, b.mul(loop.index, e.const(4)))
                for i in range(n):
                    p = e.splat(e.load(at, 4 * BLOCK * i, f32))
                    for j in range(width):
                        b.store(e.fma(p, values[j], b.load(acc[i][j])), acc[i][j])
            for i in range(n):
                for j in range(width):
                    e.store(b.load(acc[i][j]), y[i], 64 * j)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return weighted


@intrinsic
def _masked(typingctx: Any, scores: Any, mask: Any, scale: Any, softcap: Any) -> Any:
    """Scale, cap and mask a block of scores in place (a `mask` of 0: none); the largest of them."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emit(b)
        scores, mask, scale, softcap = args
        top = e.function("llvm.vector.reduce.fmax.v16f32", f32, [v16f])
        larger = e.function("llvm.maxnum.v16f32", v16f, [v16f, v16f])
        peak = cgutils.alloca_once_value(b, e.floats(float("-inf")))
        room = cgutils.alloca_once(b, v16f)
        for part in range(0, 4 * BLOCK, 64):
            b.store(b.fmul(e.load(scores, part, v16f), e.splat(scale)), room)
            with b.if_then(b.fcmp_unordered("!=", softcap, ir.Constant(f32, 0.0))):
                cap = e.splat(softcap)
                b.store(b.fmul(e.tanh(b.fdiv(b.load(room), cap)), cap), room)
            with b.if_then(b.icmp_signed("!=", mask, e.const(0))):
                bits = e.load(mask, part // 2, vec(i16, 16))
                hidden = b.icmp_unsigned("==", bits, ir.Constant(vec(i16, 16), [HIDDEN] * 16))
                shown = b.fadd(b.load(room), widen_half(b, bits))
                b.store(b.select(hidden, e.floats(float("-inf")), shown), room)
            x = b.load(room)
            e.store(x, scores, part)
            b.store(b.call(larger, [b.load(peak), x]), peak)
        return b.call(top, [b.load(peak)])

    return types.float32(types.int64, types.int64, types.float32, types.float32), codegen


@intrinsic
def _weights(typingctx: Any, scores: Any, peak: Any) -> Any:
    """e^(score - peak) in place for a block; their sum."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emit(b)
        scores, peak = args
        add = e.function("llvm.vector.reduce.fadd.v16f32", f32, [f32, v16f])
        total = e.floats(0.0)
        for part in range(0, 4 * BLOCK, 64):
            p = e.exp(b.fsub(e.load(scores, part, v16f), e.splat(peak)))
            e.store(p, scores, part)
            total = b.fadd(total, p)
        return b.call(add, [ir.Constant(f32, 0.0), total])

    return types.float32(types.int64, types.float32), codegen


@intrinsic
def _exp1(typingctx: Any, x: Any) -> Any:
    """The same e^x as in a block, for one number."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emit(b)
        return b.extract_element(e.exp(e.splat(args[0])), ir.Constant(i32, 0))

    return types.float32(types.float32), codegen


_scores4, _scores1 = _scores(TOGETHER), _scores(1)
_weighted4x4, _weighted1x4 = _weighted(TOGETHER, 4), _weighted(1, 4)
_weighted4x1, _weighted1x1 = _weighted(TOGETHER, 1), _weighted(1, 1)


# -- one tile of queries -----------------------------------------------------------------------------------------------


@njit(nogil=True)
def _load_keys(k, k_row, n_cells, d, out):  # type: ignore[no-untyped-def]
    """A block of keys, transposed: float32 [d][BLOCK], zero where there is no cell."""
    whole = n_cells == BLOCK and d % 16 == 0
    if whole:
        for c in range(0, BLOCK, 16):
            for i in range(0, d, 16):
                _transpose16(k + c * k_row + 2 * i, k_row, out + 4 * (BLOCK * i + c))
        return
    for i in range(d):
        for c in range(BLOCK):
            x = half_to_float(load16(k + c * k_row + 2 * i)) if c < n_cells else np.float32(0)
            storef(out + 4 * (BLOCK * i + c), x)


@njit(nogil=True)
def _add_values(n, weights, v, v_row, n_cells, outputs, d_v):  # type: ignore[no-untyped-def]
    """Weighted values of a block to n outputs (n is TOGETHER or 1)."""
    i = 0
    while i + 64 <= d_v:
        if n == TOGETHER:
            _weighted4x4(weights, v, v_row, n_cells, outputs, 2 * i)
        else:
            _weighted1x4(weights, v, v_row, n_cells, outputs, 2 * i)
        i += 64
    while i + 16 <= d_v:
        if n == TOGETHER:
            _weighted4x1(weights, v, v_row, n_cells, outputs, 2 * i)
        else:
            _weighted1x1(weights, v, v_row, n_cells, outputs, 2 * i)
        i += 16
    for j in range(n):
        y = load64(outputs + 8 * j)
        for x in range(i, d_v):
            total = loadf(y + 4 * x)
            for c in range(n_cells):
                total += loadf(weights + 4 * (BLOCK * j + c)) * half_to_float(load16(v + c * v_row + 2 * x))
            storef(y + 4 * x, total)


@njit(nogil=True)
def merge(state, part, d_v):  # type: ignore[no-untyped-def]
    """Add a part (peak, sum, values) to a state of the same form."""
    peak, other = loadf(state), loadf(part)
    if other == -np.inf:
        return
    top = max(peak, other)
    a, b = _exp1(peak - top), _exp1(other - top)
    storef(state, top)
    storef(state + 4, loadf(state + 4) * a + loadf(part + 4) * b)
    for i in range(d_v):
        at = 8 + 4 * i
        storef(state + at, loadf(state + at) * a + loadf(part + at) * b)


@njit(nogil=True)
def clear(state, d_v):  # type: ignore[no-untyped-def]
    storef(state, np.float32(-np.inf))
    for i in range(d_v + 1):
        storef(state + 4 + 4 * i, np.float32(0))


@njit(nogil=True)
def finish(state, sink, d_v, y):  # type: ignore[no-untyped-def]
    """Divide by the sum of weights. A sink (not -inf) takes part in it and gives nothing."""
    peak, total = loadf(state), loadf(state + 4)
    factor = np.float32(1)
    if sink != -np.inf:
        top = max(peak, sink)
        factor = _exp1(peak - top)
        total = total * factor + _exp1(sink - top)
    inverse = factor / total if total != 0 else np.float32(0)
    for i in range(d_v):
        storef(y + 4 * i, loadf(state + 8 + 4 * i) * inverse)


@njit(nogil=True)
def _zero(row):  # type: ignore[no-untyped-def]
    for c in range(BLOCK):
        storef(row + 4 * c, np.float32(0))


@njit(nogil=True)
def _short_mask(mask, n_cells, out):  # type: ignore[no-untyped-def]
    """The mask of a block that the context ends in."""
    for c in range(BLOCK):
        shown = load16(mask + 2 * c) if mask != 0 and c < n_cells else 0
        store16(out + 2 * c, shown if c < n_cells else HIDDEN)


@njit(nogil=True)
def tile_block(  # type: ignore[no-untyped-def]
    n_seen, queries, masks, d, k, k_row, v, v_row, d_v, n_cells, scale, softcap, states, scratch
):  # fmt: skip
    """A block of cells, whose first is at k and v, for those of a tile of queries that see something of it.

    `queries`, `states`, `masks` of the block (0: all is seen): arrays of addresses. `scratch`: keys, scores, then arrays of
    indices and addresses, of which the first names the `n_seen` queries.
    """
    keys, scores = scratch, scratch + 4 * BLOCK * d
    lists = scores + 4 * BLOCK * TOGETHER
    chosen, outputs, short = lists + 8 * TILE, lists + 8 * (TILE + TOGETHER), lists + 8 * (TILE + 2 * TOGETHER)
    _load_keys(k, k_row, n_cells, d, keys)
    at = 0
    while at < n_seen:
        m = TOGETHER if n_seen - at >= TOGETHER else 1
        for i in range(m):
            store64(chosen + 8 * i, load64(queries + 8 * load64(lists + 8 * (at + i))))
        if m == TOGETHER:
            _scores4(chosen, keys, d, scores)
        else:
            _scores1(chosen, keys, d, scores)
        for i in range(m):
            which = load64(lists + 8 * (at + i))
            mask, state, row = load64(masks + 8 * which), load64(states + 8 * which), scores + 4 * BLOCK * i
            if n_cells < BLOCK:
                _short_mask(mask, n_cells, short)
                mask = short
            old = loadf(state)
            peak = max(old, _masked(row, mask, scale, softcap))
            store64(outputs + 8 * i, state + 8)
            if peak == -np.inf:
                _zero(row)
                continue
            total = _weights(row, peak)
            factor = _exp1(old - peak)
            storef(state, peak)
            storef(state + 4, loadf(state + 4) * factor + total)
            if factor != 1:
                for x in range(d_v):
                    storef(state + 8 + 4 * x, loadf(state + 8 + 4 * x) * factor)
        _add_values(m, scores, v, v_row, n_cells, outputs, d_v)
        at += m


@njit(nogil=True)
def state_bytes(d_v):  # type: ignore[no-untyped-def]
    return 4 * (d_v + 2)


@njit(nogil=True)
def sink(sinks, head):  # type: ignore[no-untyped-def]
    return loadf(sinks + 4 * head) if sinks != 0 else np.float32(-np.inf)
