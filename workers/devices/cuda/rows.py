"""Bindings of rows: norms, sums, softmax. `BINDINGS` has those of elements, of indices that order, and of copies as well."""

from __future__ import annotations

import math

from workers.devices.bindings import Bindings
from workers.devices.cuda import elements, moves, sorts
from workers.devices.cuda.binding import F32, Binder
from workers.devices.cuda.elements import arithmetic
from workers.devices.cuda.moves import get_plain_rows
from workers.devices.cuda.strided import four, operand, operands, row_threads, separate
from workers.devices.lower import Node
from workers.kernels.cuda.launches import NOTHING
from workers.kernels.cuda.row_launches import NORMS, AddId, Binary, CumSum, Norm, SoftMax, SumRows

__all__ = ["BINDINGS", "get_plain_rows"]

BINDINGS = Bindings({**elements.BINDINGS, **sorts.BINDINGS, **moves.BINDINGS})


def _norm(b: Binder, n: Node, result: Node, *factors: int) -> bool:
    """A norm, then times one tensor and plus another, whose rows may be repeated."""
    i, ne = n.tensor.src[0], n.tensor.ne
    found = operands(b, i, result.index, *factors)
    if found is None or not separate(b, result.index, i, *factors):
        return False
    shapes = [b.tensors[j].ne for j in factors]
    if any(s[0] != ne[0] or any(m not in (1, k) for k, m in zip(ne, s, strict=True)) for s in shapes):
        return False
    more = [*((o.address, four(o.nb, 0)) for o in found[2:]), *[(0, NOTHING)] * 2]
    x, y, (w, w_nb), (z, z_nb) = found[0], found[1], *more[:2]
    vector = all(o.in_fours(ne) for o in found)
    at, plus, total = x.address, 0, 0
    add = _sum_before(b, n, result, vector, *factors)
    if add is not None:
        at, plus, total = add.x, add.z, add.y
        b.steps.pop()
    argument = Norm(
        x=at, ne=ne, x_nb=four(x.nb, 0), plus=plus, sum=total, y=y.address, y_nb=four(y.nb, 0), vector=vector,
        kind=NORMS.index(n.op.name), eps=n.params["eps"], w=w, w_nb=w_nb, w_stays=bool(factors) and b.stays(factors[0]), z=z,
        z_nb=z_nb,
    )  # fmt: skip
    b.add(n, argument, n.tensor.n_rows, 1, row_threads(ne[0]))
    return True


def _sum_before(b: Binder, n: Node, result: Node, vector: bool, *factors: int) -> Binary | None:
    """The ADD right before this whose result the norm is of, where the norm's kernel can carry it out as well: its threads
    read an element of each before they write it."""
    add, i, x = b.last(Binary), n.tensor.src[0], n.req(0)
    if add is None or add.title() != "ADD" or add.wraps or {add.x_type, add.y_type, add.z_type} != {F32}:
        return None
    in_order = add.ne[1:] == (1, 1, 1) and all(nb[0] == 4 * add.width for nb in (add.x_nb, add.y_nb, add.z_nb))
    if not in_order or not x.contiguous or add.y != b.address(i) or add.n * add.width != x.n_elements:
        return None
    if (vector and add.width == 1) or any(b.lowered.places[j].meets(b.lowered.places[i]) for j in factors):
        return None
    y, place = b.address(result.index), b.lowered.places[result.index]
    n_bytes, alike = place.end - place.start, result.tensor.contiguous
    apart = (at + 4 * x.n_elements <= y or y + n_bytes <= at or (at == y and alike) for at in (add.x, add.z))
    return add if all(apart) else None


@BINDINGS.of(*NORMS)
def norm(b: Binder, n: Node) -> bool:
    return _norm(b, n, n)


def norm_times(b: Binder, n: Node, mul: Node) -> bool:
    """With the MUL by weights behind it."""
    return mul.req(1).type == n.tensor.type and _norm(b, n, mul, mul.tensor.src[1])


def norm_times_plus(b: Binder, n: Node, mul: Node, add: Node) -> bool:
    """With an ADD behind that, of a bias or of what goes past a layer."""
    same = mul.req(1).type == add.req(1).type == n.tensor.type
    if same and _norm(b, n, add, mul.tensor.src[1], add.tensor.src[1]):
        return True
    before = list(b.steps)
    if norm_times(b, n, mul) and arithmetic(b, add):
        return True
    b.steps[:] = before
    return False


