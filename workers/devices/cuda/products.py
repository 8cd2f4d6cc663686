"""Bindings of products, and of rows of their weights.

Products read packed weights. Those that a buffer holds packed are read where they lie; others are packed to scratch memory
each time, and types without products are multiplied as F16 copies. Weights of F32, and of any strides, have a kernel of
their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from msgspec import structs

from protocol.dtypes import TYPES, GGMLType, tensor_bytes
from protocol.graph import Tensor
from workers.devices.bindings import Bindings
from workers.devices.cuda.binding import BF16, F16, F32, I32, Binder, Launched, ceil_div
from workers.devices.cuda.moves import get_plain_rows
from workers.devices.lower import SCRATCH, Node, Span
from workers.kernels.cuda.planes import CHUNK, GROUP, TILE, format_of, multiplied
from workers.kernels.cuda.product_launches import (
    NO_PART,
    ExpertProduct,
    GetWeightRows,
    Halve,
    Pack,
    PlainProduct,
    Product,
    Route,
    TileProduct,
    single,
)

BINDINGS = Bindings()
ProductT = TypeVar("ProductT", bound=Product)

MAX_EXPERTS = 1024
"""As columns.cu has them."""
PLAIN = (F32, F16, BF16)
"""Types of weights that need not be packed, by the number that kernels know them by."""
TILES = ((8, 1, 1), (16, 1, 2), (32, 2, 4))
"""Up to so many columns: tiles of rows and of columns that a warp multiplies at once; else LARGEST. A result does not
depend on it.
"""
LARGEST = (2, 8)
FEW_COLUMNS = 64
"""More are multiplied in large tiles."""
LARGE_TILE = 128
"""Rows and columns of these."""
STAGED_BYTES = 32 << 10
"""As products.cu has them."""
MOST_BLOCKS = 2
"""Of a product that a processor has at a time. More hide each other's waits, and have fewer registers to read ahead."""


class Matrix(NamedTuple):
    """Packed weights: their type, where they lie, and rows of the whole tensor. `fixed`: no launch packs them."""

    type: GGMLType
    at: int
    n_rows: int
    fixed: bool


class Columns(NamedTuple):
    """Columns in 16 bits: where they and their scales lie, and bytes from one to the next; or the `rows` of float32 that a
    product makes them of, and their `peaks`."""

    at: int
    row: int
    scales: int
    rows: int = 0
    peaks: int = 0


def _tile(n: int) -> tuple[int, int]:
    return next(((mt, nt) for most, mt, nt in TILES if n <= most), LARGEST)


def _packed(b: Binder, n: Node, i: int) -> Matrix | None:
    """Source `i` as products read it; None where they do not take it."""
    t = b.tensors[i]
    if t.n_rows * ceil_div(t.ne[0], CHUNK) >= 1 << 32:  # as kernels count
        return None
    buffer = b.buffers.get(t.buffer) if t.op == "NONE" else None
    if buffer is not None and buffer.packed.get(t.offset, (None, None))[:2] == (t.type, t.ne):
        return Matrix(GGMLType(t.type), b.address(i), t.n_rows, True)
    if not t.contiguous:
        return None
    if t.type not in PLAIN and not multiplied(t.type, t.ne[0]):
        wide = b.weights.widened(buffer, t, b.tick)
        return None if wide is None else Matrix(F16, wide, t.n_rows, True)
    if t.type == F32 or not multiplied(t.type, t.ne[0]) or (t.ne[2] * t.ne[3] > 1 and t.ne[1] % TILE):
        return None
    at = b.more(tensor_bytes(t.type, t.ne) + 16 * 5)  # each plane begins at a multiple of 16
    blocks = t.n_elements // max(CHUNK, TYPES[t.type].block)
    pack = Pack(raw=b.address(i), packed=at, n_rows=t.n_rows, k=t.ne[0], first=0, n=t.n_rows)
    b.add(n, pack, ceil_div(blocks, 128), 1, 128, FORMAT=format_of(t.type))
    return Matrix(GGMLType(t.type), at, t.n_rows, False)


