"""The tensor types of ggml: id, name, elements and bytes of a block. Declared once, used by every package.

Source: `ggml_type` and the block structs of ggml-common.h (ids 4, 5, 31 to 33 and 36 to 38 are retired there).
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class GGMLType(IntEnum):
    """Type ids as GGUF files and graphs write them."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


class TypeInfo(NamedTuple):
    """Units: `block` elements are stored in `bytes` bytes."""

    type: GGMLType
    block: int
    bytes: int

    @property
    def quantized(self) -> bool:
        return self.block > 1


_T = GGMLType
TYPES: dict[int, TypeInfo] = {
    t: TypeInfo(t, block, size)
    for t, block, size in [
        (_T.F32, 1, 4), (_T.F16, 1, 2), (_T.BF16, 1, 2), (_T.F64, 1, 8),
        (_T.I8, 1, 1), (_T.I16, 1, 2), (_T.I32, 1, 4), (_T.I64, 1, 8),
        (_T.Q4_0, 32, 18), (_T.Q4_1, 32, 20), (_T.Q5_0, 32, 22), (_T.Q5_1, 32, 24), (_T.Q8_0, 32, 34),
        (_T.Q8_1, 32, 36), (_T.Q2_K, 256, 84), (_T.Q3_K, 256, 110), (_T.Q4_K, 256, 144), (_T.Q5_K, 256, 176),
        (_T.Q6_K, 256, 210), (_T.Q8_K, 256, 292), (_T.IQ2_XXS, 256, 66), (_T.IQ2_XS, 256, 74),
        (_T.IQ3_XXS, 256, 98), (_T.IQ1_S, 256, 50), (_T.IQ4_NL, 32, 18), (_T.IQ3_S, 256, 110),
        (_T.IQ2_S, 256, 82), (_T.IQ4_XS, 256, 136), (_T.IQ1_M, 256, 56), (_T.TQ1_0, 256, 54),
        (_T.TQ2_0, 256, 66), (_T.MXFP4, 32, 17), (_T.NVFP4, 64, 36), (_T.Q1_0, 128, 18), (_T.Q2_0, 64, 18),
    ]
}  # fmt: skip

FLOATS = frozenset({_T.F32, _T.F16, _T.BF16})
INTEGERS = frozenset({_T.I8, _T.I16, _T.I32, _T.I64})
QUANTIZED = frozenset(info.type for info in TYPES.values() if info.quantized)
INTERMEDIATE = frozenset({_T.Q8_1, _T.Q8_K})
"""Types that ggml makes of activations only; no file holds them."""
ANY = frozenset(info.type for info in TYPES.values())
NO_QUANTIZE = frozenset({_T.IQ2_XXS, _T.IQ2_XS, _T.IQ3_XXS, _T.IQ1_S, _T.IQ1_M, _T.IQ3_S, _T.IQ2_S})
"""Types that need an importance matrix or a search to be written; no op stores to them."""


def row_bytes(type_id: int, n: int) -> int:
    """Bytes of `n` consecutive elements; `n` must be a multiple of the type's block.

    Errors: KeyError for a type that is not live, ValueError for an `n` that is no multiple of the block.
    """
    info = TYPES[type_id]
    if n % info.block:
        raise ValueError(f"{info.type.name}: row of {n} elements is not a multiple of its block of {info.block}")
    return n // info.block * info.bytes


def contiguous_nb(type_id: int, ne: tuple[int, ...]) -> tuple[int, int, int, int]:
    """ggml's strides of a contiguous tensor, in bytes."""
    nb0 = TYPES[type_id].bytes
    nb1 = row_bytes(type_id, ne[0])
    return (nb0, nb1, nb1 * ne[1], nb1 * ne[1] * ne[2])


def tensor_bytes(type_id: int, ne: tuple[int, ...]) -> int:
    """Bytes of a contiguous tensor of shape `ne` (ggml order, 4 long)."""
    return row_bytes(type_id, ne[0]) * ne[1] * ne[2] * ne[3]
