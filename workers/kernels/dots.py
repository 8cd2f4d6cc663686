"""Products of bytes, added: what a target multiplies weights and quantised columns of x with.

Sums of integers are exact, so every target gives the same, in whatever order it takes the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from workers.kernels.simd import TARGET, Emit, i8, i16, i32, v16i, v64b, vec

Chunk = Callable[[], Any]
"""Writes what gives 64 bytes, [row][4]: four columns of 16 rows. Called where they are used, so that they need not wait in
a register."""

v32b, v16w, v8i = vec(i8, 32), vec(i16, 16), vec(i32, 8)
HALVES = (0, 1)
"""Of 16 rows, on a CPU whose registers hold 8."""


def dots(e: Emit, rows: Sequence[Sequence[Chunk]], columns: Sequence[Any], offset: int, peak: int) -> list[list[Any]]:
    """Sixteen int32 for each group of rows and each column, [group][column].

    Arguments:
        rows: of each group, its chunks.
        columns: addresses of columns of x; `offset` bytes further are the int8 that meet the first chunk. |x| <= 127.
        peak: the largest byte of a weight, which has no sign; 0 when they are signed.
    """
    if TARGET.name == "AVX-512 VNNI":
        return _dots_vnni(e, rows, columns, offset)
    if TARGET.name == "AVX-512":
        return _dots_avx512(e, rows, columns, offset, peak)
    if TARGET.name == "AVX2":
        return [_dots_avx2(e, chunks, columns, offset, peak) for chunks in rows]
    return [[_dot(e, chunks, x, offset, peak) for x in columns] for chunks in rows]


def _dot(e: Emit, chunks: Sequence[Chunk], x: Any, offset: int, peak: int) -> Any:
    b, total, wide = e.b, e.ints(0), vec(i32, 64)
    for i, chunk in enumerate(chunks):
        w, each = chunk(), b.bitcast(e.splat(e.load(x, offset + 4 * i, i32)), v64b)
        p = b.mul(b.zext(w, wide) if peak else b.sext(w, wide), b.sext(each, wide))
        for k in range(4):
            total = b.add(total, b.shuffle_vector(p, p, ir.Constant(v16i, list(range(k, 64, 4)))))
    return total


def _dots_vnni(e: Emit, rows: Sequence[Sequence[Chunk]], columns: Sequence[Any], offset: int) -> list[list[Any]]:
    """Chunk by chunk, which needs the fewest registers."""
    b = e.b
    call = e.function("llvm.x86.avx512.vpdpbusd.512", v16i, [v16i] * 3)
    total = [[e.ints(0) for _ in columns] for _ in rows]
    held = [[chunk() for chunk in chunks] for chunks in rows]
    xs = [[e.load(x, offset + 4 * i, i32) for i in range(len(rows[0]))] for x in columns]
    for i in range(len(rows[0])):
        w = [b.bitcast(chunks[i], v16i) for chunks in held]
        for c, words in enumerate(xs):
            each = e.splat(words[i])
            for g in range(len(rows)):
                total[g][c] = b.call(call, [total[g][c], w[g], each])
    return total


def _dots_avx512(
    e: Emit, rows: Sequence[Sequence[Chunk]], columns: Sequence[Any], offset: int, peak: int
) -> list[list[Any]]:
    """The same without VNNI: products of bytes are added as int16 for as long as those cannot overflow."""
    b, v32w = e.b, vec(i16, 32)
    multiply = e.function("llvm.x86.avx512.pmaddubs.w.512", v32w, [v64b, v64b])
    words = e.function("llvm.x86.avx512.pmaddw.d.512", v16i, [v32w, v32w])
    ones, zero = v32w([1] * 32), e.bytes(0)
    held = [[chunk() for chunk in chunks] for chunks in rows]
    total = [[e.ints(0) for _ in columns] for _ in rows]
    sums: list[list[Any]] = [[None for _ in columns] for _ in rows]
    together = _together(peak, len(rows[0]))
    for i in range(len(rows[0])):
        w = [chunks[i] for chunks in held]
        negative = [] if peak else [b.icmp_signed("<", each, zero) for each in w]
        sizes = w if peak else [b.select(n, b.sub(zero, each), each) for n, each in zip(negative, w, strict=True)]
        for c, x in enumerate(columns):
            each = b.bitcast(e.splat(e.load(x, offset + 4 * i, i32)), v64b)
            for g in range(len(rows)):
                signed = each if peak else b.select(negative[g], b.sub(zero, each), each)
                p = b.call(multiply, [sizes[g], signed])
                sums[g][c] = p if i % together == 0 else b.add(sums[g][c], p)
                if (i + 1) % together == 0:
                    total[g][c] = b.add(total[g][c], b.call(words, [sums[g][c], ones]))
    return total


def _together(peak: int, n_chunks: int) -> int:
    """Chunks whose products of pairs an int16 holds when they are added: a power of two, as `n_chunks` is."""
    return min(n_chunks, 1 << (32767 // (2 * 127 * peak)).bit_length() - 1) if peak else 1


# -- AVX2: instructions in a fixed order. LLVM would take long additions apart, load all chunks first and spill them. ------

_FIRST = """vpbroadcastd {at}($4), $1
vpmaddubsw $1, $2, $0
vpmaddubsw $1, $3, $1"""
"""Two halves of a chunk times 4 bytes of a column: the int16 of neighbours, added."""
_NEXT = """vpbroadcastd {at}($6), $2
vpmaddubsw $2, $4, $3
vpaddw $3, $0, $0
vpmaddubsw $2, $5, $2
vpaddw $2, $1, $1"""
"""The same, added to int16 that there are."""
_SIGNED = """vpbroadcastd {at}($8), $2
vpsignb $4, $2, $3
vpmaddubsw $3, $6, $3
vpmaddwd $9, $3, $3
vpaddd $3, $0, $0
vpsignb $5, $2, $2
vpmaddubsw $2, $7, $2
vpmaddwd $9, $2, $2
vpaddd $2, $1, $1"""
"""Halves of a chunk with a sign, and their sizes, times 4 bytes of a column, added to int32 that there are."""


def _written(e: Emit, text: str, at: int, outputs: int, kind: Any, constraints: str, values: Sequence[Any]) -> list[Any]:
    """Instructions with so many results, of which the first two count. They read x and say nothing of it to LLVM, which is
    right as long as no piece that uses them writes to x."""
    takes = ir.FunctionType(ir.LiteralStructType([kind] * outputs), [v.type for v in values])
    made = e.b.asm(takes, text.format(at=at).replace("\n", "\\0A"), constraints, values, True)
    return [e.b.extract_value(made, h) for h in HALVES]


def _halves(e: Emit, chunk: Chunk) -> list[Any]:
    held = chunk()
    return [e.part(held, 32 * h, 32) for h in HALVES]


def _dots_avx2(e: Emit, chunks: Sequence[Chunk], columns: Sequence[Any], offset: int, peak: int) -> list[Any]:
    b, n = e.b, len(chunks)
    ones = ir.Constant(v16w, [1] * 16)
    # nibbles of one byte lie half of all chunks apart
    order = [i for pair in zip(range(n // 2), range(n // 2, n), strict=True) for i in pair]
    totals = [[ir.Constant(v8i, [0] * 8)] * 2 for _ in columns]
    if not peak:
        for i in order:
            w, at = _halves(e, chunks[i]), offset + 4 * i
            sizes = [b.select(b.icmp_signed("<", h, v32b([0] * 32)), b.sub(v32b([0] * 32), h), h) for h in w]
            for c, x in enumerate(columns):
                values = [*w, *sizes, x, ones, *totals[c]]
                totals[c] = _written(e, _SIGNED, at, 4, v8i, "=x,=x,=&x,=&x,x,x,x,x,r,x,0,1", values)
        return [e.join(*t) for t in totals]
    words = e.function("llvm.x86.avx2.pmadd.wd", v8i, [v16w, v16w])
    together = _together(peak, n)
    for k in range(0, n, together):
        sums: list[list[Any]] = [[] for _ in columns]
        for i in order[k : k + together]:
            w, at = _halves(e, chunks[i]), offset + 4 * i
            for c, x in enumerate(columns):
                if sums[c]:
                    sums[c] = _written(e, _NEXT, at, 4, v16w, "=x,=x,=&x,=&x,x,x,r,0,1", [*w, x, *sums[c]])
                else:
                    sums[c] = _written(e, _FIRST, at, 2, v16w, "=&x,=&x,x,x,r", [*w, x])
        for c in range(len(columns)):
            totals[c] = [b.add(t, b.call(words, [s, ones])) for t, s in zip(totals[c], sums[c], strict=True)]
    return [e.join(*t) for t in totals]
