"""Bindings of ops that give indices: the largest of a row, the k largest, all in order."""

from __future__ import annotations

from typing import Any

from workers.devices.bindings import Bindings
from workers.devices.cuda.binding import Binder, ceil_div
from workers.devices.cuda.strided import four, operands, separate
from workers.devices.lower import Node
from workers.kernels.cuda import row_launches as launches
from workers.kernels.cuda.row_launches import ARGMAX_PART, MAX_PARTS, MAX_TOP, SORTED, TOP_PART, top_room

BINDINGS = Bindings()
MAX_BLOCKS_Y = 65535
THREADS = 256


def _ordered(b: Binder, n: Node) -> dict[str, Any] | None:
    """The fields of `Ordered`."""
    found, x = operands(b, n.tensor.src[0], n.index), n.req(0)
    if found is None or not separate(b, n.index, n.tensor.src[0], inplace=False):
        return None
    if x.ne[0] > MAX_BLOCKS_Y * min(SORTED, ARGMAX_PART, THREADS):
        return None
    return {"x": found[0].address, "ne": x.ne, "x_nb": four(found[0].nb, 0), "y": found[1].address,
            "y_nb": four(found[1].nb, 0)}


@BINDINGS.of("ARGMAX")
def argmax(b: Binder, n: Node) -> bool:
    fields, x = _ordered(b, n), n.req(0)
    if fields is None:
        return False
    n_parts = ceil_div(x.ne[0], ARGMAX_PART)
    parts = b.more(8 * n_parts * x.n_rows) if n_parts > 1 else 0
    threads = min(512, 32 * ceil_div(x.ne[0], 128))
    b.add(n, launches.ArgMax(parts=parts, n_parts=n_parts, **fields), x.n_rows, n_parts, threads)
    if n_parts > 1:
        b.add(n, launches.ArgMaxParts(parts=parts, n_parts=n_parts, **fields), x.n_rows, 1, 64)
    return True


def _sort(b: Binder, n: Node, fields: dict[str, Any], k: int, descending: bool, swaps: bool) -> bool:
    """The first k indices of sorted rows: sorted by a block, or in runs that are then merged."""
    x = n.req(0)
    length, n_rows = x.ne[0], x.n_rows
    if length <= SORTED:
        argument = launches.Sort(keys=0, k=k, descending=descending, swaps=swaps, **fields)
        b.add(n, argument, n_rows, 1, _sorters(length))
        return True
    keys, other = b.more(8 * length * n_rows), b.more(8 * length * n_rows)
    argument = launches.Sort(keys=keys, k=k, descending=descending, swaps=swaps, **fields)
    b.add(n, argument, n_rows, ceil_div(length, SORTED), _sorters(SORTED))
    run = SORTED
    while run < length:
        b.add(n, launches.Merge(x=keys, y=other, n=length, n_rows=n_rows, run=run), ceil_div(length * n_rows, THREADS))
        keys, other, run = other, keys, 2 * run
    b.add(n, launches.Take(keys=keys, k=k, swaps=swaps, **fields), n_rows, ceil_div(k, THREADS))
    return True


def _sorters(n: int) -> int:
    """Threads that sort n keys: one for two of them."""
    return max(32, min(1024, 1 << (n - 1).bit_length() >> 1))


@BINDINGS.of("ARGSORT")
def argsort(b: Binder, n: Node) -> bool:
    fields = _ordered(b, n)
    return fields is not None and _sort(b, n, fields, n.tensor.ne[0], bool(n.params["order"]), False)


@BINDINGS.of("TOP_K")
def top_k(b: Binder, n: Node) -> bool:
    fields, x, k = _ordered(b, n), n.req(0), n.tensor.ne[0]
    if fields is None:
        return False
    n_parts = ceil_div(x.ne[0], TOP_PART)
    if x.ne[0] <= SORTED or k > MAX_TOP or n_parts > MAX_PARTS:
        return _sort(b, n, fields, k, True, True)
    room = b.more(top_room(x.ne[0]) * x.n_rows)
    for step, y, threads in ((launches.TopClear, 1, 256), (launches.TopCount, n_parts, 256), (launches.TopGather, n_parts,
                                                                                              256),
                             (launches.TopFinish, 1, 1024)):  # fmt: skip
        b.add(n, step(room=room, k=k, **fields), x.n_rows, y, threads)
    return True