def _columns(b: Binder, n: Node, wide: bool, whole: bool = False) -> Columns | None:
    """Columns of source 1 in 16 bits, made once for all products that read them. `whole`: the product takes all of them at
    once, and may make them itself."""
    j, t = n.tensor.src[1], n.req(1)
    if t.type != F32 or not t.contiguous:
        return None
    row = 2 * CHUNK * ceil_div(t.ne[0], CHUNK)
    if whole and t.n_rows <= FEW_COLUMNS and t.n_rows * row <= STAGED_BYTES and b.lowered.n_products[j] == 1:
        peaks = b.tells_peaks(j)
        if peaks:
            return Columns(0, row, 0, b.address(j), peaks)
    n_bytes = (row + 4) * t.n_rows
    place, fresh = b.scratch.shared(("bfloat16", j), n_bytes) if wide else b.scratch.columns(j, n_bytes)
    at = b.at(Span(SCRATCH, place.start, place.start + n_bytes))
    columns = Columns(at, row, at + row * t.n_rows)
    if fresh and not b.makes_columns(j, at, row, columns.scales, wide):
        halve = Halve(x=b.address(j), x_row=t.nb[1], n=t.n_rows, k=t.ne[0], y=at, y_row=row, scales=columns.scales,
                      wide=wide)
        b.add(n, halve, t.n_rows)
    return columns


