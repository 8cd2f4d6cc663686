"""Bindings of the ops that take rows: elementwise, norms, copies, rows by index."""

from __future__ import annotations

from protocol.dtypes import GGMLType
from protocol.ops import OPS
from workers.devices.bindings import Bindings
from workers.devices.cpu.binding import F16, F32, I32, Binder, Rows
from workers.devices.lower import Node
from workers.kernels import layout, steps

BINDINGS = Bindings()


@BINDINGS.of(*(name for name in steps.FUNCTIONS if name in OPS))
def function(b: Binder, n: Node) -> bool:
    """A function of elements; one of the GLU family has both sources in the halves of one, or two."""
    f = steps.FUNCTIONS[n.op.name]
    if "swapped" not in n.params or n.opt(1) is not None:
        return _elementwise(b, n, n.op.name, f.n_sources - 1)
    half = 4 * n.tensor.ne[0]
    return _elementwise(b, n, n.op.name, 0, (half, 0) if n.params["swapped"] else (0, half))


def _elementwise(b: Binder, n: Node, name: str, second: int = 0, offsets: tuple[int, int] = (0, 0)) -> bool:
    """y = f(x, z) over rows; z is source `second` with the rows of x, rows that repeat, or an element a row."""
    i, j = n.tensor.src[0], n.tensor.src[second]
    x, z, y = b.rows(i), b.rows(j), b.rows(n.index)
    if x is None or z is None or y is None or x.n_rows != y.n_rows:
        return False
    tx, tz = b.tensors[i], b.tensors[j]
    kind = steps.FUNCTION_CODE[name]
    if tz.ne in ((1, *tx.ne[1:]), (1, tx.ne[1], 1, 1)) and name in steps.BY_ROW and tx.ne[0] > 1:
        b.add(n, steps.ByRow(kind=kind, x=x.at, x_row=x.row, z=z.at, z_step=z.row, n_z=z.n_rows, y=y.at, y_row=y.row,
                             n_rows=y.n_rows, n=y.n))  # fmt: skip
        return True
    same = second == 0 or tx.ne == tz.ne
    if not same and (tz.ne[0] != tx.ne[0] or (tz.n_rows != 1 and tz.ne[1:] != (tx.ne[1], 1, 1))):
        return False
    params = {f"p{at}": n.params[param] for at, param in enumerate(steps.FUNCTIONS[name].params)}
    b.add(n, steps.Elementwise(kind=kind, x=x.at + offsets[0], x_row=x.row, z=z.at + offsets[1], z_row=z.row,
                               z_rows=z.n_rows, y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n, **params))  # fmt: skip
    return True


@BINDINGS.of("ARANGE")
def arange(b: Binder, n: Node) -> bool:
    if n.tensor.type != F32 or not n.tensor.contiguous:
        return False
    b.add(n, steps.Arange(start=n.params["start"], step=n.params["step"], n=n.tensor.n_elements, y=b.address(n.index)))
    return True


@BINDINGS.of("REPEAT")
def repeat(b: Binder, n: Node) -> bool:
    """One row, again and again."""
    x, y = b.rows(n.tensor.src[0]), b.rows(n.index)
    if x is None or y is None or x.n_rows != 1 or x.n != y.n:
        return False
    b.add(n, steps.Elementwise(kind=steps.FUNCTION_CODE["SAME"], x=x.at, x_row=0, z=x.at, z_row=0, z_rows=1, y=y.at,
                               y_row=y.row, n_rows=y.n_rows, n=y.n))  # fmt: skip
    return True


@BINDINGS.of("DUP", "CONT")
def dup(b: Binder, n: Node) -> bool:
    """Float rows to float rows of the same length, in the same or the other type."""
    kinds = GGMLType(n.req(0).type), GGMLType(n.tensor.type)
    if kinds not in ((F32, F32), (F32, F16), (F16, F32)):
        return False
    x, y = b.rows(n.tensor.src[0], kinds[0]), b.rows(n.index, kinds[1])
    if x is None or y is None or not x.alike(y):
        return False
    if kinds == (F32, F32):
        return _elementwise(b, n, "SAME")
    convert = steps.Narrow if kinds[0] == F32 else steps.Widen
    b.add(n, convert(x=x.at, x_row=x.row, y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n))
    return True


