"""Bindings of positions, of the cache and of attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from protocol.dtypes import TYPES, GGMLType
from protocol.limits import MAX_ROPE_POSITION
from workers import tensors
from workers.devices.bindings import Bindings
from workers.devices.cpu.binding import F16, F32, Binder
from workers.devices.cpu.program import PART_COST
from workers.devices.lower import Node, RopeKey, Span
from workers.kernels import layout, steps
from workers.kernels.costs import OF_ATTENTION, cells_seen
from workers.kernels.rotary import rope_turn
from workers.ticks import Tick, nothing

BINDINGS = Bindings()

SPLIT_QUERIES = 64
"""With fewer queries than this the context is divided over threads too."""
PARTS_BYTES = 16 << 20
"""About as much memory a divided attention over a long context needs between its halves."""


@BINDINGS.of("ROPE")
def rope(b: Binder, n: Node) -> bool:
    t, x, key = n.tensor, n.req(0), b.lowered.rope_key(n)
    plain = n.params["mode"] in (0, 2) and n.params["n_offs"] == 0
    if not plain or key is None or t.type != F32 or t.ne[3] != 1 or x.nb[0] != 4 or t.nb[0] != 4:
        return False
    table = _rope_table(b, n, key)
    cos, sin = (b.memory.address(span) for span in table)
    step = steps.Rope(x=b.address(t.src[0]), x_head=x.nb[1], x_row=x.nb[2], y=b.address(n.index), y_head=t.nb[1],
                      y_row=t.nb[2], n_tokens=t.ne[2], n_head=t.ne[1], d=t.ne[0], cos=cos, sin=sin,
                      neox=n.params["mode"] == 2, n_dims=n.params["n_dims"])  # fmt: skip
    b.program.add(n, step, [b.place(t.src[0]), *table], [b.place(n.index)])
    return True


def _rope_table(b: Binder, n: Node, key: RopeKey) -> tuple[Span, Span]:
    """Places of cosines and sines [n_tokens][n_dims / 2]; a step makes them, and layers share them."""
    n_tokens, half = n.tensor.ne[2], n.params["n_dims"] // 2
    cos, fresh = b.scratch.shared(("cos", key), 4 * n_tokens * half)
    sin, _ = b.scratch.shared(("sin", key), 4 * n_tokens * half)
    if not fresh:
        return cos, sin
    exponent, turn, params = np.arange(half, dtype=np.float64), np.zeros(half + 1), n.params
    array = b.memory.array(key.factors) if key.factors >= 0 else None
    made = None

    def fill(tick: Tick = nothing) -> None:
        nonlocal made
        factors = None if array is None else tensors.load(array, GGMLType.F32)
        known = b"" if factors is None else factors.tobytes()
        if known != made:
            with np.errstate(all="ignore"):  # factors that are not there yet are zeros
                turn[:half], turn[half] = rope_turn(params, factors, exponent)
            made = known

    fill()
    if array is not None:
        b.preludes.append(fill)
    b.kept.append(turn)
    step = steps.RopeTable(positions=b.address(key.positions), step=n.req(1).nb[0], turn=turn.ctypes.data,
                           n_tokens=n_tokens, half=half, bound=MAX_ROPE_POSITION, cos=b.memory.address(cos),
                           sin=b.memory.address(sin), node=n.index)  # fmt: skip
    b.program.add(n, step, [b.place(key.positions)], [cos, sin])
    return cos, sin


@BINDINGS.of("SET_ROWS")
def set_rows(b: Binder, n: Node) -> bool:
    t, x, ids = n.tensor, n.req(0), n.req(1)
    if not ids.contiguous:
        return False
    flat = t.ne[2] * t.ne[3] == 1 and ids.ne[1] * ids.ne[2] == 1
    store = {F16: steps.StoreHalves, F32: steps.StoreFloats, GGMLType.Q8_0: steps.StoreQ8}.get(GGMLType(t.type))
    if store is None or not flat or t.nb[0] != TYPES[t.type].bytes:
        return False
    if x.type != F32 or x.nb[0] != 4 or x.ne[2] * x.ne[3] != 1:
        return False
    i, j = t.src[:2]
    step = store(x=b.address(i), x_row=x.nb[1], n_rows=x.ne[1], n=x.ne[0], ids=b.address(j), id_bytes=ids.nb[0],
                 y=b.address(n.index), y_row=t.nb[1], n_y=t.ne[1], node=n.index)  # fmt: skip
    b.program.add(n, step, [b.place(i), b.place(j)], [b.place(n.index)])
    return True


class Heads(NamedTuple):
    """Of an attention: cells, those that a query goes through, heads of queries and of keys, elements of a key and value."""

    n_kv: int
    n_seen: int
    n_head: int
    n_head_kv: int
    d: int
    d_v: int

    def cost(self, n_queries: int) -> int:
        """What so many queries cost."""
        return OF_ATTENTION * n_queries * self.n_seen * (self.d + self.d_v)


class Queries(NamedTuple):
    """Tokens that one step takes, what of the result is theirs, and where the parts of a divided context meet, if it is."""

    first: int
    n: int
    result: Span
    between: Span | None


def _queries(b: Binder, n: Node, heads: Heads, first: int, n_tokens: int) -> Iterator[Queries]:
    """The queries of consecutive tokens of the result, some at a time, so that each step looks at few tables of pages.

    Where a tile of them over the whole context is much by itself, the context is divided, as it is for few queries.
    """
    size, divided = n_tokens, heads.cost(layout.TILE) > PART_COST
    if divided:
        tile = -(-layout.TILE * heads.n_head_kv // heads.n_head)
        size = max(tile, min(SPLIT_QUERIES, PARTS_BYTES // layout.parts_bytes(heads.n_head, heads.n_kv, heads.d_v)))
    elif heads.cost(n_tokens * heads.n_head) > PART_COST:
        size = SPLIT_QUERIES
    result, row = b.place(n.index), 4 * heads.n_head * heads.d_v
    for at in range(first, first + n_tokens, size):
        m = min(size, first + n_tokens - at)
        between = None
        if divided or m * heads.n_head_kv < SPLIT_QUERIES:
            n_bytes = layout.parts_bytes(m * heads.n_head, heads.n_kv, heads.d_v)
            between = b.scratch.shared(("parts", n_bytes), n_bytes)[0]
        start = result.start + row * at
        yield Queries(at, m, Span(result.buffer, start, start + row * m), between)


def _add(b: Binder, n: Node, some: Queries, attend: steps.Attend | steps.PagedAttend, merge: steps.MergeParts) -> None:
    """An attention in one step, or in two with what is between them."""
    reads = [b.place(j) for j in n.tensor.src if j >= 0]
    if some.between is None:
        b.program.add(n, attend, reads, [some.result])
        return
    b.program.add(n, attend, reads, [some.between])
    b.program.add(n, merge, [some.between], [some.result])


@BINDINGS.of("FLASH_ATTN_EXT")
def flash_attn_ext(b: Binder, n: Node) -> bool:
    q, k, v, mask = n.req(0), n.req(1), n.req(2), n.opt(3)
    halves = k.type == v.type == F16 and k.nb[0] == v.nb[0] == 2 and q.nb[0] == 4 and q.type == F32
    if not halves or n.params["max_bias"] or not n.tensor.contiguous or n.params["scale"] <= 0:
        return False
    if k.ne[3] != q.ne[3] or v.ne[3] != q.ne[3] or k.ne[2] != v.ne[2]:
        return False
    if mask is not None and (mask.nb[0] != 2 or mask.ne[2] != 1 or mask.ne[3] not in (1, q.ne[3])):
        return False
    src = n.tensor.src
    d, d_v, n_tokens, n_head, n_seq, n_kv = q.ne[0], v.ne[0], q.ne[1], q.ne[2], q.ne[3], k.ne[1]
    sinks = b.address(src[4]) if len(src) > 4 and src[4] >= 0 else 0
    mask_row, mask_seq = (mask.nb[1], mask.nb[3] if mask.ne[3] > 1 else 0) if mask is not None else (0, 0)
    b.need(layout.attention_scratch_bytes(d, d_v))
    heads = Heads(n_kv, n_kv, n_head, k.ne[2], d, d_v)
    for seq in range(n_seq):
        for some in _queries(b, n, heads, seq * n_tokens, n_tokens):
            token = some.first - seq * n_tokens
            parts = b.memory.address(some.between) if some.between is not None else 0
            y = b.memory.address(some.result)
            attend = steps.Attend(
                q=b.address(src[0]) + token * q.nb[1] + seq * q.nb[3], q_row=q.nb[1], q_head=q.nb[2], d=d, n_tokens=some.n,
                n_head=n_head, k=b.address(src[1]) + seq * k.nb[3], k_row=k.nb[1], k_head=k.nb[2],
                v=b.address(src[2]) + seq * v.nb[3], v_row=v.nb[1], v_head=v.nb[2], d_v=d_v, n_head_kv=k.ne[2], n_kv=n_kv,
                mask=b.address(src[3]) + token * mask_row + seq * mask_seq if mask is not None else 0, mask_row=mask_row,
                scale=n.params["scale"], softcap=n.params["logit_softcap"], sinks=sinks, y=y, parts=parts,
            )  # fmt: skip
            merge = steps.MergeParts(d_v=d_v, n_tokens=some.n, n_head=n_head, n_kv=n_kv, sinks=sinks, y=y, parts=parts)
            _add(b, n, some, attend, merge)
    return True


@BINDINGS.of("PAGED_ATTN")
def paged_attn(b: Binder, n: Node) -> bool:
    q, k, v, pages, n_seen, rows, sinks = *(n.req(i) for i in range(5)), n.opt(5), n.opt(6)
    tables = [t for t in (pages, n_seen, rows) if t is not None]
    if q.type != F32 or q.nb[0] != 4 or not n.tensor.contiguous or not all(t.contiguous for t in tables):
        return False
    if n.params["scale"] <= 0 or any(t.type != F16 and t.ne[0] % TYPES[t.type].block for t in (k, v)):
        return False
    src, (d, n_tokens, n_head, _), d_v, n_kv = n.tensor.src, q.ne, v.ne[0], layout.BLOCK * pages.ne[0]
    sinks_at, window = b.address(src[6]) if sinks is not None else 0, n.params["window"]
    b.need(layout.paged_scratch_bytes(d, d_v))
    for some in _queries(b, n, Heads(n_kv, cells_seen(n_kv, window), n_head, k.ne[2], d, d_v), 0, n_tokens):
        parts = b.memory.address(some.between) if some.between is not None else 0
        y = b.memory.address(some.result)
        attend = steps.PagedAttend(
            q=b.address(src[0]) + some.first * q.nb[1], q_row=q.nb[1], q_head=q.nb[2], d=d, n_tokens=some.n, n_head=n_head,
            k=b.address(src[1]), k_row=k.nb[1], k_head=k.nb[2], k_q8=k.type != F16, v=b.address(src[2]), v_row=v.nb[1],
            v_head=v.nb[2], v_q8=v.type != F16, d_v=d_v, n_head_kv=k.ne[2], pages=b.address(src[3]), n_pages=pages.ne[0],
            n_sequences=pages.ne[1], n_pool=k.ne[1] // layout.BLOCK, n_seen=b.address(src[4]) + 4 * some.first,
            rows=b.address(src[5]) + 4 * some.first if rows is not None else 0, window=window, scale=n.params["scale"],
            softcap=n.params["logit_softcap"], sinks=sinks_at, y=y, parts=parts, node=n.index,
        )  # fmt: skip
        merge = steps.MergeParts(d_v=d_v, n_tokens=some.n, n_head=n_head, n_kv=n_kv, sinks=sinks_at, y=y, parts=parts)
        _add(b, n, some, attend, merge)
    return True