@BINDINGS.of("MUL_MAT")
def mul_mat(b: Binder, n: Node) -> bool:
    a, z = n.req(0), n.req(1)
    if n.tensor.type != F32:
        return False
    fits = z.type == F32 and z.contiguous and n.tensor.contiguous
    w = _packed(b, n, n.tensor.src[0]) if fits else None
    if w is None:
        return _plain(b, n)
    x = _columns(b, n, w.type == BF16, a.ne[2] * a.ne[3] == 1)
    assert x is not None  # it fits
    y, r2, r3 = b.address(n.index), z.ne[2] // a.ne[2], z.ne[3] // a.ne[3]
    batches = range(z.ne[2] * z.ne[3]) if a.ne[2] * a.ne[3] > 1 else (0,)
    count = z.ne[1] if a.ne[2] * a.ne[3] > 1 else z.n_rows
    mt, nt = _tile(count)
    for batch in batches:
        first = ((batch // z.ne[2]) // r3 * a.ne[2] + batch % z.ne[2] // r2) * a.ne[1] if len(batches) > 1 else 0
        at = batch * z.ne[1]
        product = Product(x=x.at + at * x.row, x_row=x.row, scales=x.scales + 4 * at, n=count, k=a.ne[0], fixed=w.fixed,
                          rows=x.rows, peaks=x.peaks, staged=count * x.row <= STAGED_BYTES,
                          n_tiles=ceil_div(a.ne[1], TILE * mt), begin=(0, NO_PART, NO_PART, NO_PART), w=single(w.at),
                          n_all=single(w.n_rows), first=single(first), n_rows=single(a.ne[1]),
                          y=single(y + 4 * a.ne[1] * at), y_row=single(4 * a.ne[1]))  # fmt: skip
        macros = _macros(w, a.ne[0], mt, nt)
        if count > FEW_COLUMNS and not macros["REST"]:
            tiled = {**structs.asdict(product), "n_tiles": ceil_div(a.ne[1], LARGE_TILE), "staged": False}
            _add_tiles(b, n, TileProduct(**tiled), FORMAT=format_of(w.type))
        else:
            _add_product(b, n, product, ceil_div(count, 8 * nt), **macros)
    return True


def _macros(w: Matrix, k: int, mt: int, nt: int) -> dict[str, Any]:
    """What a product of tiles of that size is compiled with."""
    return {"FORMAT": format_of(w.type), "MT": mt, "NT": nt, "REST": int(k % GROUP != 0 or w.n_rows % TILE != 0)}


def _blocks(n_tiles: int, n_processors: int, mt: int, nt: int) -> int:
    """How many blocks share a processor."""
    return max(1, min(ceil_div(n_tiles, n_processors), MOST_BLOCKS if mt * nt < 16 else 1))


def _joined(b: Binder, n: Node, product: ProductT, macros: dict[str, Any]) -> tuple[ProductT, tuple[int, ...]]:
    """With the launch before it, which falls away, when that has the same columns and the same kind of weights; and the
    nodes that this was for."""
    last = b.steps[-1] if b.steps else None
    if isinstance(last, Launched) and isinstance(last.argument, type(product)) and last.about == macros and b.apart(n):
        joined = last.argument.joined(product)
        if joined is not None:
            del b.steps[-1]
            return joined, (last.node, *last.joined)
    return product, ()


def _add_tiles(b: Binder, n: Node, product: TileProduct, **macros: Any) -> None:
    product, others = _joined(b, n, product, macros)
    b.add(n, product, product.n_tiles * ceil_div(product.n, LARGE_TILE), 1, 256, 4 * LARGE_TILE * GROUP, macros, **macros)
    b.widen(product, 0, *others)


def _add_product(b: Binder, n: Node, product: Product, n_column_tiles: int, **macros: Any) -> None:
    product, others = _joined(b, n, product, macros)
    n_processors = b.driver.facts.n_processors
    each = _blocks(product.n_tiles * n_column_tiles, n_processors, macros["MT"], macros["NT"])
    b.add(n, product, min(product.n_tiles, each * n_processors), n_column_tiles, 256,
          product.n * product.x_row if product.staged else 0, macros, **macros, BLOCKS=each,
          STAGED=int(product.staged))  # fmt: skip
    b.widen(product, 0, *others)


def _plain(b: Binder, n: Node) -> bool:
    """Weights of floats that lie as they lie."""
    a, z, t = n.req(0), n.req(1), n.tensor
    if a.type not in PLAIN or z.type not in PLAIN or t.type != F32:
        return False
    i, j = t.src[:2]
    product = PlainProduct(w=b.address(i), w_type=PLAIN.index(GGMLType(a.type)), w_nb=a.nb, repeat2=z.ne[2] // a.ne[2],
                           repeat3=z.ne[3] // a.ne[3], x=b.address(j), x_type=PLAIN.index(GGMLType(z.type)), x_nb=z.nb,
                           y=b.address(n.index), y_nb=t.nb, n=t.ne, k=a.ne[0])  # fmt: skip
    b.add(n, product, ceil_div(t.n_elements, 8))
    return True


@BINDINGS.of("MUL_MAT_ID")
def mul_mat_id(b: Binder, n: Node) -> bool:
    a, z, ids = n.req(0), n.req(1), n.req(2)
    n_experts, n_used, n_tokens = a.ne[2], ids.ne[0], ids.ne[1]
    if ids.nb[0] != 4 or n_experts > MAX_EXPERTS or a.ne[1] % TILE:
        return False
    if z.type != F32 or not z.contiguous or not n.tensor.contiguous:
        return False
    w = _packed(b, n, n.tensor.src[0])
    if w is None:
        return False
    x = _columns(b, n, w.type == BF16)
    assert x is not None  # float32, and contiguous
    n_pairs = n_used * n_tokens
    mt, nt = _tile(ceil_div(n_pairs, n_experts))
    n_tiles = n_pairs // (8 * nt) + min(n_experts, n_pairs)
    pairs, tiles = b.more(4 * n_pairs), b.more(16 * n_tiles)
    route = Route(ids=b.address(n.tensor.src[2]), ids_row=ids.nb[1], n_used=n_used, n_tokens=n_tokens, n_experts=n_experts,
                  n_columns=8 * nt, pairs=pairs, tiles=tiles, n_tiles=n_tiles, status=b.status, node=n.index)  # fmt: skip
    b.add(n, route, 1, 1, 1024)
    each = _blocks(ceil_div(a.ne[1], TILE * mt) * n_tiles, b.driver.facts.n_processors, mt, nt)
    product = ExpertProduct(w=w.at, n_all=w.n_rows, first=0, n_rows=a.ne[1], k=a.ne[0], x=x.at, x_row=x.row, scales=x.scales,
                            n_slots=z.ne[1], n_used=n_used, pairs=pairs, tiles=tiles, y=b.address(n.index),
                            y_row=4 * a.ne[1])  # fmt: skip
    b.add(n, product, ceil_div(a.ne[1], TILE * mt), n_tiles, **_macros(w, a.ne[0], mt, nt),
          BLOCKS=each)
    return True


@BINDINGS.of("GET_ROWS")
def get_rows(b: Binder, n: Node) -> bool:
    """Rows of packed weights; others as they lie."""
    t, ids = n.req(0), n.req(1)
    if not _is_packed(b, t):
        return bool(get_plain_rows(b, n))
    if ids.type != I32 or not n.tensor.contiguous or (ids.ne[0] != ids.n_elements and not ids.contiguous):
        return False
    i, j = n.tensor.src[:2]
    rows = GetWeightRows(w=b.address(i), n_all=t.n_rows, first=0, n_rows=t.ne[1], k=t.ne[0], ids=b.address(j),
                         id_step=ids.nb[0], n=ids.n_elements, y=b.address(n.index), y_row=4 * t.ne[0], status=b.status,
                         node=n.index)  # fmt: skip
    b.add(n, rows, ceil_div(ids.n_elements, 4), min(16, ceil_div(t.ne[0], 8 * CHUNK)), 128, FORMAT=format_of(t.type))
    return True


def _is_packed(b: Binder, t: Tensor) -> bool:
    buffer = b.buffers.get(t.buffer)
    return buffer is not None and t.op == "NONE" and t.offset in buffer.packed and t.ne[2] * t.ne[3] == 1