for _name in ("NORM", "RMS_NORM"):
    BINDINGS.of_neighbours(_name, "MUL")(norm_times)
    BINDINGS.of_neighbours(_name, "MUL", "ADD")(norm_times_plus)


def _sums(b: Binder, n: Node, result: Node, low: float, high: float) -> bool:
    i, x = n.tensor.src[0], n.req(0)
    found = operands(b, i, result.index)
    if found is None or not separate(b, result.index, i, inplace=False):
        return False
    o, y = found
    b.add(n, SumRows(x=o.address, ne=x.ne, x_nb=four(o.nb, 0), y=y.address, y_nb=four(y.nb, 0), vector=o.in_fours(x.ne),
                     mean=n.op.name == "MEAN", low=low, high=high), x.n_rows, 1, row_threads(x.ne[0]))  # fmt: skip
    return True


@BINDINGS.of("SUM_ROWS", "MEAN")
def sum_rows(b: Binder, n: Node) -> bool:
    return _sums(b, n, n, -math.inf, math.inf)


@BINDINGS.of_neighbours("SUM_ROWS", "CLAMP")
def sum_rows_clamped(b: Binder, n: Node, clamp: Node) -> bool:
    """What the weights of experts are divided by."""
    return _sums(b, n, clamp, clamp.params["low"], clamp.params["high"])


@BINDINGS.of("CUMSUM")
def cumsum(b: Binder, n: Node) -> bool:
    i, ne = n.tensor.src[0], n.tensor.ne
    found = operands(b, i, n.index)
    if found is None or not separate(b, n.index, i):
        return False
    x, y = found
    threads = next((size for size in (32, 128, 512) if ne[0] <= size), 1024)
    b.add(n, CumSum(x=x.address, ne=ne, x_nb=four(x.nb, 0), y=y.address, y_nb=four(y.nb, 0), vector=False), n.tensor.n_rows,
          1,
          threads)  # fmt: skip
    return True


@BINDINGS.of("SOFT_MAX")
def soft_max(b: Binder, n: Node) -> bool:
    i, ne = n.tensor.src[0], n.tensor.ne
    j, k = ((*n.tensor.src, -1, -1)[at] for at in (1, 2))
    found, mask, sinks = operands(b, i, n.index), operand(b, j) if j >= 0 else None, operand(b, k) if k >= 0 else None
    if found is None or (mask is None) != (j < 0) or (sinks is None) != (k < 0):
        return False
    if not separate(b, n.index, i) or not separate(b, n.index, j, k, inplace=False):
        return False
    x, y = found
    b.add(n, SoftMax(
        x=x.address, ne=ne, x_nb=four(x.nb, 0), y=y.address, y_nb=four(y.nb, 0), vector=x.in_fours(ne) and y.in_fours(ne),
        scale=n.params["scale"], mask=mask.address if mask else 0, mask_type=mask.type if mask else 0,
        mask_ne=n.req(1).ne if mask else ne, mask_nb=four(mask.nb, 0) if mask else NOTHING,
        n_log2=1 << (ne[2].bit_length() - 1), max_bias=n.params["max_bias"], sinks=sinks.address if sinks else 0,
        sinks_step=sinks.nb[0] if sinks else 0), n.tensor.n_rows, 1, row_threads(ne[0]))  # fmt: skip
    return True


@BINDINGS.of("ADD_ID")
def add_id(b: Binder, n: Node) -> bool:
    i, j, k = n.tensor.src
    ne, found = n.tensor.ne, operands(b, i, j, k, n.index)
    if found is None or not separate(b, n.index, i) or not separate(b, n.index, j, k, inplace=False):
        return False
    x, z, ids, y = found
    b.add(n, AddId(x=x.address, ne=ne, x_nb=four(x.nb, 0), y=y.address, y_nb=four(y.nb, 0),
                   vector=x.in_fours(ne) and y.in_fours(ne),
                   z=z.address, z_nb=four(z.nb, 0), n_z=n.req(1).ne[1], ids=ids.address, ids_nb=four(ids.nb, 0),
                   status=b.status,
                   node=n.index), n.tensor.n_rows, 1, row_threads(ne[0]))  # fmt: skip
    return True
