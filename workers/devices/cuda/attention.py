"""Bindings of positions and of attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from protocol.dtypes import TYPES, GGMLType
from protocol.graph import Tensor
from protocol.limits import MAX_ROPE_POSITION
from protocol.rules import PAGE_CELLS, ROPE_VISION
from workers.devices.bindings import Bindings
from workers.devices.cuda.binding import BF16, F16, F32, I32, Binder, ceil_div
from workers.devices.cuda.cells import MAX_THREADS, add_rope
from workers.devices.cuda.rows import norm_times
from workers.devices.cuda.strided import operands, separate
from workers.devices.lower import Node
from workers.kernels.cuda import attention_launches as launches
from workers.kernels.rotary import rope_kinds, rope_turn

BINDINGS = Bindings()

Q8_0, Q4_0 = GGMLType.Q8_0, GGMLType.Q4_0

# -- positions ---------------------------------------------------------------------------------------------------------


@BINDINGS.of("ROPE")
def rope(b: Binder, n: Node) -> bool:
    t, x = n.tensor, n.req(0)
    n_copied = 0 if _same_place(b, n) else t.ne[0] - 2 * _n_pairs(n)
    if not _can_turn(n) or t.ne[1] * (_n_pairs(n) + n_copied) >= MAX_THREADS:
        return False
    add_rope(b, n, launches.Rope(x=b.address(t.src[0]), x_nb=x.nb, n_copied=n_copied, **_turning(b, n)))
    return True


@BINDINGS.of_neighbours("RMS_NORM", "MUL", "ROPE")
def normed_rope(b: Binder, norm: Node, mul: Node, n: Node) -> bool:
    """Heads whose norms are turned."""
    x, w, t = norm.tensor.src[0], mul.tensor.src[1], n.tensor
    found = operands(b, x, w, n.index)
    fits = found is not None and all(o.type == F32 and o.in_fours(t.ne) for o in found[:2]) and t.type == F32
    fits = fits and t.ne[0] <= launches.MAX_NORMED and b.tensors[w].ne == (t.ne[0], 1, 1, 1) and b.stays(w)
    if not fits or not _can_turn(n) or not separate(b, n.index, x, w) or 32 * t.ne[1] >= MAX_THREADS:
        before = list(b.steps)
        if norm_times(b, norm, mul) and rope(b, n):
            return True
        b.steps[:] = before
        return False
    add_rope(b, n, launches.NormedRope(
        x=b.address(x), x_nb=norm.req(0).nb, n_copied=t.ne[0] - 2 * _n_pairs(n), eps=norm.params["eps"], w=b.address(w),
        **_turning(b, n)), norm, mul)  # fmt: skip
    return True


def _can_turn(n: Node) -> bool:
    positions = n.req(1)
    return positions.type == I32 and positions.ne[0] == positions.n_elements and (
        n.params["n_offs"] + 2 * _n_pairs(n) <= n.tensor.ne[0])  # fmt: skip


def _turning(b: Binder, n: Node) -> dict[str, Any]:
    """Fields of `Rope`: where results go, and how pairs are turned."""
    t = n.tensor
    return {"y": b.address(n.index), "y_nb": t.nb, "ne": t.ne, "turned": _turned(b, n), "n_pairs": _n_pairs(n),
            "first": n.params["n_offs"], "apart": n.params["mode"] != 0, "halves": t.type == F16}  # fmt: skip


def _n_pairs(n: Node) -> int:
    return (n.tensor.ne[0] if n.params["mode"] == ROPE_VISION else int(n.params["n_dims"])) // 2


def _same_place(b: Binder, n: Node) -> bool:
    return b.address(n.tensor.src[0]) == b.address(n.index) and n.req(0).nb == n.tensor.nb


def _turned(b: Binder, n: Node) -> int:
    """Address of cosines and sines; a launch makes them, and layers share them."""
    n_tokens, n_pairs, p, src = n.tensor.ne[2], _n_pairs(n), n.params, n.tensor.src
    key = b.lowered.rope_key(n) or n.index
    place, fresh = b.scratch.shared(("turned", key, n_pairs), 8 * n_tokens * n_pairs)
    if not fresh:
        return b.at(place)
    kind, exponent = rope_kinds(p, n_pairs)
    pairs = np.zeros(n_pairs, [("angle", "<f8"), ("kind", "<i8")])
    with np.errstate(all="ignore"):
        pairs["angle"], magnitude = rope_turn(p, None, exponent)
    pairs["kind"] = kind
    launch = launches.RopeTable(
        positions=b.address(src[1]), step=n.req(1).nb[0], n_positions=n.req(1).ne[0], bound=MAX_ROPE_POSITION,
        pairs=b.constant(pairs.tobytes()), factors=b.address(src[2]) if n.opt(2) is not None else 0, n_tokens=n_tokens,
        n_pairs=n_pairs, magnitude=magnitude, turned=b.at(place), status=b.status, node=n.index,
    )  # fmt: skip
    b.add(n, launch, ceil_div(n_tokens * n_pairs, 256))
    return b.at(place)


# -- attention ---------------------------------------------------------------------------------------------------------

ROW_TYPES = (F32, F16, BF16, Q8_0, Q4_0)
"""Types of keys and values that attention by rows reads."""
MAX_ROW = 1024
"""Elements of a row that it has room for."""
CHUNK_PAGES = 4
"""Pages whose sums are merged before they join those of all before them, as paged.cu has it."""
FEW_PARTS = 16
"""A context of so few pages may be divided into pages."""
NARROW, WIDE = 16, 64
"""Queries of a tile."""
MAX_WIDE_D = 128
"""Longer rows leave no room for a tile of 64."""
MAX_D, MAX_D_V = 640, 512
WIDE_QUERIES = 4 * WIDE
"""With fewer for a head of keys the tiles are narrow."""
MAX_GRID_Y = (1 << 16) - 1
MAX_PARTS_BYTES = 256 << 20
"""What may be kept between the two halves of an attention that is divided over the context."""


class Division(NamedTuple):
    """How the work is divided among blocks.

    Attributes:
        rows: queries of a tile.
        unit: tokens whose queries make `n_tiles` tiles; there are `n_units` of these.
        n_slots: sequences that a tile may have.
        n_splits: parts of the context that are blocks of their own, of `split_pages` each: a page or a chunk.
    """

    rows: int
    unit: int
    n_units: int
    n_tiles: int
    n_slots: int
    n_splits: int
    split_pages: int


def divide(n_tokens: int, n_sequences: int, n_pages: int, group: int, n_head_kv: int, d: int, d_v: int,
           n_processors: int) -> Division:  # fmt: skip
    """By shapes only; what comes out is the same however it is divided."""
    alone = n_tokens < 2 * n_sequences
    wide = not alone and max(d, d_v) <= MAX_WIDE_D and n_tokens * group >= WIDE_QUERIES
    rows, unit = WIDE if wide else NARROW, 1 if alone else n_tokens
    n_units, n_tiles = n_tokens // unit, ceil_div(unit * group, rows)
    n_slots = min(n_sequences, unit, (rows - 1) // group + 2, rows)
    n_blocks = n_units * n_tiles * n_head_kv
    split_pages = 1 if n_pages <= FEW_PARTS and n_blocks * n_pages <= 4 * n_processors else CHUNK_PAGES
    n_splits = ceil_div(n_pages, split_pages)
    parts_bytes = 4 * n_tokens * group * n_head_kv * n_splits * (d_v + 2)
    if n_blocks >= (1 if wide else 2) * n_processors or parts_bytes > MAX_PARTS_BYTES:
        n_splits = 1
    return Division(rows, unit, n_units, n_tiles, n_slots, n_splits, split_pages)


def room_bytes(d: int, d_v: int, rows: int) -> int:
    """Shared memory of `attend`, as paged.cu counts it: pieces of a page, queries, and weights of a narrow tile."""
    groups, octets = ceil_div(d, 32), min(d_v // 8, 16)
    piece = PAGE_CELLS * max(32 * (min(groups, 4) | 1), 8 * (octets | 1))
    return 2 * (3 * piece + rows * 32 * (groups | 1) + (rows * (PAGE_CELLS + 8) if rows == NARROW else 0))


@BINDINGS.of("PAGED_ATTN")
def paged_attn(b: Binder, n: Node) -> bool:
    q, k, v, pages, n_seen, rows, sinks = *(n.req(i) for i in range(5)), n.opt(5), n.opt(6)
    whole = [t for t in (n.tensor, pages, n_seen, rows, sinks) if t is not None]
    if q.nb[0] != 4 or not all(t.contiguous for t in whole):
        return False
    src, (d, n_tokens, n_head, _), d_v = n.tensor.src, q.ne, v.ne[0]
    cells = {
        "pages": b.address(src[3]), "n_pages": pages.ne[0], "n_sequences": pages.ne[1], "n_pool": k.ne[1] // PAGE_CELLS,
        "n_seen": b.address(src[4]), "rows": b.address(src[5]) if rows is not None else 0, "window": n.params["window"],
        "status": b.status, "node": n.index,
    }  # fmt: skip
    sinks_at, y = b.address(src[6]) if sinks is not None else 0, b.address(n.index)
    fast = d % 8 == d_v % 8 == 0 and d <= MAX_D and d_v <= MAX_D_V and y % 8 == 0 and n_tokens * n_head < 1 << 31
    if not (fast and _in_octets(b, src[1], k) and _in_octets(b, src[2], v)):
        return _by_rows(b, n, **cells)
    how = divide(n_tokens, pages.ne[1], pages.ne[0], n_head // k.ne[2], k.ne[2], d, d_v, b.driver.facts.n_processors)
    if k.ne[2] * how.n_slots > MAX_GRID_Y:
        return _by_rows(b, n, **cells)
    parts = sums = 0
    if how.n_splits > 1:
        n_parts = n_tokens * n_head * how.n_splits
        parts, sums = (b.at(b.scratch.shared((what, n_bytes), n_bytes)[0])
                       for what, n_bytes in (("parts", 4 * n_parts * d_v), ("sums", 8 * n_parts)))  # fmt: skip
    given = b.given(*src[3:6])
    attend = launches.PagedAttend(
        **cells, given=given, q=b.address(src[0]), q_row=q.nb[1], q_head=q.nb[2], k=b.address(src[1]), k_row=k.nb[1],
        k_head=k.nb[2], k_q8=k.type == Q8_0, v=b.address(src[2]), v_row=v.nb[1], v_head=v.nb[2], v_q8=v.type == Q8_0,
        n_tokens=n_tokens, n_head=n_head, n_head_kv=k.ne[2], unit=how.unit, n_tiles=how.n_tiles, n_slots=how.n_slots,
        n_splits=how.n_splits, split_pages=how.split_pages, scale=n.params["scale"], softcap=n.params["logit_softcap"],
        sinks=sinks_at, y=y, parts=parts, sums=sums,
    )  # fmt: skip
    macros: dict[str, Any] = {"D": d, "DV": d_v, "ROWS": how.rows}
    if n.params["logit_softcap"]:
        macros["CAPPED"] = 1
    b.add(n, attend, how.n_units * how.n_tiles * how.n_splits, k.ne[2] * how.n_slots, 128, room_bytes(d, d_v, how.rows),
          **macros)  # fmt: skip
    if how.n_splits > 1:
        n_warps = n_head * ceil_div(d_v, 128)
        merge = launches.Merge(
            given=given, n_seen=b.address(src[4]), window=n.params["window"], n_tokens=n_tokens, n_head=n_head, d_v=d_v,
            n_splits=how.n_splits, split_pages=how.split_pages, n_blocks=ceil_div(n_warps, 4), sinks=sinks_at, y=y,
            parts=parts, sums=sums, meeting=b.zeros(8 * n_tokens),
        )  # fmt: skip
        b.add(n, merge, n_tokens * merge.n_blocks, 1, 32 * min(4, n_warps), **macros)
    return True


def _in_octets(b: Binder, i: int, t: Tensor) -> bool:
    """Whether cells' rows are read in pieces of eight elements."""
    if t.type == Q8_0:
        return t.ne[0] % 32 == 0 and b.address(i) % 2 == t.nb[1] % 2 == t.nb[2] % 2 == 0
    return t.nb[0] == 2 and b.address(i) % 16 == t.nb[1] % 16 == t.nb[2] % 16 == 0


