"""Shape rules of ops: what the result of a node must be, given its sources and parameters.

A rule is held against nodes whose layout and types are checked already; it touches no data.

Source: ggml.c and ggml.h (shape rules, op_params).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from protocol.dtypes import GGMLType
from protocol.errors import GraphError
from protocol.graph import Tensor

_F32, _I32 = GGMLType.F32, GGMLType.I32

Rule = Callable[[Tensor, "Sources", dict[str, Any]], None]


class Sources(list["Tensor | None"]):
    """The source tensors of a node; `s[i]` of a required source is never None once counted."""

    def req(self, i: int) -> Tensor:
        t = self[i] if i < len(self) else None
        if t is None:
            raise GraphError(f"source {i} is required")
        return t

    def opt(self, i: int) -> Tensor | None:
        return self[i] if i < len(self) else None


def need(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)


def same(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a = s.req(0)
    need(t.ne == a.ne and t.type == a.type, f"result {t.ne} type {t.type} must be as source 0, {a.ne} type {a.type}")


def same_shape(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    need(t.ne == s.req(0).ne, f"result {t.ne} must have the shape of source 0, {s.req(0).ne}")


def _repeats(big: Tensor, small: Tensor, what: str) -> None:
    ok = all(n and b % n == 0 for b, n in zip(big.ne, small.ne, strict=True))
    need(ok, f"{what}: {small.ne} does not repeat to {big.ne}")


def binary(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    same_shape(t, s, p)
    _repeats(s.req(0), s.req(1), "source 1")


def add_id(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b, ids = s.req(0), s.req(1), s.req(2)
    same(t, s, p)
    need(b.ne[0] == a.ne[0] and b.ne[2] == b.ne[3] == 1, f"source 1 {b.ne} must be [{a.ne[0]}, n_expert]")
    need(ids.ne[:2] == a.ne[1:3] and a.ne[3] == 1, f"ids {ids.ne} must be {a.ne[1:3]}")


def glu(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b = s.req(0), s.opt(1)
    if b is None:
        need(t.ne == (a.ne[0] // 2, *a.ne[1:]), f"result {t.ne} must be half of source 0, {a.ne}")
    else:
        need(t.ne == a.ne == b.ne and a.type == b.type, f"gate {b.ne} and result {t.ne} must be as source 0, {a.ne}")
    need(t.type == a.type, "the result has the type of source 0")


def rows_to_one(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    need(t.ne == (1, *s.req(0).ne[1:]), f"result {t.ne} must be one element a row of {s.req(0).ne}")


def argmax(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a = s.req(0)
    need(a.ne[2] == a.ne[3] == 1 and t.ne == (a.ne[1], 1, 1, 1), f"result {t.ne} must be one index a row of {a.ne}")


def top_k(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a = s.req(0)
    need(t.ne[1:] == a.ne[1:], f"result {t.ne} must have the rows of {a.ne}")
    need(1 <= t.ne[0] <= a.ne[0], f"k = {t.ne[0]} must lie in 1..{a.ne[0]}")


def repeat(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    _repeats(t, s.req(0), "source 0")
    need(t.type == s.req(0).type, "the result has the type of source 0")


def concat(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b, dim = s.req(0), s.req(1), p["dim"]
    need(a.type == b.type == t.type, "sources and result have one type")
    want = tuple(x + y if i == dim else x for i, (x, y) in enumerate(zip(a.ne, b.ne, strict=True)))
    need(all(x == y for i, (x, y) in enumerate(zip(a.ne, b.ne, strict=True)) if i != dim), f"{a.ne} and {b.ne} differ")
    need(t.ne == want, f"result must be {want}, got {t.ne}")


def mul_mat(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b = s.req(0), s.req(1)
    need(a.ne[0] == b.ne[0], f"rows of {a.ne} and {b.ne} differ in length")
    need(a.ne[2] > 0 and a.ne[3] > 0 and b.ne[2] % a.ne[2] == 0 and b.ne[3] % a.ne[3] == 0,
         f"source 0 {a.ne} does not repeat to {b.ne}")  # fmt: skip
    need(t.ne == (a.ne[1], b.ne[1], b.ne[2], b.ne[3]), f"result {t.ne} does not fit {a.ne} x {b.ne}")


def mul_mat_id(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b, ids = s.req(0), s.req(1), s.req(2)
    need(a.ne[3] == 1 and b.ne[3] == 1 and ids.ne[2] == ids.ne[3] == 1, "experts, columns and ids are at most 3-d")
    need(a.ne[0] == b.ne[0], f"rows of {a.ne} and {b.ne} differ in length")
    need(b.ne[1] > 0 and ids.ne[0] % b.ne[1] == 0, f"columns {b.ne} do not repeat to ids {ids.ne}")
    need(ids.ne[1] == b.ne[2], f"ids {ids.ne} and columns {b.ne} differ in tokens")
    need(t.ne == (a.ne[1], ids.ne[0], b.ne[2], 1), f"result {t.ne} does not fit {a.ne}, {b.ne}, ids {ids.ne}")


def out_prod(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, b = s.req(0), s.req(1)
    need(a.ne[1] == b.ne[1], f"columns of {a.ne} and {b.ne} differ")
    need(a.ne[2] > 0 and a.ne[3] > 0 and b.ne[2] % a.ne[2] == 0 and b.ne[3] % a.ne[3] == 0,
         f"source 0 {a.ne} does not repeat to {b.ne}")  # fmt: skip
    need(t.ne == (a.ne[0], b.ne[0], b.ne[2], b.ne[3]), f"result {t.ne} does not fit {a.ne} x {b.ne}")


def view(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    need(t.view_src >= 0, "a view names its view_src")
    need(t.type == s.req(0).type, "a view keeps its type")


def reshape(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    view(t, s, p)
    need(t.n_elements == s.req(0).n_elements, f"{s.req(0).ne} does not reshape to {t.ne}")


def copy(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a = s.req(0)
    need(t.n_elements == a.n_elements, f"source has {a.n_elements} elements, result {t.n_elements}")
    b = s.opt(1)
    if b is not None:
        need(t.ne == b.ne and t.type == b.type, f"result {t.ne} type {t.type} must be its target, {b.ne} type {b.type}")


def get_rows(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, idx = s.req(0), s.req(1)
    need(idx.ne[3] == 1 and a.ne[2] == idx.ne[1] and a.ne[3] == idx.ne[2], f"rows {a.ne} and indices {idx.ne} differ")
    need(t.ne == (a.ne[0], *idx.ne[:3]), f"result {t.ne} must be {(a.ne[0], *idx.ne[:3])}")
    need(t.type == (_I32 if a.type == _I32 else _F32), f"the result is {'I32' if a.type == _I32 else 'F32'}")


def set_rows(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    b, idx, a = s.req(0), s.req(1), s.req(2)
    need(t.ne == a.ne and t.type == a.type, "the result is its target")
    need(a.ne[0] == b.ne[0] and a.ne[2] == b.ne[2] and a.ne[3] == b.ne[3], f"rows {b.ne} do not fit target {a.ne}")
    need(idx.ne[0] == b.ne[1] and idx.ne[3] == 1, f"{b.ne[1]} rows and {idx.ne[0]} indices")
    need(idx.ne[1] > 0 and idx.ne[2] > 0 and b.ne[2] % idx.ne[1] == 0 and b.ne[3] % idx.ne[2] == 0,
         f"indices {idx.ne} do not repeat to rows {b.ne}")  # fmt: skip


def soft_max(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, mask, sinks = s.req(0), s.opt(1), s.opt(2)
    same(t, s, p)
    if mask is not None:
        need(mask.ne[0] == a.ne[0] and mask.ne[1] >= a.ne[1], f"mask {mask.ne} does not cover {a.ne}")
        need(mask.ne[2] > 0 and mask.ne[3] > 0 and a.ne[2] % mask.ne[2] == 0 and a.ne[3] % mask.ne[3] == 0,
             f"mask {mask.ne} does not repeat to {a.ne}")  # fmt: skip
    if sinks is not None:
        need(sinks.ne == (a.ne[2], 1, 1, 1), f"sinks {sinks.ne} must be one a head of {a.ne}")
    need(p["max_bias"] == 0.0 or mask is not None, "max_bias needs a mask")


ROPE_NEOX, ROPE_MROPE, ROPE_VISION, ROPE_IMROPE = 2, 8, 24, 40


def rope(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    a, pos, freqs = s.req(0), s.req(1), s.opt(2)
    same(t, s, p)
    n_dims, mode, first = p["n_dims"], p["mode"], p["n_offs"]
    need(mode in (0, ROPE_NEOX, ROPE_MROPE, ROPE_VISION, ROPE_IMROPE), f"rope mode {mode} is none of 0, 2, 8, 24, 40")
    need(n_dims % 2 == 0 and first % 2 == 0 and first + n_dims <= a.ne[0],
         f"{n_dims} dimensions from {first} on are even and fit a row of {a.ne[0]}")  # fmt: skip
    n_pos = a.ne[2] * (4 if mode & ROPE_MROPE else 1)
    need(pos.ne == (n_pos, 1, 1, 1), f"positions {pos.ne} must be [{n_pos}]")
    if mode & ROPE_MROPE:
        sections = [p[f"section_{i}"] for i in range(4)]
        need(sum(sections) > 0, "mrope needs a section that is not empty")
        if mode == ROPE_VISION:
            need(n_dims == a.ne[0] // 2, f"vision rope turns halves: n_dims {n_dims}, row {a.ne[0]}")
    if freqs is not None:
        need(freqs.ne[0] >= n_dims // 2, f"frequency factors {freqs.ne} are fewer than {n_dims // 2}")
    need(p["freq_base"] > 0, "freq_base is positive")


def flash_attn(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    q, k, v, mask, sinks = s.req(0), s.req(1), s.req(2), s.opt(3), s.opt(4)
    need(q.ne[0] == k.ne[0], f"rows of q {q.ne} and k {k.ne} differ")
    need(k.ne[1:] == v.ne[1:], f"k {k.ne} and v {v.ne} differ in cells, heads or sequences")
    need(k.ne[2] > 0 and k.ne[3] > 0 and q.ne[2] % k.ne[2] == 0 and q.ne[3] % k.ne[3] == 0,
         f"heads of k {k.ne} do not repeat to q {q.ne}")  # fmt: skip
    need(t.ne == (v.ne[0], q.ne[2], q.ne[1], q.ne[3]), f"result {t.ne} does not fit q {q.ne}, v {v.ne}")
    if mask is not None:
        need(mask.ne[0] == k.ne[1] and mask.ne[1] >= q.ne[1], f"mask {mask.ne} does not cover {q.ne} x {k.ne}")
        need(mask.ne[2] > 0 and mask.ne[3] > 0 and q.ne[2] % mask.ne[2] == 0 and q.ne[3] % mask.ne[3] == 0,
             f"mask {mask.ne} does not repeat to q {q.ne}")  # fmt: skip
    if sinks is not None:
        need(sinks.ne == (q.ne[2], 1, 1, 1), f"sinks {sinks.ne} must be one a head of {q.ne}")
    need(p["max_bias"] == 0.0 or mask is not None, "max_bias needs a mask")


PAGE_CELLS = 64
"""Cells of a page."""


def paged_attn(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    q, k, v, pages, n_seen, rows, sinks = *(s.req(i) for i in range(5)), s.opt(5), s.opt(6)
    n_tokens, n_head = q.ne[1:3]
    need(q.ne[0] == k.ne[0], f"rows of q {q.ne} and k {k.ne} differ")
    need(k.ne[1:] == v.ne[1:], f"k {k.ne} and v {v.ne} differ in cells or heads")
    need(k.ne[1] % PAGE_CELLS == 0, f"{k.ne[1]} cells are no pages of {PAGE_CELLS}")
    need(q.ne[3] == k.ne[3] == 1 and n_head % k.ne[2] == 0, f"heads of k {k.ne} do not repeat to q {q.ne}")
    need(pages.ne[2:] == (1, 1), f"pages {pages.ne} must be [n_pages, n_sequences]")
    need(n_seen.ne == (n_tokens, 1, 1, 1), f"n_seen {n_seen.ne} must be [{n_tokens}]")
    need(rows is None or rows.ne == n_seen.ne, f"rows must be [{n_tokens}]")
    need(sinks is None or sinks.ne == (n_head, 1, 1, 1), f"sinks must be one a head of {q.ne}")
    need(t.ne == (v.ne[0], n_head, n_tokens, 1), f"result {t.ne} does not fit q {q.ne}, v {v.ne}")


def ssm_conv(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    x, w = s.req(0), s.req(1)
    need(w.ne[1:] == (x.ne[1], 1, 1) and x.ne[3] == 1, f"filters {w.ne} must be [d_conv, {x.ne[1]}]")
    want = (x.ne[1], x.ne[0] - w.ne[0] + 1, x.ne[2], 1)
    need(t.ne == want, f"result {t.ne} must be {want}: of {x.ne[0]} tokens the first {w.ne[0] - 1} are only seen")


def ssm_scan(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    state, x, dt, a, b, c, ids = (s.req(i) for i in range(7))
    d_state, (d_head, n_head, n_tokens, n_seqs) = state.ne[0], x.ne
    need(state.ne[1:3] == (d_head, n_head), f"states {state.ne} must be [d_state, {d_head}, {n_head}, n]")
    need(dt.ne == (n_head, n_tokens, n_seqs, 1), f"dt {dt.ne} must be {(n_head, n_tokens, n_seqs)}")
    need(a.ne[0] in (1, d_state) and a.ne[1:] == (n_head, 1, 1), f"a {a.ne} must be [{d_state} or 1, {n_head}]")
    need(b.ne == c.ne == (d_state, b.ne[1], n_tokens, n_seqs),
         f"b {b.ne} and c {c.ne} must be [{d_state}, n_group, {n_tokens}, {n_seqs}]")  # fmt: skip
    need(n_head % b.ne[1] == 0, f"{n_head} heads do not divide into {b.ne[1]} groups")
    need(ids.ne == (n_seqs, 1, 1, 1), f"ids {ids.ne} must be [{n_seqs}]")
    n = x.n_elements + max(1, p["n_states"]) * d_state * d_head * n_head * n_seqs
    need(t.ne == (n, 1, 1, 1), f"result {t.ne} must be [{n}]: y, then states")


def unbound(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    pass


def arange(t: Tensor, s: Sources, p: dict[str, Any]) -> None:
    need(p["step"] != 0 and math.isfinite(p["start"]) and math.isfinite(p["stop"]), "arange is finite, its step not 0")
    n = math.ceil((p["stop"] - p["start"]) / p["step"])
    need(t.ne == (n, 1, 1, 1), f"result must be [{n}], got {t.ne}")
