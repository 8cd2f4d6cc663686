"""Bindings of functions of elements."""

from __future__ import annotations

from protocol.dtypes import FLOATS
from protocol.ops import GLU_KINDS, OPS
from workers.devices.bindings import Bindings
from workers.devices.cuda.binding import F32, Binder, ceil_div
from workers.devices.cuda.strided import Flat, Operand, alike, flat, four, operand, operands, row_threads, separate, threads
from workers.devices.lower import Node
from workers.kernels.cuda.row_launches import BINARY, UNARY, AddTerms, Binary, CountUp, DiagMask, Gate, Unary

BINDINGS = Bindings()
THREADS = 256
MAX_TERMS = 16
"""Of neighbours that are sums."""
MAX_GATED = 1 << 16
"""Elements of a row that one block makes."""


def blocks(n: int) -> int:
    return ceil_div(n, THREADS)


def _parameters(values: list[float], n: int) -> dict[str, float]:
    return {f"p{i}": float(v) for i, v in enumerate([*values, *[0.0] * n][:n])}


@BINDINGS.of(*(name for name in UNARY if name in OPS))
def unary(b: Binder, n: Node) -> bool:
    return _unary(b, n, n.op.name, list(n.params.values()))


def same(b: Binder, n: Node) -> bool:
    """Floats of another type."""
    return _unary(b, n, "SAME", [])


def _unary(b: Binder, n: Node, name: str, values: list[float]) -> bool:
    i = n.tensor.src[0]
    found = operands(b, i, n.index)
    if found is None or not separate(b, n.index, i):
        return False
    x, y = found
    f = flat(n.tensor.ne, [x, y])
    b.add(n, Unary(n=f.n, ne=f.ne, width=f.width, x=x.address, x_type=x.type, x_nb=f.nb[0], y=y.address, y_type=y.type,
                   y_nb=f.nb[1],
                   kind=UNARY.index(name), **_parameters(values, 4)), blocks(f.n))  # fmt: skip
    return True


@BINDINGS.of(*GLU_KINDS)
def glu(b: Binder, n: Node) -> bool:
    i, gate = n.tensor.src[0], n.opt(1)
    j = n.tensor.src[1] if gate is not None else i
    found = operands(b, i, j, n.index)
    if found is None or not separate(b, n.index, i, j, inplace=gate is not None):
        return False
    x, z, y = found
    if gate is None:
        half = n.tensor.ne[0] * n.req(0).nb[0]
        x, z = (x.at(half), z) if n.params["swapped"] else (x, z.at(half))
    values = [n.params.get("alpha", 0.0), n.params.get("limit", 0.0)]
    return _gate(b, n, x, z, y, values) or _binary(b, n, x, z, y, flat(n.tensor.ne, [x, z, y]), values)


def _gate(b: Binder, n: Node, x: Operand, z: Operand, y: Operand, values: list[float]) -> bool:
    """A block for each row, where products read the result: it makes their columns as well."""
    ne, kind = n.tensor.ne, BINARY.index(n.op.name)
    fits = all(o.type == F32 and o.in_fours(ne) for o in (x, z, y))
    if not fits or ne[0] > MAX_GATED or not b.lowered.n_products[n.index]:
        return False
    gate = Gate(kind=kind, x=x.address, ne=ne, x_nb=four(x.nb, 0), z=z.address, z_nb=four(z.nb, 0), y=y.address,
                y_nb=four(y.nb, 0), p0=values[0], p1=values[1])  # fmt: skip
    b.add(n, gate, n.tensor.n_rows, 1, row_threads(ne[0]), KIND=kind)
    return True


