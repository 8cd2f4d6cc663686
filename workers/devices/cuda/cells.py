"""ROPE and SET_ROWS that the launch in front of them carries out as well.

In a layer keys are turned behind queries, then keys and values are put into cells.
"""

from __future__ import annotations

from msgspec import structs

from protocol.dtypes import FLOATS, TYPES
from workers.devices.cuda.binding import F32, Binder, ceil_div
from workers.devices.lower import Node
from workers.kernels.cuda.attention_launches import NormedRope, Rope
from workers.kernels.cuda.row_launches import SetById

RUNS = (
    *((*turned, *turned, *kept) for turned in (("ROPE",), ("RMS_NORM", "MUL", "ROPE")) for kept in (("SET_ROWS",) * 2, ())),
    ("SET_ROWS", "SET_ROWS"),
)
"""What is one launch where it can be."""
MAX_THREADS = 1 << 23
"""Of a token."""


def rope_blocks(rope: Rope) -> int:
    return ceil_div(rope.n_threads, 256)


def add_rope(b: Binder, n: Node, rope: Rope, *before: Node) -> None:
    """By the ROPE in front, if that can turn these rows as well. `before`: nodes that it carries out for this one."""
    last = b.last(type(rope))
    both = _both(last, rope) if last is not None else None
    nodes = (n, *before)
    if both is not None and all(b.apart(m) for m in nodes):
        b.widen(both, rope_blocks(both), *(m.index for m in nodes))
        return
    b.add(n, rope, rope.ne[2] * rope.ne[3], rope_blocks(rope))
    b.widen(rope, 0, *(m.index for m in before))


def _both(last: Rope, rope: Rope) -> Rope | None:
    """What turns the rows of both, if they differ in their heads only."""
    of_last = {"x": last.x, "x_nb": last.x_nb, "y": last.y, "y_nb": last.y_nb, "ne": (rope.ne[0], last.ne[1], *rope.ne[2:])}
    too = {"x_too": rope.x, "x_too_nb": rope.x_nb, "y_too": rope.y, "y_too_nb": rope.y_nb, "n_head_too": rope.ne[1]}
    if isinstance(last, NormedRope) and isinstance(rope, NormedRope):
        of_last["w"], too["w_too"] = last.w, rope.w
    both = structs.replace(last, **too)
    return both if structs.replace(rope, **of_last) == last and both.n_threads < MAX_THREADS else None


def kept_by_rope(b: Binder, n: Node) -> bool:
    """Whether the ROPE in front puts these rows there as well: its last result, or behind that others of as many tokens."""
    rope, (i, j, *_) = b.last(Rope), n.tensor.src
    t, x, ids = n.tensor, n.req(0), n.req(1)
    if rope is None or rope.halves or rope.values or t.type not in FLOATS or x.type != F32:
        return False
    n_tokens, size = rope.ne[2], TYPES[t.type].bytes
    if rope.ne[3] > 1 or x.ne[1:] != (n_tokens, 1, 1) or t.ne[2:] != (1, 1) or ids.ne != (n_tokens, 1, 1, 1):
        return False
    if x.nb[0] != 4 or t.nb[0] != size:
        return False
    cells = {"cells_type": t.type, "ids": b.address(j), "ids_step": ids.nb[0], "id_bytes": TYPES[ids.type].bytes,
             "n_all": t.ne[1]}  # fmt: skip
    if rope.cells:
        same = all(getattr(rope, name) == value for name, value in cells.items())
        in_fours = x.ne[0] % 4 == 0 and all(at % 16 == 0 for at in (b.address(i), x.nb[1])) and all(
            at % (4 * size) == 0 for at in (b.address(n.index), t.nb[1]))  # fmt: skip
        more = structs.replace(rope, values=b.address(i), values_row=x.nb[1], n_values=x.ne[0],
                               value_cells=b.address(n.index), value_cells_row=t.nb[1])  # fmt: skip
        fits = same and in_fours and b.apart(n)
    else:
        at, nb, n_head = (rope.y_too, rope.y_too_nb, rope.n_head_too) if rope.n_head_too else (rope.y, rope.y_nb, rope.ne[1])
        more = structs.replace(rope, **cells, cells=b.address(n.index), cells_row=t.nb[1], status=b.status, node=n.index)
        in_order = nb[0] == 4 and (n_head == 1 or nb[1] == 4 * rope.ne[0]) and (n_tokens == 1 or nb[2] == x.nb[1])
        whole = x.ne[0] == n_head * rope.ne[0] and 2 * rope.n_pairs + rope.n_copied == rope.ne[0]
        aligned = b.address(n.index) % size == t.nb[1] % size == 0
        fits = b.address(i) == at and in_order and whole and aligned and b.apart(n, i)
    if not fits or more.n_threads >= MAX_THREADS:
        return False
    b.widen(more, rope_blocks(more), n.index)
    return True


def kept_by_rows(b: Binder, n: Node, rows: SetById) -> bool:
    """Whether the SET_ROWS in front, of another tensor that lies as this one does, takes this one as well."""
    last = b.last(SetById)
    if last is None or last.x_too or structs.replace(rows, x=last.x, y=last.y, node=last.node) != last or not b.apart(n):
        return False
    b.widen(structs.replace(last, x_too=rows.x, y_too=rows.y), 2, n.index)
    return True
