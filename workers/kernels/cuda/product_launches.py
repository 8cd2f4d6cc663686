"""Kernels of weights and products, and what they are called with."""

from __future__ import annotations

from typing import Self

from msgspec import structs

from workers.kernels.cuda.launches import Four, Launch, Parts, launch
from workers.kernels.records import Address, Bytes, Code, Count, Flag, NodeIndex

# -- weights -----------------------------------------------------------------------------------------------------------


class PackedRows(Launch, frozen=True, kw_only=True):
    """Rows of weights, k elements each, between GGUF's layout at `raw` and the device's own at `packed`.

    `n_rows` are those of the whole tensor, which decide where its planes lie; of them `n` from `first` on are meant, which
    is a multiple of 16. `raw` has the row `first` at its beginning.
    """

    raw: Address
    packed: Address
    n_rows: Count
    k: Count
    first: Count
    n: Count


@launch("packing.pack", "pack weights")
class Pack(PackedRows, frozen=True, kw_only=True):
    pass


@launch("packing.unpack", "unpack weights")
class Unpack(PackedRows, frozen=True, kw_only=True):
    pass


NO_PART = (1 << 31) - 1

# -- products ----------------------------------------------------------------------------------------------------------


@launch("columns.halve", "columns to F16")
class Halve(Launch, frozen=True, kw_only=True):
    """n columns of k float32 as float16 (or bfloat16, `wide`), each times a power of two of its own; `scales` undo it.

    Columns lie `y_row` bytes apart, filled up with zeros.
    """

    x: Address
    x_row: Bytes
    n: Count
    k: Count
    y: Address
    y_row: Bytes
    scales: Address
    wide: Flag


class Weights(Launch, frozen=True, kw_only=True):
    """Rows of packed weights of a tensor with `n_all` rows; the first is `first`, a multiple of 16."""

    w: Address
    n_all: Count
    first: Count
    n_rows: Count
    k: Count


@launch("products.product", "MUL_MAT")
class Product(Launch, frozen=True, kw_only=True):
    """Rows of up to four tensors' packed weights times the same n columns of k elements.

    Attributes:
        w, n_all, first, n_rows, y, y_row: of each tensor, as `Weights` has them, and where its result lies.
        begin: a tensor's first tile of rows among the n_tiles of all; NO_PART where there is none.
        fixed: no launch of the same plan writes the weights.
        staged: the columns, which lie in one piece, are read from shared memory; a kernel is compiled for that.
        rows: what the columns are made of as they are staged, float32 in one piece, and the `peaks` that `TellsPeaks` tells
            of them; 0: the columns lie at x.
    """

    x: Address
    x_row: Bytes
    scales: Address
    n: Count
    k: Count
    n_tiles: Count
    rows: Address = 0
    peaks: Address = 0
    fixed: Flag
    staged: Flag
    begin: Parts
    w: Parts
    n_all: Parts
    first: Parts
    n_rows: Parts
    y: Parts
    y_row: Parts

    def joined(self, other: Product) -> Self | None:
        """Both as one; None where they have not the same columns, or are too many."""
        n = sum(b < NO_PART for b in self.begin)
        same = ("x", "x_row", "scales", "rows", "n", "k", "fixed", "staged")
        if n == len(self.begin) or other.begin[1] < NO_PART or any(getattr(self, s) != getattr(other, s) for s in same):
            return None
        parts = {name: (*getattr(self, name)[:n], getattr(other, name)[0], *getattr(self, name)[n + 1 :])
                 for name in ("w", "n_all", "first", "n_rows", "y", "y_row")}  # fmt: skip
        begin = (*self.begin[:n], self.n_tiles, *self.begin[n + 1 :])
        return structs.replace(self, begin=begin, n_tiles=self.n_tiles + other.n_tiles, **parts)


@launch("tiles.tile_product", "MUL_MAT")
class TileProduct(Product, frozen=True, kw_only=True):
    """The same, of many columns: tiles are of 128 rows, whole ones of 16 and whole groups of elements."""


def single(value: int) -> Parts:
    """Of the only part."""
    return (value, 0, 0, 0)


@launch("columns.route", "MUL_MAT_ID route")
class Route(Launch, frozen=True, kw_only=True):
    """Who chose which expert: `pairs` lists token * n_used + slot by expert, in order; `tiles` has (expert, first, count)
    for each `n_columns` pairs of one expert, then entries with count 0, `n_tiles` in all."""

    ids: Address
    ids_row: Bytes
    n_used: Count
    n_tokens: Count
    n_experts: Count
    n_columns: Count
    pairs: Address
    tiles: Address
    n_tiles: Count
    status: Address
    node: NodeIndex


@launch("products.expert_product", "MUL_MAT_ID")
class ExpertProduct(Weights, frozen=True, kw_only=True):
    """Each expert's rows times the columns that chose it. `n_rows`: of one expert. Column of a pair: token * n_slots +
    slot % n_slots."""

    x: Address
    x_row: Bytes
    scales: Address
    n_slots: Count
    n_used: Count
    pairs: Address
    tiles: Address
    y: Address
    y_row: Bytes


@launch("products.get_rows", "GET_ROWS of weights")
class GetWeightRows(Weights, frozen=True, kw_only=True):
    """Rows of packed weights as float32, `y_row` bytes apart."""

    ids: Address
    id_step: Bytes
    n: Count
    y: Address
    y_row: Bytes
    status: Address
    node: NodeIndex


@launch("columns.plain_product", "MUL_MAT of plain weights")
class PlainProduct(Launch, frozen=True, kw_only=True):
    """y [n] = rows of w by rows of x, of any strides. Types: 0 float32, 1 float16, 2 bfloat16. `repeat2`, `repeat3`: how
    many of x share one of w."""

    w: Address
    w_type: Code
    w_nb: Four
    repeat2: Count
    repeat3: Count
    x: Address
    x_type: Code
    x_nb: Four
    y: Address
    y_nb: Four
    n: Four
    k: Count