@BINDINGS.of("ADD", "SUB", "MUL", "DIV")
def arithmetic(b: Binder, n: Node) -> bool:
    i, j = n.tensor.src[:2]
    found = operands(b, i, j, n.index)
    if found is None or not separate(b, n.index, i, j):
        return False
    x, z, y = found
    ne, z_ne = n.tensor.ne, n.req(1).ne
    if all(m in (1, k) for k, m in zip(ne, z_ne, strict=True)):
        return _binary(b, n, x, z, y, _swapped(flat(ne, [x, y], [z])), [])
    f = threads(ne, [x, y, z], 2)
    if z_ne[0] % 4 and z.nb[0]:
        f = Flat(n.tensor.n_elements, 1, ne, (four(x.nb, 0), four(y.nb, 0), four(z.nb, 0)))
    wrapped = four((max(1, z_ne[0] // f.width), *z_ne[1:]), 1)
    return _binary(b, n, x, z, y, _swapped(f), [], wrapped)


def _swapped(f: Flat) -> Flat:
    """With the strides of x, z, y instead of x, y, z."""
    return Flat(f.n, f.width, f.ne, (f.nb[0], f.nb[2], f.nb[1]))


def _binary(
    b: Binder, n: Node, x: Operand, z: Operand, y: Operand, f: Flat, values: list[float],
    wrapped: tuple[int, int, int, int] | None = None,
) -> bool:  # fmt: skip
    b.add(n, Binary(n=f.n, ne=f.ne, width=f.width, x=x.address, x_type=x.type, x_nb=f.nb[0], z=z.address, z_type=z.type,
                    z_nb=f.nb[1], y=y.address, y_type=y.type, y_nb=f.nb[2], z_ne=wrapped or f.ne, wraps=wrapped is not None,
                    kind=BINARY.index(n.op.name), **_parameters(values, 2)), blocks(f.n))  # fmt: skip
    return True


def add_terms(b: Binder, *nodes: Node) -> bool:
    """Sums of tensors that lie in equal steps, as the shares of experts do, and of up to two others."""
    last, t = nodes[-1], nodes[-1].tensor
    terms = [nodes[0].tensor.src[0], *(n.tensor.src[1] for n in nodes)]
    tensors = [b.tensors[i] for i in terms]
    found = operands(b, *terms, last.index)
    whole = all(m in (1, k) for other in tensors for k, m in zip(t.ne, other.ne, strict=True))
    if found is None or not whole or any(o.type != F32 for o in found) or tensors[0].ne != t.ne:
        return False
    if not separate(b, last.index, *terms):
        return False
    at = [o.address for o in found]
    step, n_terms = at[1] - at[0], 1
    while n_terms < len(terms) and at[n_terms] == at[0] + n_terms * step and alike(tensors[n_terms], tensors[0]):
        n_terms += 1
    n_terms = n_terms if step % 16 == 0 else 1
    more = found[n_terms:-1]
    if len(more) > 2:
        return False
    f = flat(t.ne, [found[0], found[-1]], more)
    others = [*((o.address, nb) for o, nb in zip(more, f.nb[2:], strict=True)), *[(0, (0, 0, 0, 0))] * 2]
    (z, z_nb), (w, w_nb) = others[:2]
    b.add(last, AddTerms(n=f.n, ne=f.ne, width=f.width, x=at[0], x_type=F32, x_nb=f.nb[0], y=at[-1], y_type=F32,
                         y_nb=f.nb[1],
                         step=step, n_terms=n_terms, z=z, z_nb=z_nb, w=w, w_nb=w_nb), blocks(f.n))  # fmt: skip
    return True


for _n in range(2, MAX_TERMS):
    BINDINGS.of_neighbours(*["ADD"] * _n)(add_terms)


@BINDINGS.of("FILL")
def fill(b: Binder, n: Node) -> bool:
    return _count_up(b, n, n.params["c"], 0.0)


@BINDINGS.of("ARANGE")
def arange(b: Binder, n: Node) -> bool:
    return _count_up(b, n, n.params["start"], n.params["step"])


def _count_up(b: Binder, n: Node, start: float, step: float) -> bool:
    y = operand(b, n.index)
    if y is None or n.tensor.type not in FLOATS:
        return False
    b.add(n, CountUp(n=n.tensor.n_elements, ne=n.tensor.ne, width=1, y=y.address, y_type=y.type, y_nb=four(y.nb, 0),
                     start=start,
                     step=step), blocks(n.tensor.n_elements))  # fmt: skip
    return True


@BINDINGS.of("DIAG_MASK_INF")
def diag_mask(b: Binder, n: Node) -> bool:
    i = n.tensor.src[0]
    found = operands(b, i, n.index)
    if found is None or not separate(b, n.index, i):
        return False
    x, y = found
    b.add(n, DiagMask(n=n.tensor.n_elements, ne=n.tensor.ne, width=1, x=x.address, x_type=F32, x_nb=four(x.nb, 0),
                      y=y.address,
                      y_type=F32, y_nb=four(y.nb, 0), n_past=n.params["n_past"]), blocks(n.tensor.n_elements))  # fmt: skip
    return True
