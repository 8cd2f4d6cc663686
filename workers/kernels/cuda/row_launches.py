"""Kernels of elements, rows and copies, and what they are called with."""

from __future__ import annotations

from protocol.ops import GLU_KINDS, UNARY_KINDS
from workers.kernels.cuda.launches import PIECE_THREADS, Four, Launch, MakesColumns, TellsPeaks, launch
from workers.kernels.records import Address, Bytes, Code, Count, Flag, Float32, NodeIndex

UNARY = (*UNARY_KINDS, "SQR", "SQRT", "LOG", "SIN", "COS", "SCALE", "CLAMP", "LEAKY_RELU", "SAME")
"""Functions of one number, by their codes. SAME only changes the type."""
BINARY = (*GLU_KINDS, "ADD", "SUB", "MUL", "DIV")
"""Functions of two."""

# -- elements ----------------------------------------------------------------------------------------------------------


class Elements(Launch, frozen=True, kw_only=True):
    """`width` elements a thread, 1 or 4; n threads, which have the coordinates `ne`."""

    n: Count
    ne: Four
    width: Count
    y: Address
    y_type: Code
    y_nb: Four


class FromElements(Elements, frozen=True, kw_only=True):
    x: Address
    x_type: Code
    x_nb: Four


@launch("elements.unary", "element by element")
class Unary(FromElements, frozen=True, kw_only=True):
    """y = f(x) with up to four parameters."""

    kind: Code
    p0: Float32
    p1: Float32
    p2: Float32
    p3: Float32

    def title(self) -> str:
        return UNARY[self.kind]


@launch("elements.binary", "element by element")
class Binary(FromElements, frozen=True, kw_only=True):
    """y = f(x, z) with up to two parameters. Where `wraps`, z is repeated after z_ne; else a stride of 0 repeats it."""

    z: Address
    z_type: Code
    z_ne: Four
    z_nb: Four
    wraps: Flag
    kind: Code
    p0: Float32
    p1: Float32

    def title(self) -> str:
        return BINARY[self.kind]


@launch("elements.add_terms", "ADD of several")
class AddTerms(FromElements, frozen=True, kw_only=True):
    """The sum of n_terms tensors of float32, `step` bytes apart; then z and w, where they are not 0."""

    step: Bytes
    n_terms: Count
    z: Address
    z_nb: Four
    w: Address
    w_nb: Four


@launch("elements.count_up", "ARANGE, FILL")
class CountUp(Elements, frozen=True, kw_only=True):
    """start + i * step."""

    start: Float32
    step: Float32


@launch("elements.diag_mask", "DIAG_MASK_INF")
class DiagMask(FromElements, frozen=True, kw_only=True):
    n_past: Count


# -- rows --------------------------------------------------------------------------------------------------------------


class Rows(Launch, frozen=True, kw_only=True):
    """Rows of ne[0] float32, a block each. `vector`: rows can be reached in fours, which those of SOFT_MAX's mask need not
    be.
    """

    x: Address
    ne: Four
    x_nb: Four
    y: Address
    y_nb: Four
    vector: Flag


@launch("rows.norms", "norm")
class Norm(MakesColumns, frozen=True, kw_only=True):
    """A norm of each row, as `Rows` has them; then times w and plus z, where they are not 0. `w_stays`: no node writes w.

    With `plus` it is the norm of x plus that, which goes to `sum`; both lie as x does.
    """

    x: Address
    ne: Four
    x_nb: Four
    plus: Address
    sum: Address
    y: Address
    y_nb: Four
    vector: Flag
    kind: Code
    eps: Float32
    w: Address
    w_nb: Four
    w_stays: Flag
    z: Address
    z_nb: Four

    def title(self) -> str:
        return ("ADD, " if self.plus else "") + NORMS[self.kind] + (" * w" if self.w else "") + (" + z" if self.z else "")

    def rows_made(self) -> tuple[int, int, int] | None:
        return together(self.y, self.ne, self.y_nb)


