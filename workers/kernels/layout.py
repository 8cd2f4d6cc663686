"""What plans and kernels agree on: kinds, sizes, the words that threads share. Imports no compiler.

Units: bytes where a name says so, else counts and indices.
"""

from __future__ import annotations

from protocol.dtypes import GGMLType as T

KINDS: tuple[T, ...] = (
    T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.IQ4_NL, T.MXFP4, T.Q4_K, T.Q5_K, T.Q6_K, T.Q2_K, T.Q3_K, T.IQ4_XS,
    T.F32, T.F16, T.BF16,
)  # fmt: skip
"""Types that can be packed: a kind is an index into this."""
KIND_OF = {t: i for i, t in enumerate(KINDS)}
N_QUANTIZED = KINDS.index(T.F32)

# -- products ----------------------------------------------------------------------------------------------------------

GROUP = 16
"""Rows that are packed together."""
X_BLOCK = 48
"""Bytes of 32 quantised elements of x: 32 int8; float32 scale, and its product with the sum of all, of each half."""
PIECE = 32
"""Blocks of 32 columns that are unpacked at once for a tile; their bytes stay in the first cache."""
PANEL_BYTES = PIECE * (512 + 2 * 2 * 64)


def product_scratch_bytes(weight_row_bytes: int, n_columns: int) -> int:
    """What a thread needs for a product."""
    return 2 * PANEL_BYTES + GROUP * weight_row_bytes + 88 * n_columns + 64


# -- rows --------------------------------------------------------------------------------------------------------------

MAX_TOP = 1024
"""Of TOP_K: the largest are kept sorted while a row is read, which is for few of many."""

# -- attention ---------------------------------------------------------------------------------------------------------

BLOCK = 64
"""Cells that are taken at once."""
CHUNK = 8 * BLOCK
"""Cells whose softmax is one running sum; chunks are merged in order."""
TOGETHER = 4
"""Queries that share every load of keys and values."""
TILE = 16
"""Queries of one head of keys that share the unpacking of a block."""


def attention_scratch_bytes(d: int, d_v: int) -> int:
    """What a thread needs for attention."""
    return tile_scratch_bytes(d) + TILE * (32 + 8 * (d_v + 2)) + 64


def tile_scratch_bytes(d: int) -> int:
    """What a block of cells needs of that: keys and scores, indices and addresses, a mask."""
    return 4 * BLOCK * (d + TOGETHER) + 8 * (TILE + 2 * TOGETHER) + 2 * BLOCK


def paged_scratch_bytes(d: int, d_v: int) -> int:
    """What a thread needs for attention over pages: a mask for each query, and a block of keys and values as float16."""
    return attention_scratch_bytes(d, d_v) + 2 * BLOCK * (TILE + d + d_v)


def parts_bytes(n_queries: int, n_kv: int, d_v: int) -> int:
    """What is kept between the two halves of an attention that is split over the context."""
    return n_queries * (-(-n_kv // CHUNK)) * 4 * (d_v + 2)


# -- the team ----------------------------------------------------------------------------------------------------------

(GENERATION, PHASE, ARRIVED, PROGRAM, FIRST, LAST, STOP, ASLEEP, SCRATCH, SCRATCH_BYTES, PROFILE, BAD, CLOCK,
 DOZING) = range(0, 14 * 64, 64)  # fmt: skip
"""Byte offsets of the words that the team shares, each on a cache line of its own."""
CONTROL_BYTES = 14 * 64

LEAD, HELP, WAKE, PACK_ROWS, UNPACK_ROWS = range(5)
"""What the one compiled function can be called for."""

N_WORDS = 9
"""int64 arguments of the one compiled function: what it is called for, and eight more."""
TEAM = "team"
KERNEL_UNITS = ("attention", "products", "rows0", "rows1", "packing", "scans")
PIECE_UNITS = (*(t.name for t in KINDS[:N_QUANTIZED]), "tiles", "floats")
LATER_UNITS = ("flash", "paged", "columns")
UNITS = (*KERNEL_UNITS, TEAM, *PIECE_UNITS, *LATER_UNITS)
"""What is compiled by itself, the longest first."""
STAGES = (PIECE_UNITS, KERNEL_UNITS, LATER_UNITS, (TEAM,))
"""The same in the order in which it is linked: a unit calls those of earlier stages."""
