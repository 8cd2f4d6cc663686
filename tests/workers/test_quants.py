"""Block formats against the gguf package, and quantising against its own inverse."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.dtypes import INTERMEDIATE, NO_QUANTIZE, QUANTIZED, TYPES, GGMLType
from workers import tensors
from workers.kernels import quantize, quants

TYPES_HERE = sorted(QUANTIZED - INTERMEDIATE)
KNOWN_TO_GGUF = [t for t in TYPES_HERE if t not in (GGMLType.Q1_0, GGMLType.Q2_0)]


@pytest.mark.parametrize("t", KNOWN_TO_GGUF, ids=lambda t: t.name)
@given(seed=st.integers(0, 1 << 32))
def test_values_are_those_of_the_gguf_package(t: GGMLType, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (3, TYPES[t].bytes), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(int(t)))
        got = quants.dequantize(t, blocks).reshape(expected.shape)
    assert np.array_equal(got, expected, equal_nan=True)


@pytest.mark.parametrize("t", [t for t in TYPES_HERE if t not in NO_QUANTIZE], ids=lambda t: t.name)
def test_quantised_values_lie_near_what_they_were_made_of(t: GGMLType) -> None:
    x = np.random.default_rng(5).standard_normal((8, TYPES[t].block)).astype(np.float32)
    blocks = quantize.quantize(t, x)
    assert blocks.shape == (8, TYPES[t].bytes)
    error = ((quants.dequantize(t, blocks) - x) ** 2).sum() / (x**2).sum()
    bits = 8 * TYPES[t].bytes / TYPES[t].block
    assert error < (1e-4 if bits > 8 else 2e-2 if bits > 4 else 0.1 if bits > 3 else 0.9)


@pytest.mark.parametrize("t", [t for t in TYPES_HERE if t not in NO_QUANTIZE], ids=lambda t: t.name)
def test_zeros_stay_zeros(t: GGMLType) -> None:
    zeros = np.zeros((2, TYPES[t].block), np.float32)
    assert not quants.dequantize(t, quantize.quantize(t, zeros)).any()


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bf16_rounds_to_nearest_even_as_the_gguf_package_does(values: list[float]) -> None:
    x = np.array(values, np.float32)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType.BF16).view(np.uint16)
    got = tensors.f32_to_bf16(x)
    nan = np.isnan(x)
    assert np.array_equal(got[~nan], expected[~nan]) and np.isnan(tensors.bf16_to_f32(got[nan])).all()
