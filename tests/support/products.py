"""Packed products against dequantised weights. As a program: every type, for the CPU that Numba was told to compile for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protocol.dtypes import TYPES, GGMLType
from tests.support.fixtures import nmse
from workers.kernels import layout, packing, products, quantize, quants
from workers.kernels.simd import TARGET
from workers.kernels.units import provide_pieces
from workers.tensors import bf16_to_f32, f32_to_bf16

K = 1536
provide_pieces()


@dataclass
class Case:
    """Weights of a type as bytes [rows][row_bytes] and as values."""

    type: GGMLType
    blocks: np.ndarray
    values: np.ndarray

    @property
    def kind(self) -> int:
        return layout.KIND_OF[self.type]

    @property
    def n_blocks(self) -> int:
        return K // TYPES[self.type].block


def case(t: GGMLType, n_rows: int, seed: int = 0) -> Case:
    w = np.random.default_rng(seed + int(t)).standard_normal((n_rows, K)).astype(np.float32)
    if t == GGMLType.F32:
        blocks, values = w.view(np.uint8), w
    elif t == GGMLType.F16:
        blocks, values = w.astype(np.float16).view(np.uint8), w.astype(np.float16).astype(np.float32)
    elif t == GGMLType.BF16:
        blocks, values = f32_to_bf16(w).view(np.uint8), bf16_to_f32(f32_to_bf16(w))
    else:
        blocks = quantize.quantize(t, w.reshape(-1, TYPES[t].block))
        values = quants.dequantize(t, blocks)
    return Case(t, np.ascontiguousarray(blocks.reshape(n_rows, -1)), values.reshape(n_rows, K))


def packed(c: Case) -> np.ndarray:
    """The rows packed by sixteens; what is left over stays as it is."""
    out = c.blocks.reshape(-1).copy()
    packing.pack_rows(c.kind, c.blocks.ctypes.data, c.blocks.shape[1], len(c.blocks) // 16, c.n_blocks, out.ctypes.data)
    return out


def unpacked(c: Case, memory: np.ndarray) -> np.ndarray:
    out = np.zeros_like(c.blocks)
    n = len(c.blocks)
    packing.unpack_rows(c.kind, memory.ctypes.data, c.blocks.shape[1], 0, n, n // 16 * 16, c.n_blocks, out.ctypes.data)
    return out


def product(c: Case, memory: np.ndarray, n_packed: int, x: np.ndarray, n_threads: int = 1) -> np.ndarray:
    """float32 [n, K] to [n, rows]."""
    n, n_rows, row = len(x), len(c.blocks), c.blocks.shape[1]
    y = np.zeros((n, n_rows), np.float32)
    xq = np.zeros((n, K // 32, layout.X_BLOCK), np.uint8)
    products.quantize(x.ctypes.data, 4 * K, n, K, xq.ctypes.data, 0, 1)
    of = xq if c.kind < layout.N_QUANTIZED else x
    columns, outputs = (np.array([a.ctypes.data + a.strides[0] * i for i in range(n)]) for a in (of, y))
    scratch = np.zeros(layout.product_scratch_bytes(row, n), np.uint8)
    for t in range(n_threads):
        products.product(c.kind, memory.ctypes.data, row, n_rows, n_packed, K, columns.ctypes.data, outputs.ctypes.data, n,
                         scratch.ctypes.data, t, n_threads)  # fmt: skip
    return y


def check(t: GGMLType) -> None:
    """AssertionError unless products are right, whatever the layout, the company and the threads."""
    c = case(t, 53)
    x = np.random.default_rng(9).standard_normal((29, K)).astype(np.float32)
    memory = packed(c)
    assert np.array_equal(unpacked(c, memory), c.blocks)
    together = product(c, memory, 48, x)
    exact = x.astype(np.float64) @ c.values.T.astype(np.float64)
    assert nmse(together, exact) < (1e-10 if c.kind >= layout.N_QUANTIZED else 1e-4)
    assert np.array_equal(together, product(c, memory, 48, x, n_threads=3))
    assert np.array_equal(together, product(c, c.blocks.reshape(-1), 0, x))
    for n in (1, 2, 5, 17):
        pieces = [product(c, memory, 48, x[i : i + n]) for i in range(0, len(x), n)]
        assert np.array_equal(together, np.concatenate(pieces)), n


if __name__ == "__main__":
    for kind in layout.KINDS:
        check(kind)
    print(TARGET.name)
