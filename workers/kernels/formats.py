"""Block formats as the products read them: 16 rows interleaved, and how a block is unpacked.

A packed group is 16 rows; it takes the bytes that its rows took. For each block, the fields of GGUF's block follow in the
order in which a product reads them, so that memory is read from front to back; each unit (of 1, 2 or 4 bytes) for all 16
rows before the next unit. Four bytes of quants are four columns of a row, so 64 bytes in a row are four columns of 16 rows:
what one vector instruction multiplies.

To add a type: its fields here, and a generator of its sub-blocks. Source: the block structs of ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from protocol.dtypes import TYPES, GGMLType
from workers.kernels.dots import Chunk
from workers.kernels.layout import GROUP, KINDS
from workers.kernels.quants import KVALUES_IQ4NL, KVALUES_MXFP4
from workers.kernels.simd import TARGET, Emit, f32, i16, v16f, vec

T = GGMLType


class Sub(NamedTuple):
    """16 or 32 unpacked columns of 16 rows.

    Attributes:
        chunks: write 4 or 8 vectors of 64 bytes.
        scale, minimum: 16 float32; the value of a weight is scale * byte + minimum.
    """

    chunks: list[Chunk]
    scale: Any
    minimum: Any


class Field(NamedTuple):
    """`n_units` units of `unit` bytes from byte `offset` of a block, at byte `at` of its share of the packed block.

    A unit of 0: 32 bits, one for each column, that are transposed so that bit c of byte [row][t] belongs to column 4 c + t.
    """

    offset: int
    unit: int
    n_units: int
    at: int


@dataclass(frozen=True, slots=True)
class Format:
    """How a type is packed and unpacked.

    Attributes:
        sub: columns that share a scale.
        peak: the largest byte of a chunk; 0 when they are signed.
        unpack: yields the block's sub-blocks in order, given the address of the packed block.
    """

    type: GGMLType
    fields: tuple[Field, ...]
    sub: int
    peak: int
    unpack: Callable[[Emit, Any], Iterator[Sub]]

    @property
    def columns(self) -> int:
        return TYPES[self.type].block

    @property
    def group_bytes(self) -> int:
        """Bytes of one block of 16 rows."""
        return GROUP * TYPES[self.type].bytes

    @property
    def signed(self) -> bool:
        return self.peak == 0


FORMATS: dict[GGMLType, Format] = {}


def _placed(fields: Sequence[tuple[int, int, int]]) -> tuple[Field, ...]:
    """Fields one behind the other."""
    out, at = [], 0
    for offset, unit, n_units in fields:
        out.append(Field(offset, unit, n_units, at))
        at += (unit or 4) * n_units
    return tuple(out)


def _format(t: GGMLType, fields: Sequence[tuple[int, int, int]], sub: int, peak: int) -> Callable[[Any], Any]:
    def add(unpack: Callable[[Emit, Any], Iterator[Sub]]) -> Callable[[Emit, Any], Iterator[Sub]]:
        FORMATS[t] = Format(t, _placed(fields), sub, peak, unpack)
        return unpack

    return add


def _centred(e: Emit, scale: Any, zero: int) -> Any:
    """The minimum of bytes that were stored with an offset of `zero`."""
    return e.b.fmul(scale, e.floats(-zero))


_FULL = 0 if TARGET.signed else 255
"""Peak of bytes that use all 8 bits."""


def _full_range(e: Emit, chunks: list[Chunk], scale: Any) -> Sub:
    """Signed bytes in the form that the target multiplies."""
    if TARGET.signed:
        return Sub(chunks, scale, None)
    return Sub([_then(lambda x: e.b.xor(x, e.bytes(0x80)), c) for c in chunks], scale, _centred(e, scale, 128))


def _table(values: Any) -> list[int]:
    """Signed values in the form that the target multiplies."""
    return [int(v) if TARGET.signed else int(v) + 128 for v in values]


def _chunk(e: Emit, p: Any, offset: int) -> Chunk:
    return partial(e.chunk, p, offset)


def _then(f: Callable[..., Any], *chunks: Chunk) -> Chunk:
    return lambda: f(*(chunk() for chunk in chunks))


def _pairs(e: Emit, p: Any, offset: int, n: int) -> tuple[list[Chunk], list[Chunk]]:
    """Low and high nibbles of `n` chunks."""
    both = [cache(_chunk(e, p, offset + 64 * c)) for c in range(n)]
    return [_then(e.low, x) for x in both], [_then(e.high, x) for x in both]


def _with_bits(e: Emit, chunk: Chunk, top: Chunk, at: int, width: int, to: int) -> Chunk:
    """Chunks whose upper bits lie elsewhere."""
    return _then(lambda x, t: e.b.or_(x, e.bits(t, at, width, to)), chunk, top)


@_format(T.Q4_0, [(0, 2, 1), (2, 4, 4)], 32, 15)
def _q4_0(e: Emit, p: Any) -> Iterator[Sub]:
    low, high = _pairs(e, p, 32, 4)
    d = e.halves(p, 0)
    yield Sub(low + high, d, _centred(e, d, 8))


@_format(T.Q4_1, [(0, 2, 2), (4, 4, 4)], 32, 15)
def _q4_1(e: Emit, p: Any) -> Iterator[Sub]:
    low, high = _pairs(e, p, 64, 4)
    yield Sub(low + high, e.halves(p, 0), e.halves(p, 32))


def _fifth(e: Emit, p: Any, bits: int, nibbles: int) -> list[Chunk]:
    low, high = _pairs(e, p, nibbles, 4)
    top = _chunk(e, p, bits)
    return [_with_bits(e, q, top, c, 1, 4) for c, q in enumerate(low + high)]


@_format(T.Q5_0, [(0, 2, 1), (2, 0, 1), (6, 4, 4)], 32, 31)
def _q5_0(e: Emit, p: Any) -> Iterator[Sub]:
    d = e.halves(p, 0)
    yield Sub(_fifth(e, p, 32, 96), d, _centred(e, d, 16))


@_format(T.Q5_1, [(0, 2, 2), (4, 0, 1), (8, 4, 4)], 32, 31)
def _q5_1(e: Emit, p: Any) -> Iterator[Sub]:
    yield Sub(_fifth(e, p, 64, 128), e.halves(p, 0), e.halves(p, 32))


@_format(T.Q8_0, [(0, 2, 1), (2, 4, 8)], 32, _FULL)
def _q8_0(e: Emit, p: Any) -> Iterator[Sub]:
    yield _full_range(e, [_chunk(e, p, 32 + 64 * c) for c in range(8)], e.halves(p, 0))


@_format(T.IQ4_NL, [(0, 2, 1), (2, 4, 4)], 32, _FULL)
def _iq4_nl(e: Emit, p: Any) -> Iterator[Sub]:
    low, high = _pairs(e, p, 32, 4)
    d, table = e.halves(p, 0), _table(KVALUES_IQ4NL)
    yield Sub([_then(partial(e.lookup, table), q) for q in low + high], d, None if TARGET.signed else _centred(e, d, 128))


@_format(T.MXFP4, [(0, 1, 1), (1, 4, 4)], 32, 24)
def _mxfp4(e: Emit, p: Any) -> Iterator[Sub]:
    """The exponent's float is made from its bits; values are stored doubled, with an offset of 12."""
    b = e.b
    low, high = _pairs(e, p, 16, 4)
    exponent = e.small(p, 0)
    tiny = b.shl(e.ints(0x00200000), exponent)
    normal = b.shl(b.sub(exponent, e.ints(1)), e.ints(23))
    d = b.bitcast(b.select(b.icmp_unsigned("<", exponent, e.ints(2)), tiny, normal), v16f)
    table = [int(v) + 12 for v in KVALUES_MXFP4]
    yield Sub([_then(partial(e.lookup, table), q) for q in low + high], d, _centred(e, d, 12))


