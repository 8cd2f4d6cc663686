"""About how long a step takes, so that a plan can be cut into pieces that a slow core does in some hundredths of a second.

Unit: a multiplication of quantised weights, of which such a core does 4 thousand millions a second. What else it does is
measured in these, by what took longest against them of a fast core's vectors and a slow one's.
"""

from __future__ import annotations

from workers.kernels import steps
from workers.kernels.layout import BLOCK, CHUNK, N_QUANTIZED
from workers.kernels.records import Step

ELEMENT, SUMMED, UNPACKED = 64, 128, 512
"""For an element that is read and written; for one of a row that is gone through several times; for one of packed weights
that is made a number again."""
OF_FLOATS, OF_ATTENTION, OF_STATES = 4, 6, 8
"""For a multiplication of other kinds. A byte of weights costs one: it comes from memory."""


def cost(step: Step) -> int:
    """What a step costs in all, whoever shares in it."""
    match step:
        case steps.MulMat(n=n, k=k):
            return _product(step, n, k, 1)
        case steps.MulMatId(n_used=n_used, n_tokens=n_tokens, k=k, n_experts=n_experts):
            return _product(step, n_used * n_tokens, k, min(n_used * n_tokens, n_experts))
        case steps.Attend(n_kv=n_kv):
            return _attention(step, n_kv)
        case steps.PagedAttend(n_pages=n_pages, window=window):
            return _attention(step, cells_seen(BLOCK * n_pages, window))
        case steps.MergeParts(n_tokens=n_tokens, n_head=n_head, n_kv=n_kv, d_v=d_v):
            return ELEMENT * n_tokens * n_head * -(-n_kv // CHUNK) * d_v
        case steps.SsmScan(n_seqs=n_seqs, n_head=n_head, d_head=d_head, d_state=d_state, n_tokens=n_tokens, n_a=n_a):
            each = OF_STATES if n_a == 1 else ELEMENT
            return each * n_seqs * n_head * d_head * d_state * (n_tokens + step.n_states)
        case steps.SsmConv(n_seqs=n_seqs, n_channels=n_channels, n_tokens=n_tokens, d_conv=d_conv):
            return ELEMENT * n_seqs * n_channels * n_tokens * d_conv
        case steps.Quantize(n=n, k=k):
            return ELEMENT * n * k
        case steps.GetPackedRows(n_ids=n_ids, n=n):
            return UNPACKED * n_ids * n
        case steps.GetRows(n_ids=n_ids, n_planes=n_planes, n=n):
            return ELEMENT * n_ids * n_planes * n
        case steps.Concat(n_x=n_x, n_z=n_z, n_rows=n_rows, n_planes=n_planes):
            return ELEMENT * (n_x + n_z) * n_rows * n_planes
        case steps.RopeTable(n_tokens=n_tokens, half=half):
            return UNPACKED * n_tokens * half
        case steps.Rope(n_tokens=n_tokens, n_head=n_head, d=d):
            return ELEMENT * n_tokens * n_head * d
        case steps.Arange(n=n):
            return ELEMENT * n
        case steps.RowToRow(n_rows=n_rows, n=n) | steps.RowToFew(n_rows=n_rows, n=n):
            return SUMMED * n_rows * n
        case (steps.Elementwise(n_rows=n_rows, n=n) | steps.ByRow(n_rows=n_rows, n=n) | steps.StoreRows(n_rows=n_rows, n=n)
              | steps.AddId(n_rows=n_rows, n=n)):  # fmt: skip
            return ELEMENT * n_rows * n
    raise TypeError(f"{type(step).__name__}: no cost is known of it")


def of_products(kind: int) -> int:
    """A multiplication of weights of this kind."""
    return 1 if kind < N_QUANTIZED else OF_FLOATS


def cells_seen(n_kv: int, window: int) -> int:
    """How many cells of n_kv whoever sees the last `window` goes through; 0: all."""
    return min(n_kv, window + BLOCK) if window else n_kv


def _product(w: steps.Weights, n_columns: int, k: int, n_matrices: int) -> int:
    n_bytes = n_matrices * w.row_bytes
    unpacked = ELEMENT * n_bytes * (w.n_rows - w.n_packed)  # they are packed as they are read
    return max(of_products(w.kind) * w.n_rows * k * n_columns, n_bytes * w.n_rows) + unpacked


def _attention(step: steps.Attend | steps.PagedAttend, n_kv: int) -> int:
    return OF_ATTENTION * step.n_tokens * step.n_head * n_kv * (step.d + step.d_v)