@launch("gates.gate", "GLU")
class Gate(TellsPeaks, frozen=True, kw_only=True):
    """y = f(x, z) with up to two parameters, of rows of float32 in fours, a block each; a thread makes a four of them when
    it tells peaks. A kernel is compiled for `kind`."""

    kind: Code
    x: Address
    ne: Four
    x_nb: Four
    z: Address
    z_nb: Four
    y: Address
    y_nb: Four
    p0: Float32
    p1: Float32

    def title(self) -> str:
        return BINARY[self.kind]

    def rows_made(self) -> tuple[int, int, int] | None:
        return together(self.y, self.ne, self.y_nb)

    def pieces(self) -> int:
        return -(-self.ne[0] // (4 * PIECE_THREADS))


NORMS = ("NORM", "RMS_NORM", "L2_NORM")
"""Norms, by their codes."""


@launch("rows.sum_rows", "SUM_ROWS, MEAN")
class SumRows(Rows, frozen=True, kw_only=True):
    """The sum or the mean, brought between two bounds."""

    mean: Flag
    low: Float32
    high: Float32


@launch("rows.cumsum", "CUMSUM")
class CumSum(Rows, frozen=True, kw_only=True):
    pass


@launch("rows.soft_max", "SOFT_MAX")
class SoftMax(Rows, frozen=True, kw_only=True):
    """`mask` and `sinks` are 0 where there are none. With max_bias > 0 the mask is times a head's slope; `n_log2`: the
    largest power of two that is not above their number."""

    scale: Float32
    mask: Address
    mask_type: Code
    mask_ne: Four
    mask_nb: Four
    n_log2: Count
    max_bias: Float32
    sinks: Address
    sinks_step: Bytes


@launch("rows.add_id", "ADD_ID")
class AddId(Rows, frozen=True, kw_only=True):
    """Row (slot, token) of x plus the row of z that it names."""

    z: Address
    z_nb: Four
    n_z: Count
    ids: Address
    ids_nb: Four
    status: Address
    node: NodeIndex


def together(y: int, ne: Four, y_nb: Four) -> tuple[int, int, int] | None:
    """`rows_made` of a tensor of float32: None unless its elements lie in order, without gaps."""
    size = 4
    for n, nb in zip(ne, y_nb, strict=True):
        if n > 1 and nb != size:
            return None
        size *= n
    return y, ne[0], ne[1] * ne[2] * ne[3]


# -- order -------------------------------------------------------------------------------------------------------------

SORTED = 4096
"""Keys that a block sorts."""
MAX_TOP = 1024
"""Of TOP_K: more are taken from rows that are sorted as a whole."""
TOP_PART, PART_ROOM, MAX_PARTS = 4096, 256, 1024
"""Elements of a row that a block looks at for the largest, how many of them it can give, parts of a row."""
N_BINS = 2048
"""Of keys, by their first 11 bits."""


def top_room(n: int) -> int:
    """Bytes that TOP_K needs for a row: how many keys are in each bin, where the last is, how many each part gives;
    these.
    """
    n_parts = -(-n // TOP_PART)
    return 4 * (N_BINS + 2 + n_parts + n_parts % 2) + 8 * PART_ROOM * n_parts


ARGMAX_PART = 8192
"""Elements of a row that a block looks at for the largest one."""


class Ordered(Launch, frozen=True, kw_only=True):
    """Rows of ne[0] float32 at x, and int32 indices at y."""

    x: Address
    ne: Four
    x_nb: Four
    y: Address
    y_nb: Four


@launch("sorts.argmax", "ARGMAX")
class ArgMax(Ordered, frozen=True, kw_only=True):
    """The largest of n_parts parts of each row: an index where that is 1, else a key for each in `parts`."""

    parts: Address
    n_parts: Count


@launch("sorts.argmax_parts", "ARGMAX")
class ArgMaxParts(Ordered, frozen=True, kw_only=True):
    parts: Address
    n_parts: Count


@launch("sorts.sort", "ARGSORT")
class Sort(Ordered, frozen=True, kw_only=True):
    """Up to SORTED elements of a row a block: the first k indices, or where `keys` is not 0 the sorted keys.

    `swaps`: the first two change places.
    """

    keys: Address
    k: Count
    descending: Flag
    swaps: Flag


@launch("sorts.merge", "ARGSORT")
class Merge(Launch, frozen=True, kw_only=True):
    """Sorted runs of `run` keys in each row of n to runs of twice as many."""

    x: Address
    y: Address
    n: Count
    n_rows: Count
    run: Count


@launch("sorts.take", "ARGSORT")
class Take(Ordered, frozen=True, kw_only=True):
    """The indices of the first k keys of each row."""

    keys: Address
    k: Count
    swaps: Flag


class Top(Ordered, frozen=True, kw_only=True):
    """The k largest of each row. `room`: `top_room` bytes for each."""

    room: Address
    k: Count


@launch("sorts.top_clear", "TOP_K")
class TopClear(Top, frozen=True, kw_only=True):
    pass


@launch("sorts.top_count", "TOP_K")
class TopCount(Top, frozen=True, kw_only=True):
    pass


@launch("sorts.top_gather", "TOP_K")
class TopGather(Top, frozen=True, kw_only=True):
    pass


@launch("sorts.top_finish", "TOP_K")
class TopFinish(Top, frozen=True, kw_only=True):
    pass


# -- moves -------------------------------------------------------------------------------------------------------------


@launch("moves.copy", "copy")
class Copy(Launch, frozen=True, kw_only=True):
    """n elements, in the order of both shapes. `unit`: bytes of an element that is moved as it is; 0 for one that is
    converted.
    """

    n: Count
    unit: Count
    x: Address
    x_type: Code
    x_ne: Four
    x_nb: Four
    y: Address
    y_type: Code
    y_ne: Four
    y_nb: Four


@launch("moves.transpose", "transposed copy")
class Transpose(Launch, frozen=True, kw_only=True):
    """x[i, j, p] of `unit` bytes to y[i, j, p]: x has neighbours along j, y along i; n_planes planes (ne[2] * ne[3])."""

    unit: Count
    x: Address
    x_nb: Four
    y: Address
    y_nb: Four
    ne: Four


@launch("moves.repeat", "REPEAT")
class Repeat(Launch, frozen=True, kw_only=True):
    n: Count
    unit: Count
    x: Address
    x_ne: Four
    x_nb: Four
    y: Address
    ne: Four
    y_nb: Four


class ById(Launch, frozen=True, kw_only=True):
    """Rows chosen by ids of `id_bytes` bytes. `ne`: of the rows that are moved; `n_all`: how many an id chooses from."""

    n: Count
    width: Count
    ne: Four
    x: Address
    x_type: Code
    x_nb: Four
    ids: Address
    ids_ne: Four
    ids_nb: Four
    id_bytes: Count
    n_all: Count
    y: Address
    y_type: Code
    y_nb: Four
    status: Address
    node: NodeIndex


@launch("moves.get_rows", "GET_ROWS")
class GetRows(ById, frozen=True, kw_only=True):
    pass


class SetById(ById, frozen=True, kw_only=True):
    """And the same of another tensor that lies as x does, to one that lies as y does."""

    x_too: Address = 0
    y_too: Address = 0

    def title(self) -> str:
        return self.op + (" twice" if self.x_too else "")


@launch("moves.set_rows", "SET_ROWS")
class SetRows(SetById, frozen=True, kw_only=True):
    pass


@launch("moves.set_rows_q8", "SET_ROWS Q8_0")
class SetRowsQ8(SetById, frozen=True, kw_only=True):
    """A warp for each block of 32; n counts blocks, y_nb[0] is their size."""


@launch("moves.copy_q8", "copy to Q8_0")
class CopyQ8(Launch, frozen=True, kw_only=True):
    """The same of elements in the order of both shapes; y_ne[0] counts blocks."""

    n: Count
    x: Address
    x_type: Code
    x_ne: Four
    x_nb: Four
    y: Address
    y_ne: Four
    y_nb: Four


# -- blocks ------------------------------------------------------------------------------------------------------------


@launch("blocks.get_block_rows", "GET_ROWS of blocks")
class GetBlockRows(ById, frozen=True, kw_only=True):
    """Rows of blocks as they lie in a file, a thread for each element."""


@launch("blocks.copy_blocks", "copy of blocks")
class CopyBlocks(Launch, frozen=True, kw_only=True):
    """Elements of blocks as they lie in a file, in the order of both shapes."""

    n: Count
    x: Address
    x_type: Code
    x_ne: Four
    x_nb: Four
    y: Address
    y_type: Code
    y_ne: Four
    y_nb: Four
