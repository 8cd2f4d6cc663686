"""Bindings of products, and of rows of their weights."""

from __future__ import annotations

from typing import NamedTuple

from protocol.dtypes import TYPES, GGMLType, row_bytes
from protocol.graph import Tensor
from workers.devices.bindings import Bindings
from workers.devices.cpu.binding import F16, F32, I32, Binder
from workers.devices.cpu.program import PART_COST
from workers.devices.lower import SCRATCH, Node, Span
from workers.kernels import layout, steps
from workers.kernels.costs import of_products

BINDINGS = Bindings()

LEAST_COLUMNS = 64
"""A product is not several of fewer columns: each unpacks the weights."""


class Matrix(NamedTuple):
    """Weights as products read them: kind, address, bytes of a row, and how many rows of each matrix are packed."""

    kind: int
    at: int
    row_bytes: int
    n_packed: int

    @property
    def quantized(self) -> bool:
        return self.kind < layout.N_QUANTIZED


class Columns(NamedTuple):
    """What a product reads of its second source: address, bytes of a column, and all their bytes."""

    at: int
    n_bytes: int
    span: Span


def _matrix(b: Binder, i: int) -> Matrix | None:
    t = b.tensors[i]
    if not t.contiguous:
        return None
    kind, buffer = layout.KIND_OF.get(GGMLType(t.type)), b.buffers.get(t.buffer)
    if kind is None:
        wide = b.weights.widened(buffer, t, b.tick)
        return None if wide is None else Matrix(layout.KIND_OF[F16], wide[0], 2 * t.ne[0], wide[1])
    packed = t.op == "NONE" and buffer is not None and t.offset in buffer.packed
    return Matrix(kind, b.address(i), row_bytes(t.type, t.ne[0]), t.ne[1] // layout.GROUP * layout.GROUP if packed else 0)


def _columns(b: Binder, n: Node, quantized: bool) -> Columns | None:
    """Columns of source 1; those of quantised weights are quantised first, once for all products that read them."""
    j, t = n.tensor.src[1], n.req(1)
    if t.type != F32 or not t.contiguous:
        return None
    k = t.ne[0]
    if not quantized:
        place = b.place(j)
        return Columns(b.address(j), 4 * k, Span(place.buffer, place.start, place.start + 4 * k * t.n_rows))
    column_bytes = k // 32 * layout.X_BLOCK
    n_bytes = column_bytes * t.n_rows
    place, fresh = b.scratch.columns(j, n_bytes)
    span = Span(SCRATCH, place.start, place.start + n_bytes)
    at = b.memory.address(span)
    if fresh:
        b.program.add(n, steps.Quantize(x=b.address(j), x_row=4 * k, n=t.n_rows, k=k, y=at), [b.place(j)], [span])
    return Columns(at, column_bytes, span)


def _operands(b: Binder, n: Node) -> tuple[Matrix, Columns] | None:
    """What products and products by experts have in common."""
    a = n.req(0)
    if not n.tensor.contiguous or n.tensor.type != F32 or a.ne[0] % TYPES[a.type].block:
        return None
    w = _matrix(b, n.tensor.src[0])
    if w is None or (w.quantized and a.ne[0] % 32):
        return None
    x = _columns(b, n, w.quantized)
    return None if x is None else (w, x)


@BINDINGS.of("MUL_MAT")
def mul_mat(b: Binder, n: Node) -> bool:
    operands = _operands(b, n)
    if operands is None:
        return False
    (w, x), a, z, y = operands, n.req(0), n.req(1), b.address(n.index)
    reads, result = [x.span, b.place(n.tensor.src[0])], b.place(n.index)
    one = a.ne[2] * a.ne[3] == 1
    n_columns, n_batches = (z.n_rows, 1) if one else (z.ne[1], z.ne[2] * z.ne[3])
    column_bytes = 4 * a.ne[1]
    size = _together(w, a.ne[0], n_columns)
    b.need(layout.product_scratch_bytes(w.row_bytes, size))
    r2, r3 = z.ne[2] // a.ne[2], z.ne[3] // a.ne[3]
    for batch in range(n_batches):
        matrix = 0 if one else batch // z.ne[2] // r3 * a.ne[2] + batch % z.ne[2] // r2
        for first in range(0, n_columns, size):
            at, columns = batch * n_columns + first, min(size, n_columns - first)
            start = result.start + column_bytes * at
            step = steps.MulMat(kind=w.kind, w=w.at + matrix * a.ne[1] * w.row_bytes, row_bytes=w.row_bytes,
                                n_rows=a.ne[1], n_packed=w.n_packed, k=a.ne[0], x=x.at + at * x.n_bytes, x_bytes=x.n_bytes,
                                y=y + column_bytes * at, y_bytes=column_bytes, n=columns)  # fmt: skip
            b.program.add(n, step, reads, [Span(result.buffer, start, start + column_bytes * columns)])
    return True


def _together(w: Matrix, k: int, n_columns: int) -> int:
    """How many columns one step takes: so few that a thread is soon done with a group of rows, the least that it does."""
    return min(n_columns, max(LEAST_COLUMNS, PART_COST // (layout.GROUP * k * of_products(w.kind)) // 64 * 64))


@BINDINGS.of("MUL_MAT_ID")
def mul_mat_id(b: Binder, n: Node) -> bool:
    a, z, ids = n.req(0), n.req(1), n.req(2)
    if ids.nb[0] != 4 or ids.ne[2] * ids.ne[3] != 1 or z.ne[3] != 1:
        return False
    operands = _operands(b, n)
    if operands is None:
        return False
    (w, x), i, c = operands, n.tensor.src[0], n.tensor.src[2]
    b.need(layout.product_scratch_bytes(w.row_bytes, ids.ne[0] * ids.ne[1]) + 8 * a.ne[2])
    step = steps.MulMatId(kind=w.kind, w=w.at, row_bytes=w.row_bytes, n_rows=a.ne[1], n_packed=w.n_packed, k=a.ne[0],
                          x=x.at, x_bytes=x.n_bytes, y=b.address(n.index), y_bytes=4 * a.ne[1], n_experts=a.ne[2],
                          n_slots=z.ne[1], ids=b.address(c), ids_row=ids.nb[1], n_used=ids.ne[0], n_tokens=ids.ne[1],
                          node=n.index)  # fmt: skip
    b.program.add(n, step, [x.span, b.place(i), b.place(c)], [b.place(n.index)])
    return True


@BINDINGS.of("GET_ROWS")
def get_rows(b: Binder, n: Node) -> bool:
    """Rows of packed weights, and of float32."""
    x, ids = n.req(0), n.req(1)
    if not n.tensor.contiguous or ids.type != I32 or n.tensor.type != F32:
        return False
    if _is_packed(b, x):
        return _get_packed_rows(b, n, x, ids)
    if x.type != F32 or x.nb[0] != 4 or x.ne[3] != 1 or ids.ne[2] * ids.ne[3] != 1 or x.ne[2] != ids.ne[1]:
        return False
    i, j = n.tensor.src[:2]
    b.add(n, steps.GetRows(x=b.address(i), x_row=x.nb[1], x_plane=x.nb[2], n_x=x.ne[1], n=x.ne[0], ids=b.address(j),
                           id_step=ids.nb[0], id_row=ids.nb[1], y=b.address(n.index), n_ids=ids.ne[0],
                           n_planes=ids.ne[1], node=n.index))  # fmt: skip
    return True


def _is_packed(b: Binder, t: Tensor) -> bool:
    buffer = b.buffers.get(t.buffer)
    return buffer is not None and t.op == "NONE" and t.offset in buffer.packed and t.ne[2] * t.ne[3] == 1


def _get_packed_rows(b: Binder, n: Node, x: Tensor, ids: Tensor) -> bool:
    w = _matrix(b, n.tensor.src[0])
    if w is None or (ids.ne[0] != ids.n_elements and not ids.contiguous):
        return False
    b.need(layout.product_scratch_bytes(w.row_bytes, 0))
    b.add(n, steps.GetPackedRows(kind=w.kind, w=w.at, row_bytes=w.row_bytes, n_rows=x.ne[1], n_packed=w.n_packed,
                                 n=x.ne[0], ids=b.address(n.tensor.src[1]), id_step=ids.nb[0], n_ids=ids.n_elements,
                                 y=b.address(n.index), node=n.index))  # fmt: skip
    return True
