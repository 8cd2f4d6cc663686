"""Rows of weights between GGUF's layout and packed groups. Source of the packed layout: `formats`.

Units: every argument is an address or a count; strides are bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from workers.kernels.formats import BLOCK_BYTES, FIELDS, N_FIELDS
from workers.kernels.layout import GROUP
from workers.kernels.simd import (
    Emit,
    i1,
    i32,
    i64,
    load8,
    load16,
    load32,
    store8,
    store16,
    store32,
    v16i,
    vec,
)

v16l = vec(i64, 16)


@njit(nogil=True)
def _spread(word, row, out):  # type: ignore[no-untyped-def]
    """32 bits of a row into bit c of byte [row][t] for column 4 c + t."""
    for t in range(4):
        v = 0
        for c in range(8):
            v |= ((word >> (4 * c + t)) & 1) << c
        store8(out + 4 * row + t, v)


@njit(nogil=True)
def _gathered(packed, row):  # type: ignore[no-untyped-def]
    """The inverse of `_spread`."""
    word = 0
    for t in range(4):
        v = load8(packed + 4 * row + t)
        for c in range(8):
            word |= ((v >> c) & 1) << (4 * c + t)
    return word


@intrinsic
def _word_of_rows(typingctx: Any, rows: Any, row_bytes: Any, n_rows: Any, offset: Any, out: Any) -> Any:
    """Four bytes at `offset` of each of 16 rows, side by side; the last of `n_rows` stands in for those behind it."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emit(b)
        rows, row_bytes, n_rows, offset, out = args
        row = ir.Constant(v16l, list(range(16)))
        last = e.splat(b.sub(n_rows, e.const(1)))
        row = b.select(b.icmp_signed("<", row, last), row, last)
        at = b.add(e.splat(b.add(rows, offset)), b.mul(row, e.splat(row_bytes)))
        pointers = vec(ir.PointerType(i32), 16)
        gather = e.function("llvm.masked.gather.v16i32.v16p0", v16i, [pointers, i32, vec(i1, 16), v16i])
        everything = ir.Constant(vec(i1, 16), [1] * 16)
        e.store(b.call(gather, [b.inttoptr(at, pointers), e.int32(1), everything, e.ints(0)]), out)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@njit(nogil=True)
def pack_group(kind, rows, row_bytes, n_rows, n_blocks, out):  # type: ignore[no-untyped-def]
    """Up to 16 rows of GGUF's layout as a packed group; the last row stands in for those that are not there."""
    size = BLOCK_BYTES[kind]
    for k in range(n_blocks):
        for f in range(N_FIELDS[kind]):
            offset, unit, count, at = FIELDS[kind, f]
            q = out + GROUP * (k * size + at)
            if unit == 4:
                for i in range(count):
                    _word_of_rows(rows, row_bytes, n_rows, k * size + offset + 4 * i, q + 4 * GROUP * i)
                continue
            for r in range(GROUP):
                p = rows + min(r, n_rows - 1) * row_bytes + k * size + offset
                if unit == 2:
                    for i in range(count):
                        store16(q + 2 * GROUP * i + 2 * r, load16(p + 2 * i))
                elif unit == 1:
                    for i in range(count):
                        store8(q + GROUP * i + r, load8(p + i))
                else:
                    _spread(load32(p), r, q)


@njit(nogil=True)
def unpack_row(kind, group, row, n_blocks, out):  # type: ignore[no-untyped-def]
    """One row of a packed group in GGUF's layout."""
    size = BLOCK_BYTES[kind]
    for k in range(n_blocks):
        for f in range(N_FIELDS[kind]):
            offset, unit, count, at = FIELDS[kind, f]
            p, q = group + GROUP * (k * size + at), out + k * size + offset
            if unit == 4:
                for i in range(count):
                    store32(q + 4 * i, load32(p + 4 * GROUP * i + 4 * row))
            elif unit == 2:
                for i in range(count):
                    store16(q + 2 * i, load16(p + 2 * GROUP * i + 2 * row))
            elif unit == 1:
                for i in range(count):
                    store8(q + i, load8(p + GROUP * i + row))
            else:
                store32(q, _gathered(p, row))


@njit(nogil=True)
def copy_bytes(source, target, n):  # type: ignore[no-untyped-def]
    for i in range(n // 4):
        store32(target + 4 * i, load32(source + 4 * i))
    for i in range(n // 4 * 4, n):
        store8(target + i, load8(source + i))


@njit(nogil=True)
def pack_rows(kind, rows, row_bytes, n_groups, n_blocks, out):  # type: ignore[no-untyped-def]
    """Groups of rows in GGUF's layout as packed groups; `out` lies elsewhere."""
    for g in range(n_groups):
        at = GROUP * g * row_bytes
        pack_group(kind, rows + at, row_bytes, GROUP, n_blocks, out + at)


@njit(nogil=True)
def unpack_rows(kind, w, row_bytes, first, last, n_packed, n_blocks, out):  # type: ignore[no-untyped-def]
    """Rows first..last in GGUF's layout; rows from `n_packed` on never left it."""
    for r in range(first, last):
        if r < n_packed:
            unpack_row(kind, w + r // GROUP * GROUP * row_bytes, r % GROUP, n_blocks, out + (r - first) * row_bytes)
        else:
            copy_bytes(w + r * row_bytes, out + (r - first) * row_bytes, row_bytes)
