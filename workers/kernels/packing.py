"""Rows of weights between GGUF's layout and packed groups. Source of the packed layout: `formats`.

Units: every argument is an address or a count; strides are bytes.
"""

from __future__ import annotations

from numba import njit

from workers.kernels.formats import BLOCK_BYTES, FIELDS, N_FIELDS
from workers.kernels.simd import load8, load16, load32, store8, store16, store32


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


@njit(nogil=True)
def pack_group(kind, rows, row_bytes, n_rows, n_blocks, out):  # type: ignore[no-untyped-def]
    """Up to 16 rows of GGUF's layout as a packed group; the last row stands in for those that are not there."""
    size = BLOCK_BYTES[kind]
    for k in range(n_blocks):
        for f in range(N_FIELDS[kind]):
            offset, unit, count, at = FIELDS[kind, f]
            q = out + 16 * (k * size + at)
            for r in range(16):
                p = rows + min(r, n_rows - 1) * row_bytes + k * size + offset
                if unit == 4:
                    for i in range(count):
                        store32(q + 64 * i + 4 * r, load32(p + 4 * i))
                elif unit == 2:
                    for i in range(count):
                        store16(q + 32 * i + 2 * r, load16(p + 2 * i))
                elif unit == 1:
                    for i in range(count):
                        store8(q + 16 * i + r, load8(p + i))
                else:
                    _spread(load32(p), r, q)


@njit(nogil=True)
def unpack_row(kind, group, row, n_blocks, out):  # type: ignore[no-untyped-def]
    """One row of a packed group in GGUF's layout."""
    size = BLOCK_BYTES[kind]
    for k in range(n_blocks):
        for f in range(N_FIELDS[kind]):
            offset, unit, count, at = FIELDS[kind, f]
            p, q = group + 16 * (k * size + at), out + k * size + offset
            if unit == 4:
                for i in range(count):
                    store32(q + 4 * i, load32(p + 64 * i + 4 * row))
            elif unit == 2:
                for i in range(count):
                    store16(q + 2 * i, load16(p + 32 * i + 2 * row))
            elif unit == 1:
                for i in range(count):
                    store8(q + i, load8(p + 16 * i + row))
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
        at = 16 * g * row_bytes
        pack_group(kind, rows + at, row_bytes, 16, n_blocks, out + at)


@njit(nogil=True)
def unpack_rows(kind, w, row_bytes, first, last, n_packed, n_blocks, out):  # type: ignore[no-untyped-def]
    """Rows first..last in GGUF's layout; rows from `n_packed` on never left it."""
    for r in range(first, last):
        if r < n_packed:
            unpack_row(kind, w + r // 16 * 16 * row_bytes, r % 16, n_blocks, out + (r - first) * row_bytes)
        else:
            copy_bytes(w + r * row_bytes, out + (r - first) * row_bytes, row_bytes)
