"""Bindings of copies, conversions, and rows by index."""

from __future__ import annotations

from dataclasses import replace

from protocol.dtypes import FLOATS, INTEGERS, TYPES, GGMLType
from protocol.graph import Tensor
from workers.devices.bindings import Bindings
from workers.devices.cuda.binding import I32, Binder
from workers.devices.cuda.cells import kept_by_rope, kept_by_rows
from workers.devices.cuda.elements import THREADS, blocks, same
from workers.devices.cuda.strided import Dims, Operand, collapsed, four, operands, separate
from workers.devices.lower import Node
from workers.kernels.cuda.row_launches import (
    Copy,
    CopyBlocks,
    CopyQ8,
    GetBlockRows,
    GetRows,
    Repeat,
    SetRows,
    SetRowsQ8,
    Transpose,
)

BINDINGS = Bindings()
T = GGMLType
UNITS = (16, 8, 4, 2, 1)
BLOCKS = frozenset({
    T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_NL, T.IQ4_XS, T.TQ1_0, T.TQ2_0,
    T.MXFP4, T.NVFP4, T.Q1_0, T.Q2_0,
})  # fmt: skip
"""Types of blocks that kernels read as they lie in a file."""
NUMBERS = FLOATS | INTEGERS
PER_BLOCK = THREADS // 32
"""Blocks of 32 elements that a thread block writes."""
MAX_BLOCKS_Y = 65535
LEAST_TILE = 8
"""Elements along both sides of what is worth a tile of 32 x 32."""