def _alike(b: Binder, n: Node) -> tuple[Rows, Rows] | None:
    """Source and result of an op that makes of each row another of its length."""
    x, y = b.rows(n.tensor.src[0]), b.rows(n.index)
    return None if x is None or y is None or not x.alike(y) else (x, y)


@BINDINGS.of("SOFT_MAX")
def soft_max(b: Binder, n: Node) -> bool:
    rows = _alike(b, n)
    if rows is None or any(j >= 0 for j in n.tensor.src[1:]):
        return False
    x, y = rows
    b.add(n, steps.SoftMax(x=x.at, x_row=x.row, y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n, scale=n.params["scale"]))
    return True


@BINDINGS.of("NORM")
def norm(b: Binder, n: Node) -> bool:
    rows = _alike(b, n)
    if rows is None:
        return False
    x, y = rows
    b.add(n, steps.Norm(x=x.at, x_row=x.row, y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n, eps=n.params["eps"]))
    return True


@BINDINGS.of("RMS_NORM")
def rms_norm(b: Binder, n: Node) -> bool:
    rows = _alike(b, n)
    if rows is None:
        return False
    x, y = rows
    b.add(n, steps.RmsNorm(x=x.at, x_row=x.row, w=0, y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n, eps=n.params["eps"]))
    return True


@BINDINGS.of_neighbours("RMS_NORM", "MUL")
def rms_norm_scaled(b: Binder, n: Node, mul: Node) -> bool:
    """With the MUL by a row of weights behind it."""
    rows, w, out = _alike(b, n), b.rows(mul.tensor.src[1]), b.rows(mul.index)
    if rows is None or w is None or out is None or w.n_rows != 1 or w.n != rows[1].n:
        return False
    x = rows[0]
    step = steps.RmsNorm(x=x.at, x_row=x.row, w=w.at, y=out.at, y_row=out.row, n_rows=out.n_rows, n=out.n,
                         eps=n.params["eps"])  # fmt: skip
    b.program.add(n, step, [b.place(n.tensor.src[0]), b.place(mul.tensor.src[1])], [b.place(mul.index)])
    return True


def _reduced(b: Binder, n: Node, make: type[steps.RowToFew], **more: int) -> bool:
    """An op that makes a few numbers of each row, which lie one row's behind the other's."""
    x = b.rows(n.tensor.src[0])
    if x is None or not n.tensor.contiguous:
        return False
    b.add(n, make(x=x.at, x_row=x.row, n_rows=x.n_rows, n=x.n, y=b.address(n.index), **more))
    return True


@BINDINGS.of("TOP_K")
def top_k(b: Binder, n: Node) -> bool:
    return n.tensor.ne[0] <= layout.MAX_TOP and _reduced(b, n, steps.TopK, n_top=n.tensor.ne[0])


@BINDINGS.of("SUM_ROWS")
def sum_rows(b: Binder, n: Node) -> bool:
    return _reduced(b, n, steps.SumRows)


@BINDINGS.of("ARGMAX")
def argmax(b: Binder, n: Node) -> bool:
    return n.tensor.type == I32 and _reduced(b, n, steps.Argmax)


@BINDINGS.of("ADD_ID")
def add_id(b: Binder, n: Node) -> bool:
    i, j, c = n.tensor.src[:3]
    x, z, y, ids = b.rows(i), b.rows(j), b.rows(n.index), n.req(2)
    if x is None or z is None or y is None or ids.nb[0] != 4 or ids.ne[2] * ids.ne[3] != 1:
        return False
    if x.n != z.n or x.n_rows != ids.ne[0] * ids.ne[1] or not x.alike(y):
        return False
    b.add(n, steps.AddId(x=x.at, x_row=x.row, z=z.at, z_row=z.row, n_z=z.n_rows, ids=b.address(c), ids_row=ids.nb[1],
                         n_used=ids.ne[0], y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n, node=n.index))  # fmt: skip
    return True
