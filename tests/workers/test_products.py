"""Products with quantised rows: the vector kernels and the portable ones against dequantised weights, column by column."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.dtypes import TYPES, GGMLType
from tests.support.fixtures import nmse
from workers.kernels import cpu_products, quantize, quants, simd, simd_rows

TYPES_HERE = sorted(cpu_products.BLOCK_TYPES)
K, ROWS, COLUMNS = 512, 24, 7


def case(t: GGMLType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights as bytes, columns, and the exact product."""
    rng = np.random.default_rng(int(t))
    w = rng.standard_normal((ROWS, K)).astype(np.float32)
    blocks = quantize.quantize(t, w.reshape(-1, TYPES[t].block))
    x = rng.standard_normal((COLUMNS, K)).astype(np.float32)
    exact = x.astype(np.float64) @ quants.dequantize(t, blocks).reshape(ROWS, K).astype(np.float64).T
    return blocks.reshape(-1), x, exact


@pytest.mark.parametrize("t", TYPES_HERE, ids=lambda t: t.name)
def test_portable_products_agree(t: GGMLType) -> None:
    w, x, exact = case(t)
    xq, xd = np.empty((COLUMNS, K), np.int8), np.empty((COLUMNS, K // 32), np.float32)
    xs16, y = np.empty((COLUMNS, K // 16), np.int32), np.empty((COLUMNS, ROWS), np.float32)
    cpu_products.quantize_plain(x, xq, xd, xs16)
    row = K // TYPES[t].block * TYPES[t].bytes
    cpu_products.blocks_product(int(t), w, row, TYPES[t].block, TYPES[t].bytes, xq, xd, xs16, y, 2)
    assert nmse(y, exact) < 1e-4


@pytest.mark.skipif(not simd.HAVE_AVX2, reason="this CPU has no AVX2")
@pytest.mark.parametrize("t", TYPES_HERE, ids=lambda t: t.name)
def test_vector_products_agree_and_do_not_depend_on_company(t: GGMLType) -> None:
    w, x, exact = case(t)
    row = K // TYPES[t].block * TYPES[t].bytes

    def product(x: np.ndarray, threads: int) -> np.ndarray:
        n = len(x)
        xq, xd, xs = np.empty((n, K), np.int8), np.empty((n, K // 32), np.float32), np.empty((n, K // 32), np.float32)
        y = np.empty((n, ROWS), np.float32)
        simd_rows.quantize_rows(x, xq, xd, xs, 0, n)
        at = [a.ctypes.data for a in (xq, xd, xs)]
        simd_rows.rows_product(int(t), w.ctypes.data, row, *at, K, y.ctypes.data, ROWS, n, threads)
        return y

    together = product(x, 2)
    assert nmse(together, exact) < 1e-4
    alone = np.concatenate([product(x[c : c + 1], 1) for c in range(COLUMNS)])
    assert np.array_equal(together, alone)


@pytest.mark.skipif(not simd.HAVE_AVX2, reason="this CPU has no AVX2")
def test_packed_products_agree_and_do_not_depend_on_company() -> None:
    w, x, exact = case(GGMLType.Q4_0)
    packed = w.copy()
    simd.pack_q4_0x8(packed, ROWS, K // 32)

    def product(x: np.ndarray) -> np.ndarray:
        n = len(x)
        tiles, blocks = n // simd.COLUMNS, K // 32
        flat = np.empty(n * K, np.int8), np.empty(n * blocks, np.float32), np.empty(n * blocks, np.float32)
        simd.quantize_columns(x, *flat, blocks, tiles, 0, n)
        y = np.empty((n, ROWS), np.float32)
        simd.q4_0x8_parallel(packed.ctypes.data, *(a.ctypes.data for a in flat), blocks, y.ctypes.data, 4 * ROWS,
                             ROWS // 8, tiles, n - tiles * simd.COLUMNS, 2)  # fmt: skip
        return y

    together = product(x)
    assert nmse(together, exact) < 1e-4
    assert np.array_equal(together, np.concatenate([product(x[c : c + 1]) for c in range(COLUMNS)]))