def _in_bytes(o: Operand, ne: Dims) -> tuple[Operand, Dims]:
    """Blocks as their bytes."""
    info = TYPES[o.type]
    return replace(o, size=1, nb=(1, *o.nb[1:])), (ne[0] // info.block * info.bytes, *ne[1:])


def _wider(unit: int, ne: Dims, o: Operand) -> tuple[Dims, Operand]:
    """The same bytes in elements of `unit`, where they lie together."""
    by = unit // o.size
    return (ne[0] // by, *ne[1:]), replace(o, size=unit, nb=(unit, *o.nb[1:]))


def _fits(unit: int, ne: Dims, o: Operand) -> bool:
    return unit == o.size or (
        unit > o.size and (o.nb[0] == o.size or ne[0] == 1) and ne[0] * o.size % unit == 0 and o.aligned(unit, ne)
    )


def _move(b: Binder, n: Node, x: Operand, x_ne: Dims, y: Operand, y_ne: Dims) -> bool:
    """Elements of x to y as they are, in order."""
    if x_ne == y_ne and _transpose(b, n, x, y, x_ne):
        return True
    if x_ne == y_ne:
        x_ne, (x_nb, y_nb) = collapsed(x_ne, [x.nb, y.nb])
        y_ne = x_ne
    else:
        (x_ne, (x_nb,)), (y_ne, (y_nb,)) = collapsed(x_ne, [x.nb]), collapsed(y_ne, [y.nb])
    x, y = replace(x, nb=x_nb), replace(y, nb=y_nb)
    unit = next(u for u in UNITS if _fits(u, x_ne, x) and _fits(u, y_ne, y))
    if unit > x.size:
        (x_ne, x), (y_ne, y) = _wider(unit, x_ne, x), _wider(unit, y_ne, y)
    _copy(b, n, unit, x, x_ne, y, y_ne)
    return True


def _copy(b: Binder, n: Node, unit: int, x: Operand, x_ne: Dims, y: Operand, y_ne: Dims) -> None:
    count = x_ne[0] * x_ne[1] * x_ne[2] * x_ne[3]
    b.add(n, Copy(n=count, unit=unit, x=x.address, x_type=x.type, x_ne=four(x_ne, 1), x_nb=four(x.nb, 0), y=y.address,
                  y_type=y.type,
                  y_ne=four(y_ne, 1), y_nb=four(y.nb, 0)), blocks(count))  # fmt: skip


def _transpose(b: Binder, n: Node, x: Operand, y: Operand, ne: Dims) -> bool:
    """Where elements lie together along different dimensions."""
    ne, (x_nb, y_nb) = collapsed(ne, [x.nb, y.nb])
    i, j = (next((d for d in range(4) if nb[d] == x.size and ne[d] > 1), -1) for nb in (y_nb, x_nb))
    rest = [d for d in range(4) if d not in (i, j)]
    if -1 in (i, j) or i == j or min(ne[i], ne[j]) < LEAST_TILE or ne[rest[0]] * ne[rest[1]] > MAX_BLOCKS_Y or x.size == 1:
        return False
    order = [i, j, *rest]
    of, x_nb, y_nb = (tuple(values[d] for d in order) for values in (ne, x_nb, y_nb))
    b.add(n, Transpose(unit=x.size, x=x.address, x_nb=four(x_nb, 0), y=y.address, y_nb=four(y_nb, 0), ne=four(of, 1)),
          -(-of[0] // 32) * -(-of[1] // 32), of[2] * of[3])  # fmt: skip
    return True


@BINDINGS.of("CPY", "DUP", "CONT")
def copy(b: Binder, n: Node) -> bool:
    i, t, x_t = n.tensor.src[0], n.tensor, n.req(0)
    found = operands(b, i, n.index)
    if found is None or not separate(b, n.index, i, inplace=x_t.type == t.type):
        return False
    x, y = found
    if x_t.type == t.type:
        if TYPES[t.type].quantized:
            (x, x_ne), (y, y_ne) = _in_bytes(x, x_t.ne), _in_bytes(y, t.ne)
            return _move(b, n, x, x_ne, y, y_ne)
        return _move(b, n, x, x_t.ne, y, t.ne)
    if x_t.type in FLOATS and t.type in FLOATS and x_t.ne == t.ne:
        return same(b, n)
    if x_t.type in NUMBERS and t.type in NUMBERS:
        _copy(b, n, 0, x, x_t.ne, y, t.ne)
        return True
    return _copy_blocks(b, n, x, y, x_t, t)


def _copy_blocks(b: Binder, n: Node, x: Operand, y: Operand, x_t: Tensor, t: Tensor) -> bool:
    """From blocks to floats, or from floats to blocks of Q8_0."""
    x_ne, x_nb, y_nb = x_t.ne, four(x.nb, 0), four(y.nb, 0)
    if x_t.type in BLOCKS and t.type in FLOATS:
        b.add(n, CopyBlocks(n=t.n_elements, x=x.address, x_type=x.type, x_ne=x_ne, x_nb=_steps(x, x_t), y=y.address,
                            y_type=y.type,
                            y_ne=t.ne, y_nb=y_nb), blocks(t.n_elements))  # fmt: skip
        return True
    if x_t.type in FLOATS and t.type == T.Q8_0 and y.aligned(2, t.ne):
        count = t.n_elements // 32
        b.add(n, CopyQ8(n=count, x=x.address, x_type=x.type, x_ne=x_ne, x_nb=x_nb, y=y.address, y_ne=(t.ne[0] // 32,
                                                                                                      *t.ne[1:]),
                        y_nb=_steps(y, t)), -(-count // PER_BLOCK))  # fmt: skip
        return True
    return False


def _steps(o: Operand, t: Tensor) -> tuple[int, int, int, int]:
    """Strides of blocks."""
    return four((TYPES[t.type].bytes, *o.nb[1:]), 0)


@BINDINGS.of("REPEAT")
def repeat(b: Binder, n: Node) -> bool:
    i, ne, x_ne = n.tensor.src[0], n.tensor.ne, n.req(0).ne
    found = operands(b, i, n.index)
    if found is None or not separate(b, n.index, i, inplace=False):
        return False
    x, y = found
    if all(m in (1, k) for k, m in zip(ne, x_ne, strict=True)):
        return _move(b, n, x, ne, y, ne)
    b.add(n, Repeat(n=n.tensor.n_elements, unit=x.size, x=x.address, x_ne=x_ne, x_nb=four(x.nb, 0), y=y.address, ne=ne,
                    y_nb=four(y.nb, 0)), blocks(n.tensor.n_elements))  # fmt: skip
    return True


@BINDINGS.of("CONCAT")
def concat(b: Binder, n: Node) -> bool:
    """Each source to its part of the result."""
    i, j = n.tensor.src
    found, dim = operands(b, i, j, n.index), n.params["dim"]
    if found is None or not separate(b, n.index, i, j, inplace=False):
        return False
    x, z, y = found
    x_ne, z_ne = n.req(0).ne, n.req(1).ne
    return _move(b, n, x, x_ne, y, x_ne) and _move(b, n, z, z_ne, y.at(x_ne[dim] * y.nb[dim]), z_ne)


# -- rows by index -----------------------------------------------------------------------------------------------------


def get_plain_rows(b: Binder, n: Node) -> bool:
    """GET_ROWS of numbers, and of blocks as they lie in a file."""
    i, j = n.tensor.src
    t, found = n.req(0), operands(b, i, j, n.index)
    if found is None or not separate(b, n.index, i, j,
                                     inplace=False) or not (t.type in FLOATS or t.type in BLOCKS or t.type == I32):
        return False
    x, ids, y = found
    ne, kind = n.tensor.ne, GetBlockRows if t.type in BLOCKS else GetRows
    width = 4 if t.type in FLOATS and x.in_fours((ne[0], *t.ne[1:])) and y.in_fours(ne) else 1
    x_nb = _steps(x, t) if t.type in BLOCKS else four((width * x.nb[0], *x.nb[1:]), 0)
    b.add(n, kind(n=n.tensor.n_elements // width, width=width, ne=(ne[0] // width, *ne[1:]), x=x.address, x_type=x.type,
                  x_nb=x_nb,
                  ids=ids.address, ids_ne=n.req(1).ne, ids_nb=four(ids.nb, 0), id_bytes=4, n_all=t.ne[1], y=y.address,
                  y_type=y.type,
                  y_nb=four((width * y.nb[0], *y.nb[1:]), 0), status=b.status, node=n.index),
          blocks(n.tensor.n_elements // width))  # fmt: skip
    return True


@BINDINGS.of("SET_ROWS")
def set_rows(b: Binder, n: Node) -> bool:
    i, j = n.tensor.src[:2]
    t, x_t, found = n.tensor, n.req(0), operands(b, i, j, n.index)
    if 0 in x_t.ne:
        return True
    if found is None or not separate(b, n.index, i, j, inplace=False):
        return False
    if kept_by_rope(b, n):
        return True
    x, ids, y = found
    packs = t.type == T.Q8_0 and y.aligned(2, t.ne)
    if not packs and t.type not in FLOATS:
        return False
    ne, kind = x_t.ne, SetRowsQ8 if packs else SetRows
    width = 4 if not packs and x.in_fours(ne) and y.in_fours((ne[0], *t.ne[1:])) else 1
    each = 32 if packs else width
    count = x_t.n_elements // each
    rows = kind(
        n=count, width=width, ne=(ne[0] // each, *ne[1:]), x=x.address, x_type=x.type,
        x_nb=four((width * x.nb[0], *x.nb[1:]), 0), ids=ids.address, ids_ne=n.req(1).ne, ids_nb=four(ids.nb, 0),
        id_bytes=ids.size, n_all=t.ne[1], y=y.address, y_type=y.type,
        y_nb=_steps(y, t) if packs else four((width * y.nb[0], *y.nb[1:]), 0), status=b.status, node=n.index,
    )  # fmt: skip
    if not kept_by_rows(b, n, rows):
        b.add(n, rows, -(-count // PER_BLOCK) if packs else blocks(count))
    return True