def _by_rows(b: Binder, n: Node, **cells: int) -> bool:
    """Attention with a block for each query; with `cells` it is over pages."""
    q, k, v = n.req(0), n.req(1), n.req(2)
    mask, sinks = (None, n.opt(6)) if cells else (n.opt(3), n.opt(4))
    if k.type not in ROW_TYPES or v.type not in ROW_TYPES or max(q.ne[0], v.ne[0]) > MAX_ROW or q.ne[2] > MAX_GRID_Y:
        return False
    if q.nb[0] != 4 or n.tensor.nb[0] != 4 or any(t.nb[0] != TYPES[t.type].bytes for t in (k, v)):
        return False
    if (mask is not None and mask.nb[0] != 2) or (sinks is not None and sinks.nb[0] != 4):
        return False
    src, t, p = n.tensor.src, n.tensor, n.params
    none = dict.fromkeys(("pages", "n_pages", "n_sequences", "n_pool", "n_seen", "rows", "window"), 0)
    pages = cells or {**none, "status": b.status, "node": n.index}
    masked = {"mask": 0, "mask_row": 0, "mask_head": 0, "mask_seq": 0, "n_mask_head": 1, "n_mask_seq": 1}
    if mask is not None:
        _, row, head, seq = mask.nb
        masked = {"mask": b.address(src[3]), "mask_row": row, "mask_head": head, "mask_seq": seq, "n_mask_head": mask.ne[2],
                  "n_mask_seq": mask.ne[3]}  # fmt: skip
    launch = launches.RowAttend(
        **pages, **masked, q=b.address(src[0]), q_row=q.nb[1], q_head=q.nb[2], q_seq=q.nb[3], d=q.ne[0], n_tokens=q.ne[1],
        k=b.address(src[1]), k_row=k.nb[1], k_head=k.nb[2], k_seq=k.nb[3], k_type=k.type, v=b.address(src[2]), v_row=v.nb[1],
        v_head=v.nb[2], v_seq=v.nb[3], v_type=v.type, d_v=v.ne[0], n_kv=k.ne[1], group=q.ne[2] // k.ne[2],
        seq_group=q.ne[3] // k.ne[3], max_bias=p.get("max_bias", 0.0), n_slopes=1 << (q.ne[2].bit_length() - 1),
        scale=p["scale"], softcap=p["logit_softcap"], sinks=b.address(src[6 if cells else 4]) if sinks is not None else 0,
        y=b.address(n.index), y_row=t.nb[2], y_head=t.nb[1], y_seq=t.nb[3],
    )  # fmt: skip
    b.add(n, launch, q.ne[1] * q.ne[3], q.ne[2], 128)
    return True


@BINDINGS.of("FLASH_ATTN_EXT")
def flash_attn_ext(b: Binder, n: Node) -> bool:
    return _by_rows(b, n)