def _six_bits(e: Emit, p: Any, j: int) -> tuple[Any, Any]:
    """Scale and minimum j of the 8 pairs that Q4_K and Q5_K keep in 12 bytes at byte 4."""
    b = e.b

    def at(k: int) -> Any:
        return e.small(p, 16 * (4 + k))

    if j < 4:
        return b.and_(at(j), e.ints(63)), b.and_(at(j + 4), e.ints(63))
    both = at(j + 4)
    scale = b.or_(b.and_(both, e.ints(15)), b.shl(b.lshr(at(j - 4), e.ints(6)), e.ints(4)))
    return scale, b.or_(b.lshr(both, e.ints(4)), b.shl(b.lshr(at(j), e.ints(6)), e.ints(4)))


def _affine_k(e: Emit, p: Any, quants: int, top: int) -> Iterator[Sub]:
    b = e.b
    d, dmin = e.halves(p, 0), b.fneg(e.halves(p, 32))
    for j in range(8):
        chunks = [_chunk(e, p, 16 * quants + 512 * (j // 2) + 64 * c) for c in range(8)]
        chunks = [_then(e.high if j % 2 else e.low, x) for x in chunks]
        if top:
            chunks = [_with_bits(e, x, _chunk(e, p, 16 * top + 64 * c), j, 1, 4) for c, x in enumerate(chunks)]
        scale, minimum = _six_bits(e, p, j)
        yield Sub(chunks, b.fmul(d, b.sitofp(scale, v16f)), b.fmul(dmin, b.sitofp(minimum, v16f)))


@_format(T.Q4_K, [(0, 2, 2), (4, 1, 12), (16, 4, 32)], 32, 15)
def _q4_k(e: Emit, p: Any) -> Iterator[Sub]:
    return _affine_k(e, p, 16, 0)


@_format(T.Q5_K, [(0, 2, 2), (4, 1, 12), (16, 4, 8), (48, 4, 32)], 32, 31)
def _q5_k(e: Emit, p: Any) -> Iterator[Sub]:
    return _affine_k(e, p, 48, 16)


_Q6_K_HALVES = [(0, 4, 8), (128, 4, 8), (32, 4, 8), (64, 4, 8), (160, 4, 8), (96, 4, 8)]
"""Of each half of a block: low nibbles of its first 64 columns, upper bits of all 128, low nibbles of the others."""


@_format(T.Q6_K, [(208, 2, 1), (192, 1, 16), *_Q6_K_HALVES], 16, 63)
def _q6_k(e: Emit, p: Any) -> Iterator[Sub]:
    b, d = e.b, e.halves(p, 0)
    for j in range(16):
        h, s, half = j // 8, j % 8 // 2, j % 2
        chunks = []
        for c in range(4 * half, 4 * half + 4):
            q = _chunk(e, p, 16 * (18 + 96 * h + 64 * (s % 2)) + 64 * c)
            top = _chunk(e, p, 16 * (18 + 96 * h + 32) + 64 * c)
            chunks.append(_with_bits(e, _then(e.high if s // 2 else e.low, q), top, 2 * s, 2, 4))
        scale = b.fmul(d, b.sitofp(e.small(p, 16 * (2 + j), signed=True), v16f))
        yield Sub(chunks, scale, _centred(e, scale, 32))


@_format(T.Q2_K, [(80, 2, 2), (0, 1, 16), (16, 4, 16)], 16, 3)
def _q2_k(e: Emit, p: Any) -> Iterator[Sub]:
    b = e.b
    d, dmin = e.halves(p, 0), b.fneg(e.halves(p, 32))
    for j in range(16):
        h, s, half = j // 8, j % 8 // 2, j % 2
        quants = [_chunk(e, p, 16 * (20 + 32 * h) + 64 * c) for c in range(4 * half, 4 * half + 4)]
        chunks = [_then(lambda x, at=2 * s: e.bits(x, at, 2, 0), q) for q in quants]
        both = e.small(p, 16 * (4 + j))
        scale, minimum = b.and_(both, e.ints(15)), b.lshr(both, e.ints(4))
        yield Sub(chunks, b.fmul(d, b.sitofp(scale, v16f)), b.fmul(dmin, b.sitofp(minimum, v16f)))


@_format(T.Q3_K, [(108, 2, 1), (96, 1, 12), (0, 4, 8), (32, 4, 16)], 16, 7)
def _q3_k(e: Emit, p: Any) -> Iterator[Sub]:
    """The bit of `hmask` is set where 4 is not taken off: then it is bit 2 of a byte with an offset of 4."""
    b, d = e.b, e.halves(p, 0)
    for j in range(16):
        h, s, half = j // 8, j % 8 // 2, j % 2
        chunks = []
        for c in range(4 * half, 4 * half + 4):
            q = _then(lambda x, at=2 * s: e.bits(x, at, 2, 0), _chunk(e, p, 16 * (46 + 32 * h) + 64 * c))
            chunks.append(_with_bits(e, q, _chunk(e, p, 16 * 14 + 64 * c), 4 * h + s, 1, 2))
        low = e.small(p, 16 * (2 + j % 8))
        low = b.lshr(low, e.ints(4)) if j >= 8 else b.and_(low, e.ints(15))
        top = b.and_(b.lshr(e.small(p, 16 * (10 + j % 4)), e.ints(2 * (j // 4))), e.ints(3))
        six = b.sub(b.or_(low, b.shl(top, e.ints(4))), e.ints(32))
        scale = b.fmul(d, b.sitofp(six, v16f))
        yield Sub(chunks, scale, _centred(e, scale, 4))


@_format(T.IQ4_XS, [(0, 2, 2), (4, 1, 4), (8, 4, 32)], 32, _FULL)
def _iq4_xs(e: Emit, p: Any) -> Iterator[Sub]:
    b, d, table = e.b, e.halves(p, 0), _table(KVALUES_IQ4NL)
    top = b.zext(e.load(p, 32, vec(i16, 16)), e.ints(0).type)
    for j in range(8):
        low, high = _pairs(e, p, 16 * (8 + 16 * j), 4)
        four = b.and_(b.lshr(e.small(p, 16 * (4 + j // 2)), e.ints(4 * (j % 2))), e.ints(15))
        two = b.and_(b.lshr(top, e.ints(2 * j)), e.ints(3))
        scale = b.fmul(d, b.sitofp(b.sub(b.or_(four, b.shl(two, e.ints(4))), e.ints(32)), v16f))
        chunks = [_then(partial(e.lookup, table), q) for q in low + high]
        yield Sub(chunks, scale, None if TARGET.signed else _centred(e, scale, 128))


FLOAT_FIELDS: dict[GGMLType, tuple[Field, ...]] = {
    T.F32: _placed([(0, 4, 1)]), T.F16: _placed([(0, 2, 1)]), T.BF16: _placed([(0, 2, 1)]),
}  # fmt: skip


def float_row(e: Emit, t: GGMLType, p: Any) -> Any:
    """One column of 16 packed rows as float32."""
    if t == T.F32:
        return e.load(p, 0, vec(f32, 16))
    if t == T.F16:
        return e.halves(p, 0)
    wide = e.b.zext(e.load(p, 0, vec(i16, 16)), e.ints(0).type)
    return e.b.bitcast(e.b.shl(wide, e.ints(16)), v16f)


_fields = [FORMATS[t].fields if t in FORMATS else FLOAT_FIELDS[t] for t in KINDS]
FIELDS = np.full((len(KINDS), max(map(len, _fields)), 4), -1, np.int64)
for _i, _f in enumerate(_fields):
    FIELDS[_i, : len(_f)] = np.array(_f)
N_FIELDS = np.array([len(f) for f in _fields])
BLOCK = np.array([TYPES[t].block for t in KINDS])
BLOCK_BYTES = np.array([TYPES[t].bytes for t in KINDS])
