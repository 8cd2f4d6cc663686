"""FLASH_ATTN_EXT: blocks of the context one after the other, each where a mask shows something of it.

Units: addresses, counts, strides in bytes. Source: Dao et al., FlashAttention-2; Dao et al., Flash-Decoding for the chunks.
"""

from __future__ import annotations

from numba import njit

from workers.kernels import attention
from workers.kernels.attention import HIDDEN, sink, state_bytes
from workers.kernels.exports import exported
from workers.kernels.layout import BLOCK, CHUNK, TILE, TOGETHER
from workers.kernels.simd import load16, load32, load64, store64

_clear, _merge = exported(attention.clear), exported(attention.merge)
_finish = exported(attention.finish, floats=("sink",))
_tile_block = exported(attention.tile_block, floats=("scale", "softcap"))


@njit(nogil=True)
def _hidden(mask, n_cells):  # type: ignore[no-untyped-def]
    """Whether no cell of a block is seen."""
    for c in range(0, n_cells - 1, 2):
        if load32(mask + 2 * c) != -67044352:  # two of HIDDEN
            return False
    return n_cells % 2 == 0 or load16(mask + 2 * (n_cells - 1)) == HIDDEN


@njit(nogil=True)
def _tile_chunk(  # type: ignore[no-untyped-def]
    queries, masks, n, d, k, k_row, v, v_row, d_v, first, last, scale, softcap, states, scratch
):  # fmt: skip
    """A tile of queries over the cells first..last of one chunk; each query's state is made anew.

    `queries`, `masks`, `states`: arrays of addresses, behind the masks room for as many of a block. `scratch`:
    `tile_block`'s.
    """
    lists, of_block = scratch + 4 * BLOCK * (d + TOGETHER), masks + 8 * TILE
    for i in range(n):
        _clear(load64(states + 8 * i), d_v)
    for cell in range(first, last, BLOCK):
        n_cells = min(BLOCK, last - cell)
        n_seen = 0
        known, seen = -1, True
        for i in range(n):
            mask = load64(masks + 8 * i)
            if mask != known:  # heads of a group have the same
                known, seen = mask, mask == 0 or not _hidden(mask + 2 * cell, n_cells)
            if seen:
                store64(of_block + 8 * i, mask + 2 * cell if mask != 0 else 0)
                store64(lists + 8 * n_seen, i)
                n_seen += 1
        if n_seen:
            _tile_block(n_seen, queries, of_block, d, k + cell * k_row, k_row, v + cell * v_row, v_row, d_v, n_cells, scale,
                       softcap, states, scratch)  # fmt: skip


@njit(nogil=True)
def attend(  # type: ignore[no-untyped-def]
    q, q_row, q_head, d, n_tokens, n_head, k, k_row, k_head, v, v_row, v_head, d_v, n_head_kv, n_kv, mask, mask_row, scale,
    softcap, sinks, y, parts, scratch, t, n_threads
):  # fmt: skip
    """With `parts` the chunks are tasks of their own."""
    group = n_head // n_head_kv
    n_queries = n_tokens * group
    n_tiles, n_chunks = (n_queries + TILE - 1) // TILE, (n_kv + CHUNK - 1) // CHUNK
    in_task = 1 if parts != 0 else n_chunks
    per_tile = n_chunks // in_task if parts != 0 else 1
    size = state_bytes(d_v)
    lists = scratch + 4 * BLOCK * (d + TOGETHER) + 8 * (TILE + 2 * TOGETHER) + 2 * BLOCK
    queries, masks, states = lists, lists + 8 * TILE, lists + 24 * TILE
    totals = lists + 32 * TILE
    fresh = totals + TILE * size
    work = n_head_kv * n_tiles * per_tile
    for task in range(work * t // n_threads, work * (t + 1) // n_threads):
        chunk, rest = task % per_tile, task // per_tile
        tile, kv_head = rest % n_tiles, rest // n_tiles
        first = tile * TILE
        n = min(TILE, n_queries - first)
        for i in range(n):
            token, head = (first + i) // group, kv_head * group + (first + i) % group
            store64(queries + 8 * i, q + token * q_row + head * q_head)
            store64(masks + 8 * i, mask + token * mask_row if mask != 0 else 0)
            if parts != 0:
                at = (token * n_head + head) * n_chunks + chunk
                store64(states + 8 * i, parts + at * size)
            else:
                store64(states + 8 * i, fresh + i * size)
                _clear(totals + i * size, d_v)
        keys, values = k + kv_head * k_head, v + kv_head * v_head
        for c in range(chunk, chunk + in_task):
            _tile_chunk(queries, masks, n, d, keys, k_row, values, v_row, d_v, c * CHUNK, min(n_kv, (c + 1) * CHUNK),
                        scale, softcap, states, scratch)  # fmt: skip
            if parts == 0:
                for i in range(n):
                    _merge(totals + i * size, fresh + i * size, d_v)
        if parts == 0:
            for i in range(n):
                token, head = (first + i) // group, kv_head * group + (first + i) % group
                _finish(totals + i * size, sink(sinks, head), d_v, y + 4 * d_v * (token * n_head + head))


@njit(nogil=True)
def merge_parts(  # type: ignore[no-untyped-def]
    d_v, n_tokens, n_head, n_kv, sinks, y, parts, scratch, t, n_threads
):  # fmt: skip
    n_chunks, size = (n_kv + CHUNK - 1) // CHUNK, state_bytes(d_v)
    rows = n_tokens * n_head
    for r in range(rows * t // n_threads, rows * (t + 1) // n_threads):
        _clear(scratch, d_v)
        for c in range(n_chunks):
            _merge(scratch, parts + (r * n_chunks + c) * size, d_v)
        _finish(scratch, sink(sinks, r % n_head), d_v, y + 4 * d_v * r)
