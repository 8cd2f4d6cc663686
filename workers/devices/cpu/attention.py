"""Bindings of positions, of the cache and of attention."""

from __future__ import annotations

import numpy as np

from protocol.dtypes import TYPES, GGMLType
from protocol.limits import MAX_ROPE_POSITION
from workers import tensors
from workers.devices.bindings import Bindings
from workers.devices.cpu.binding import F16, F32, Binder
from workers.devices.lower import Node, RopeKey, Span
from workers.kernels import layout, steps
from workers.kernels.rotary import rope_turn

BINDINGS = Bindings()

SPLIT_QUERIES = 64
"""With fewer queries than this the context is divided over threads too."""


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

    def fill() -> None:
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


def _parts(b: Binder, n_queries: int, n_kv: int, d_v: int) -> Span:
    """Where the halves of an attention that is divided over the context meet."""
    n_bytes = layout.parts_bytes(n_queries, n_kv, d_v)
    return b.scratch.shared(("parts", n_bytes), n_bytes)[0]


def _add(
    b: Binder, n: Node, attend: steps.Attend | steps.PagedAttend, merge: steps.MergeParts, between: Span | None
) -> None:
    """An attention in one step, or in two with `between` them."""
    if between is None:
        b.add(n, attend)
        return
    b.program.add(n, attend, [b.place(j) for j in n.tensor.src if j >= 0], [between])
    b.program.add(n, merge, [between], [b.place(n.index)])


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
    split = n_tokens * n_seq * k.ne[2] < SPLIT_QUERIES
    between = _parts(b, n_tokens * n_head * n_seq, n_kv, d_v) if split else None
    parts = b.memory.address(between) if between is not None else 0
    sinks = b.address(src[4]) if len(src) > 4 and src[4] >= 0 else 0
    y = b.address(n.index)
    attend = steps.Attend(
        q=b.address(src[0]), q_row=q.nb[1], q_head=q.nb[2], q_seq=q.nb[3], d=d, n_tokens=n_tokens, n_head=n_head,
        n_seq=n_seq, k=b.address(src[1]), k_row=k.nb[1], k_head=k.nb[2], k_seq=k.nb[3], v=b.address(src[2]),
        v_row=v.nb[1], v_head=v.nb[2], v_seq=v.nb[3], d_v=d_v, n_head_kv=k.ne[2], n_kv=n_kv,
        mask=b.address(src[3]) if mask is not None else 0, mask_row=mask.nb[1] if mask is not None else 0,
        mask_seq=mask.nb[3] if mask is not None and mask.ne[3] > 1 else 0, scale=n.params["scale"],
        softcap=n.params["logit_softcap"], sinks=sinks, y=y, parts=parts,
    )  # fmt: skip
    b.need(layout.attention_scratch_bytes(d, d_v))
    merge = steps.MergeParts(d_v=d_v, n_tokens=n_tokens, n_head=n_head, n_seq=n_seq, n_kv=n_kv, sinks=sinks, y=y,
                             parts=parts)  # fmt: skip
    _add(b, n, attend, merge, between)
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
    split = n_tokens * k.ne[2] < SPLIT_QUERIES
    between = _parts(b, n_tokens * n_head, n_kv, d_v) if split else None
    parts = b.memory.address(between) if between is not None else 0
    sinks_at, y = b.address(src[6]) if sinks is not None else 0, b.address(n.index)
    attend = steps.PagedAttend(
        q=b.address(src[0]), q_row=q.nb[1], q_head=q.nb[2], d=d, n_tokens=n_tokens, n_head=n_head, k=b.address(src[1]),
        k_row=k.nb[1], k_head=k.nb[2], k_q8=k.type != F16, v=b.address(src[2]), v_row=v.nb[1], v_head=v.nb[2],
        v_q8=v.type != F16, d_v=d_v, n_head_kv=k.ne[2], pages=b.address(src[3]), n_pages=pages.ne[0],
        n_sequences=pages.ne[1], n_pool=k.ne[1] // layout.BLOCK, n_seen=b.address(src[4]),
        rows=b.address(src[5]) if rows is not None else 0, window=n.params["window"], scale=n.params["scale"],
        softcap=n.params["logit_softcap"], sinks=sinks_at, y=y, parts=parts, node=n.index,
    )  # fmt: skip
    b.need(layout.paged_scratch_bytes(d, d_v))
    merge = steps.MergeParts(d_v=d_v, n_tokens=n_tokens, n_head=n_head, n_seq=1, n_kv=n_kv, sinks=sinks_at, y=y,
                             parts=parts)  # fmt: skip
    _add(b, n, attend, merge, between)
    return True
