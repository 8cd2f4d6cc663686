"""Attention over pages of cells, in float64: the definition behind the reference kernel.

A sequence's cell i lies at pages[i // 64] * 64 + i % 64. Source: Kwon et al. (PagedAttention).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from protocol.rules import PAGE_CELLS
from workers.tensors import Array, spread


def seen_cells(n_seen: int, window: int) -> Array:
    """The cells that a token sees, of the first `n_seen` the last `window` (0: all), in order."""
    return np.arange(max(0, n_seen - window) if window else 0, n_seen)


def missing(pages: Array, n_seen: Array, rows: Array, window: int, n_pages: int) -> int | None:
    """The first page number that a token would follow and that is none of 0..n_pages - 1; None if there is none.

    Shapes: `pages` (n_sequences, n), `n_seen` and `rows` (n_tokens,).
    """
    for seen, row in zip(n_seen, rows, strict=True):
        page = pages[row, np.unique(seen_cells(seen, window) // PAGE_CELLS)]
        bad = page[(page < 0) | (page >= n_pages)]
        if len(bad):
            return int(bad[0])
    return None


def attention(
    q: Array, keys: Callable[[Array], Array], values: Callable[[Array], Array], pages: Array, n_seen: Array, rows: Array,
    sinks: Array | None, scale: float, softcap: float, window: int,
) -> Array:  # fmt: skip
    """softmax(scale * cap(q k)) v for each token and head; a token that sees nothing gives zeros.

    Shapes: `q` (n_head, n_tokens, d); `keys` and `values` give (n_head_kv, n, d) for n cells; the result (1, n_tokens,
        n_head, d_v).
    """
    n_head = len(q)
    sink = np.full(n_head, -np.inf) if sinks is None else sinks.reshape(-1)
    out = []
    for token, (seen, row) in enumerate(zip(n_seen, rows, strict=True)):
        cells = seen_cells(seen, window)
        at = pages[row, cells // PAGE_CELLS] * PAGE_CELLS + cells % PAGE_CELLS
        k, v = keys(at), values(at)
        group = n_head // len(k)
        score = np.einsum("hd,hcd->hc", q[:, token], spread(k, group, 0)) * scale
        if softcap:
            score = softcap * np.tanh(score / softcap)
        peak = np.maximum(score.max(1, initial=-np.inf), sink)[:, None]
        e = np.exp(score - np.where(np.isfinite(peak), peak, 0))
        total = e.sum(1) + np.exp(sink - np.where(np.isfinite(peak), peak, 0)[:, 0])
        out.append(np.einsum("hc,hcd->hd", e, spread(v, group, 0)) / np.where(total > 0, total, 1)[:, None])
    return np.array(out)[None]
