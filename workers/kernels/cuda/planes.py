"""How packed weights lie on a CUDA device.

Rows come in tiles of 16, and along a row elements in chunks of 32 and groups of four chunks. Each part of what a chunk
holds has a plane of its own over the whole tensor, in which a group of a tile lies together, row after row: what a warp
reads next is what lies next. A packed tensor has as many bytes as in GGUF's layout. `formats.cuh` has the code of it.
"""

from __future__ import annotations

from protocol.dtypes import TYPES, GGMLType

TILE = 16
"""Rows that lie together."""
CHUNK = 32
"""Elements of a row that a warp multiplies at once."""
GROUP = 4 * CHUNK

T = GGMLType
QUANTIZED: tuple[GGMLType, ...] = (
    T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.IQ4_NL, T.MXFP4, T.Q4_K, T.Q5_K, T.Q6_K, T.Q2_K, T.Q3_K, T.IQ4_XS,
)  # fmt: skip
KINDS: tuple[GGMLType, ...] = (*QUANTIZED, T.F16, T.BF16)
"""Types that products take. A kernel is compiled for one, as FORMAT: its place in this, from 0 on."""


def format_of(type_id: int) -> int:
    """What kernels are compiled with for a type."""
    return KINDS.index(GGMLType(type_id))


def multiplied(type_id: int, n: int) -> bool:
    """Whether products take rows of so many elements of this type, once they are packed."""
    return type_id in KINDS and n % CHUNK == 0 and n % TYPES[type_id].block == 0


def packable(type_id: int, ne: tuple[int, int, int, int]) -> bool:
    """Whether a weight can lie packed where it lay: with planes at multiples of 16, and no tile of two matrices."""
    if not multiplied(type_id, ne[0]) or 0 in ne:
        return False
    return ne[1] % TILE == 0 or (ne[2] * ne[3] == 1 and ne[1] % 8 == 0)
