"""Products as steps: which columns meet which rows of weights. `products` multiplies them.

Units: every argument is an address or a count; strides are bytes.
"""

from __future__ import annotations

from numba import njit

from workers.kernels import products
from workers.kernels.exports import exported
from workers.kernels.simd import load32, load64, store64

_product = exported(products.product)


@njit(nogil=True)
def mul_mat(  # type: ignore[no-untyped-def]
    kind, w, row_bytes, n_rows, n_packed, k, x, x_bytes, y, y_bytes, n, scratch, t, n_threads
):  # fmt: skip
    """Rows of weights times n columns that lie evenly."""
    columns, outputs = scratch, scratch + 8 * n
    for c in range(n):
        store64(columns + 8 * c, x + c * x_bytes)
        store64(outputs + 8 * c, y + c * y_bytes)
    _product(kind, w, row_bytes, n_rows, n_packed, k, columns, outputs, n, scratch + 16 * n, t, n_threads)


@njit(nogil=True)
def mul_mat_id(  # type: ignore[no-untyped-def]
    kind, w, row_bytes, n_rows, n_packed, k, x, x_bytes, y, y_bytes, n_experts, n_slots, ids, ids_row, n_used, n_tokens,
    scratch, t, n_threads
):  # fmt: skip
    """Each expert's rows times the columns that chose it. False: an id points outside."""
    columns, outputs = scratch, scratch + 8 * n_used * n_tokens
    ends = scratch + 16 * n_used * n_tokens  # of each expert's columns, which lie behind each other
    for expert in range(n_experts):
        store64(ends + 8 * expert, 0)
    for token in range(n_tokens):
        for slot in range(n_used):
            chosen = load32(ids + token * ids_row + 4 * slot)
            if chosen < 0 or chosen >= n_experts:
                return False
            store64(ends + 8 * chosen, load64(ends + 8 * chosen) + 1)
    n = 0
    for expert in range(n_experts):
        own = load64(ends + 8 * expert)
        store64(ends + 8 * expert, n)
        n += own
    for token in range(n_tokens):
        for slot in range(n_used):
            at = ends + 8 * load32(ids + token * ids_row + 4 * slot)
            n = load64(at)
            store64(columns + 8 * n, x + (token * n_slots + slot % n_slots) * x_bytes)
            store64(outputs + 8 * n, y + (token * n_used + slot) * y_bytes)
            store64(at, n + 1)
    start = 0
    for expert in range(n_experts):
        end = load64(ends + 8 * expert)
        if end > start:
            _product(kind, w + expert * n_rows * row_bytes, row_bytes, n_rows, n_packed, k, columns + 8 * start,
                     outputs + 8 * start, end - start, ends + 8 * n_experts, t, n_threads)  # fmt: skip
        start = end
    return True
