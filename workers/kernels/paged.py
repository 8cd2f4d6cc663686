"""Attention over pages of cells: a tile of queries is of one sequence, and its blocks are that sequence's pages in order.

Blocks, chunks and their merging are `attention`'s, counted from a sequence's first cell, so a token's bits do not depend on
where its pages lie, nor on whose tokens are beside it.
Source: Kwon et al. (PagedAttention).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from workers.kernels import attention
from workers.kernels.attention import HIDDEN, sink, state_bytes
from workers.kernels.exports import exported
from workers.kernels.layout import BLOCK, CHUNK, TILE, TOGETHER
from workers.kernels.simd import float_to_half, half_to_float, load8, load16, load32, load64, store16, store64

_clear, _merge = exported(attention.clear), exported(attention.merge)
_finish = exported(attention.finish, floats=("sink",))
_tile_block = exported(attention.tile_block, floats=("scale", "softcap"))
Q8_BYTES = 34
"""Of a block of 32 elements of Q8_0: its scale as float16, then int8."""


@njit(nogil=True)
def _first_seen(n_seen, window):  # type: ignore[no-untyped-def]
    """The first cell that is seen of the first n_seen."""
    return n_seen - window if 0 < window < n_seen else 0


@njit(nogil=True)
def _good(n_tokens, pages, n_pages, n_sequences, n_pool, n_seen, rows, window):  # type: ignore[no-untyped-def]
    """Whether all that is followed lies inside."""
    for token in range(n_tokens):
        seen, row = load32(n_seen + 4 * token), load32(rows + 4 * token) if rows != 0 else 0
        if seen < 0 or seen > BLOCK * n_pages or row < 0 or row >= n_sequences:
            return False
        for i in range(_first_seen(seen, window) // BLOCK, (seen + BLOCK - 1) // BLOCK):
            page = load32(pages + 4 * (row * n_pages + i))
            if page < 0 or page >= n_pool:
                return False
    return True


@njit(nogil=True)
def _mask(cell, first, last, out):  # type: ignore[no-untyped-def]
    """The mask of a block that begins at `cell`, of which first..last are seen."""
    for c in range(BLOCK):
        store16(out + 2 * c, 0 if first <= cell + c < last else HIDDEN)


@njit(nogil=True)
def _halves(x, x_row, n, out):  # type: ignore[no-untyped-def]
    """A block of cells of Q8_0 as float16 [BLOCK][n]."""
    for c in range(BLOCK):
        for j in range(n // 32):
            block = x + c * x_row + Q8_BYTES * j
            scale = half_to_float(load16(block))
            for i in range(32):
                store16(out + 2 * (n * c + 32 * j + i), float_to_half(scale * np.float32(np.int8(load8(block + 2 + i)))))


@njit(nogil=True)
def _run_end(rows, n_tokens, start):  # type: ignore[no-untyped-def]
    """Where the tokens end that are of the sequence of the one at `start`."""
    end = start + 1
    while end < n_tokens and (rows == 0 or load32(rows + 4 * end) == load32(rows + 4 * start)):
        end += 1
    return end


@njit(nogil=True)
def _tile(  # type: ignore[no-untyped-def]
    queries, tokens, n, d, k, k_row, k_q8, v, v_row, v_q8, d_v, table, chunk, n_seen, window, scale, softcap, states,
    scratch, masks
):  # fmt: skip
    """A tile of queries over one chunk; each query's state is made anew.

    `tokens`: which token each query is of. `masks`: addresses, then a mask for each query, then room for float16 cells.
    """
    lists, written = scratch + 4 * BLOCK * (d + TOGETHER), masks + 8 * TILE
    keys = written + 2 * BLOCK * TILE
    values = keys + 2 * BLOCK * d
    for i in range(n):
        _clear(load64(states + 8 * i), d_v)
    for cell in range(chunk * CHUNK, (chunk + 1) * CHUNK, BLOCK):
        n_found, known, mask, seen = 0, -1, 0, False
        for i in range(n):
            token = load64(tokens + 8 * i)
            if token != known:  # heads of a group see the same
                last = load32(n_seen + 4 * token)
                first = _first_seen(last, window)
                known, seen, mask = token, first < cell + BLOCK and cell < last, 0
                if seen and (cell < first or last < cell + BLOCK):
                    mask = written + 2 * BLOCK * i
                    _mask(cell, first, last, mask)
            if seen:
                store64(masks + 8 * i, mask)
                store64(lists + 8 * n_found, i)
                n_found += 1
        if n_found == 0:
            continue
        at = BLOCK * load32(table + 4 * (cell // BLOCK))
        keys_at, keys_row, values_at, values_row = k + at * k_row, k_row, v + at * v_row, v_row
        if k_q8 != 0:
            _halves(keys_at, k_row, d, keys)
            keys_at, keys_row = keys, 2 * d
        if v_q8 != 0:
            _halves(values_at, v_row, d_v, values)
            values_at, values_row = values, 2 * d_v
        _tile_block(n_found, queries, masks, d, keys_at, keys_row, values_at, values_row, d_v, BLOCK, scale, softcap, states,
                   scratch)  # fmt: skip


@njit(nogil=True)
def paged_attend(  # type: ignore[no-untyped-def]
    q, q_row, q_head, d, n_tokens, n_head, k, k_row, k_head, k_q8, v, v_row, v_head, v_q8, d_v, n_head_kv, pages, n_pages,
    n_sequences, n_pool, n_seen, rows, window, scale, softcap, sinks, y, parts, scratch, t, n_threads
):  # fmt: skip
    """With `parts` the chunks are tasks of their own. False: a page, a row or a number of cells points outside."""
    if not _good(n_tokens, pages, n_pages, n_sequences, n_pool, n_seen, rows, window):
        return False
    group = n_head // n_head_kv
    n_chunks, size = (BLOCK * n_pages + CHUNK - 1) // CHUNK, state_bytes(d_v)
    queries = scratch + 4 * BLOCK * (d + TOGETHER) + 8 * (TILE + 2 * TOGETHER) + 2 * BLOCK
    tokens, states = queries + 8 * TILE, queries + 16 * TILE
    totals = queries + 24 * TILE
    fresh = totals + TILE * size
    masks = (fresh + TILE * size + 7) // 8 * 8
    n_tiles, start = 0, 0
    while start < n_tokens:
        end = _run_end(rows, n_tokens, start)
        n_tiles += ((end - start) * group + TILE - 1) // TILE
        start = end
    per_tile = n_chunks if parts != 0 else 1
    low, high = n_head_kv * n_tiles * per_tile * t // n_threads, n_head_kv * n_tiles * per_tile * (t + 1) // n_threads
    for kv_head in range(n_head_kv):
        task, start = kv_head * n_tiles * per_tile, 0
        while start < n_tokens:
            end = _run_end(rows, n_tokens, start)
            table = pages + 4 * n_pages * (load32(rows + 4 * start) if rows != 0 else 0)
            n_queries = (end - start) * group
            for first in range(0, n_queries, TILE):
                n, last = min(TILE, n_queries - first), 0
                if task + per_tile <= low or task >= high:
                    task += per_tile
                    continue
                for i in range(n):
                    token, head = start + (first + i) // group, kv_head * group + (first + i) % group
                    store64(queries + 8 * i, q + token * q_row + head * q_head)
                    store64(tokens + 8 * i, token)
                    last = max(last, load32(n_seen + 4 * token))
                    if parts == 0:
                        store64(states + 8 * i, fresh + i * size)
                        _clear(totals + i * size, d_v)
                for chunk in range(n_chunks if parts != 0 else (last + CHUNK - 1) // CHUNK):
                    mine = low <= task < high
                    if parts != 0:
                        task += 1
                        if not mine:
                            continue
                        for i in range(n):
                            token, head = start + (first + i) // group, kv_head * group + (first + i) % group
                            store64(states + 8 * i, parts + ((token * n_head + head) * n_chunks + chunk) * size)
                    _tile(queries, tokens, n, d, k + kv_head * k_head, k_row, k_q8, v + kv_head * v_head, v_row, v_q8, d_v,
                          table, chunk, n_seen, window, scale, softcap, states, scratch, masks)  # fmt: skip
                    if parts == 0:
                        for i in range(n):
                            _merge(totals + i * size, fresh + i * size, d_v)
                if parts == 0:
                    task += 1
                    for i in range(n):
                        token, head = start + (first + i) // group, kv_head * group + (first + i) % group
                        _finish(totals + i * size, sink(sinks, head), d_v, y + 4 * d_v * (token * n_head + head))
            start = end
    return True
