"""Kernels of positions and attention, and what they are called with."""

from __future__ import annotations

from workers.kernels.cuda.launches import NOTHING, Four, Launch, TellsPeaks, launch
from workers.kernels.records import Address, Bytes, Code, Count, Flag, Float32, NodeIndex

# -- positions ---------------------------------------------------------------------------------------------------------


@launch("rope.table", "ROPE table")
class RopeTable(Launch, frozen=True, kw_only=True):
    """Cosine and sine, times `magnitude`, of each token and pair: float32 [n_tokens][n_pairs][2] at `turned`.

    `pairs` has for each pair the angle by which one position turns it, float64, and which of the token's positions it goes
    by, int64; `factors` (0: none) divide the angles. Of n_positions, `step` bytes apart and smaller than `bound`, the first
    of all tokens stand together, then the second of all.
    """

    positions: Address
    step: Bytes
    n_positions: Count
    bound: Count
    pairs: Address
    factors: Address
    n_tokens: Count
    n_pairs: Count
    magnitude: Float32
    turned: Address
    status: Address
    node: NodeIndex


@launch("rope.rope", "ROPE")
class Rope(Launch, frozen=True, kw_only=True):
    """Turns pairs of the rows of x, float32 or float16 (`halves`), and of another tensor that differs in n_head_too.

    Pair i is the elements first + 2i and the one behind it, or first + i and first + i + n_pairs (`apart`). All others
    are copied, `n_copied` of each row, or 0 where y is x.

    Attributes:
        cells: 0, or where the last result also goes, of type cells_type: a row for each token, `ids` has which of n_all.
        values: 0, or float32, n_values a token, that go to rows of value_cells as they are.
    """

    x: Address
    x_nb: Four
    y: Address
    y_nb: Four
    ne: Four
    turned: Address
    n_pairs: Count
    first: Count
    n_copied: Count
    apart: Flag
    halves: Flag
    x_too: Address = 0
    x_too_nb: Four = NOTHING
    y_too: Address = 0
    y_too_nb: Four = NOTHING
    n_head_too: Count = 0
    cells: Address = 0
    cells_row: Bytes = 0
    cells_type: Code = 0
    ids: Address = 0
    ids_step: Bytes = 0
    id_bytes: Count = 0
    n_all: Count = 0
    values: Address = 0
    values_row: Bytes = 0
    n_values: Count = 0
    value_cells: Address = 0
    value_cells_row: Bytes = 0
    status: Address = 0
    node: NodeIndex = 0

    def title(self) -> str:
        more = {"ROPE": self.n_head_too, "SET_ROWS": self.cells, "SET_ROWS of others": self.values}
        return ", ".join(["ROPE", *(name for name, there in more.items() if there)])

    @property
    def n_threads(self) -> int:
        """Of a token."""
        return (self.ne[1] + self.n_head_too) * (self.n_pairs + self.n_copied) + self.n_values // 4


@launch("rope.normed_rope", "RMS_NORM, ROPE")
class NormedRope(Rope, frozen=True, kw_only=True):
    """Of the RMS norms of rows of up to MAX_NORMED float32, times w or w_too, which stay as they are."""

    eps: Float32
    w: Address
    w_too: Address = 0

    def title(self) -> str:
        return super().title().replace("ROPE", "RMS_NORM * w, ROPE")

    @property
    def n_threads(self) -> int:
        return 32 * (self.ne[1] + self.n_head_too) + self.n_values // 4


MAX_NORMED = 256


# -- attention ---------------------------------------------------------------------------------------------------------


class Pages(Launch, frozen=True, kw_only=True):
    """Which cells a token sees: of its sequence's first n_seen the last `window` (0: all of them).

    Cell i of a sequence lies at pages[i / 64] * 64 + i % 64 of `n_pool` pages. `rows` (0: none) has each token's sequence.
    """

    pages: Address
    n_pages: Count
    n_sequences: Count
    n_pool: Count
    n_seen: Address
    rows: Address
    window: Count
    status: Address
    node: NodeIndex


@launch("paged.attend", "PAGED_ATTN")
class PagedAttend(Pages, frozen=True, kw_only=True):
    """Keys and values are float16, or Q8_0.

    Queries are taken in tiles, of `unit` tokens by themselves: one after the other with the heads of a group,
    `n_tiles` for a unit. A block takes one of `n_slots` sequences of a tile. With `parts` it takes `split_pages` pages, one
    of `n_splits` parts, and `Merge` must follow: there are float32 [d_v] of each query and part, and at `sums` its peak and
    sum. `given`: no launch of the plan writes `pages`, `n_seen` and `rows`, so they may be read before others are done.
    """

    given: Flag
    q: Address
    q_row: Bytes
    q_head: Bytes
    k: Address
    k_row: Bytes
    k_head: Bytes
    k_q8: Flag
    v: Address
    v_row: Bytes
    v_head: Bytes
    v_q8: Flag
    n_tokens: Count
    n_head: Count
    n_head_kv: Count
    unit: Count
    n_tiles: Count
    n_slots: Count
    n_splits: Count
    split_pages: Count
    scale: Float32
    softcap: Float32
    sinks: Address
    y: Address
    parts: Address
    sums: Address


@launch("paged.merge", "PAGED_ATTN merge")
class Merge(TellsPeaks, frozen=True, kw_only=True):
    """Parts of each query, in order: `split_pages` pages each. `n_blocks` are a token's; the last of them makes its column.
    `given`: as `PagedAttend` has it. `meeting`: two words for each token, zeros before and after."""

    given: Flag
    n_seen: Address
    window: Count
    n_tokens: Count
    n_head: Count
    d_v: Count
    n_splits: Count
    split_pages: Count
    n_blocks: Count
    sinks: Address
    y: Address
    parts: Address
    sums: Address
    meeting: Address

    def rows_made(self) -> tuple[int, int, int] | None:
        return self.y, self.n_head * self.d_v, self.n_tokens


@launch("attention.attend", "attention by rows")
class RowAttend(Pages, frozen=True, kw_only=True):
    """Attention of any types and shapes: a block for a query.

    With `pages` it is PAGED_ATTN, without FLASH_ATTN_EXT over `n_kv` cells. Types are GGUF's numbers. `group`, `seq_group`:
    heads and sequences of q that share those of k. `n_slopes`: the greatest power of two that is no more than the heads.
    """

    q: Address
    q_row: Bytes
    q_head: Bytes
    q_seq: Bytes
    d: Count
    n_tokens: Count
    k: Address
    k_row: Bytes
    k_head: Bytes
    k_seq: Bytes
    k_type: Code
    v: Address
    v_row: Bytes
    v_head: Bytes
    v_seq: Bytes
    v_type: Code
    d_v: Count
    n_kv: Count
    group: Count
    seq_group: Count
    mask: Address
    mask_row: Bytes
    mask_head: Bytes
    mask_seq: Bytes
    n_mask_head: Count
    n_mask_seq: Count
    max_bias: Float32
    n_slopes: Count
    scale: Float32
    softcap: Float32
    sinks: Address
    y: Address
    y_row: Bytes
    y_head: Bytes
    y_seq: Bytes
