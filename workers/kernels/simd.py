"""The vector kit: values of 16 lanes and what is done with them, written as LLVM IR inside Numba functions.

LLVM turns 16 lanes into the registers that the CPU has. Only the product of bytes is written per target (`dots`): AVX-512
with VNNI and without, AVX2, and plain multiplications for every other CPU. Adding a target is a row of `TARGETS` and a
branch of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

LANES = 16
"""Rows that are multiplied side by side."""

i1, i8, i16, i32, i64 = (ir.IntType(k) for k in (1, 8, 16, 32, 64))
f32, f16, f64 = ir.FloatType(), ir.HalfType(), ir.DoubleType()
vec = ir.VectorType
v16f, v16i, v64b = vec(f32, LANES), vec(i32, LANES), vec(i8, 4 * LANES)


@dataclass(frozen=True, slots=True)
class Target:
    """Attributes:
    needs: CPU features.
    columns: tiles of columns that products are made for, largest first; what its registers hold.
    paired: columns of a tile of two groups of rows, which spares loads where there are registers for it; 0 for none.
    signed: whether bytes of a weight may stay signed (else they are stored with an offset).
    """

    name: str
    needs: tuple[str, ...]
    columns: tuple[int, ...]
    paired: int
    signed: bool


TARGETS = (
    Target("AVX-512 VNNI", ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx2", "fma", "f16c"), (8, 4, 1), 6, False),
    Target("AVX-512", ("avx512f", "avx512bw", "avx512vl", "avx2", "fma", "f16c"), (8, 4, 1), 4, True),
    Target("AVX2", ("avx2", "fma", "f16c"), (4, 1), 0, True),
    Target("portable", (), (1,), 0, True),
)


def cpu_features() -> frozenset[str]:
    """What Numba compiles for: the host's features, or those of NUMBA_CPU_FEATURES."""
    if config.CPU_FEATURES is not None:
        return frozenset(f[1:] for f in config.CPU_FEATURES.split(",") if f.startswith("+"))
    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


TARGET = next(t for t in TARGETS if cpu_features().issuperset(t.needs))
llvm.initialize_native_asmparser()  # for `Emit.prefetch`
_IS_X86 = llvm.get_process_triple().startswith(("x86_64", "amd64"))
_HAS_HALVES = "f16c" in cpu_features() or llvm.get_process_triple().startswith(("aarch64", "arm64"))


def widen_half(b: Any, bits: Any) -> Any:
    """float32 of float16 bits, one or a vector of them. Without an instruction for it: shifted, scaled by 2^112."""
    kind = bits.type
    n = getattr(kind, "count", 0)
    wide, floats, halves = (vec(t, n) if n else t for t in (i32, f32, f16))
    if _HAS_HALVES:
        return b.fpext(b.bitcast(bits, halves), floats)

    def const(value: int) -> Any:
        return ir.Constant(wide, [value] * n if n else value)

    x = b.zext(bits, wide)
    size = b.shl(b.and_(x, const(0x7FFF)), const(13))
    scaled = b.fmul(b.bitcast(size, floats), b.bitcast(const((127 + 112) << 23), floats))
    special = b.icmp_unsigned(">=", size, const(0x7C00 << 13))
    value = b.select(special, b.or_(size, const(0x7F800000)), b.bitcast(scaled, wide))
    return b.bitcast(b.or_(value, b.shl(b.and_(x, const(0x8000)), const(16))), floats)


def narrow_half(b: Any, x: Any) -> Any:
    """Bits of the float16 nearest to a float32, ties to even."""
    if _HAS_HALVES:
        return b.bitcast(b.fptrunc(x, f16), i16)

    def const(value: int) -> Any:
        return ir.Constant(i32, value)

    bits = b.bitcast(x, i32)
    size = b.and_(bits, const(0x7FFFFFFF))
    half = const(126 << 23)
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(size, f32), b.bitcast(half, f32)), i32), half)
    odd = b.and_(b.lshr(size, const(13)), const(1))
    normal = b.lshr(b.add(b.add(size, const((15 - 127) * (1 << 23) + 0xFFF)), odd), const(13))
    beyond = b.select(b.icmp_unsigned(">", size, const(0x7F800000)), const(0x7E00), const(0x7C00))
    out = b.select(b.icmp_unsigned("<", size, const(0x38800000)), tiny, normal)
    out = b.select(b.icmp_unsigned(">=", size, const(0x47800000)), beyond, out)
    return b.trunc(b.or_(out, b.and_(b.lshr(bits, const(16)), const(0x8000))), i16)


class Emit:
    """Writes instructions. Addresses are 64-bit integers, as everywhere in these kernels."""

    def __init__(self, b: Any) -> None:
        self.b = b

    # -- values --------------------------------------------------------------------------------------------------------

    def const(self, value: int) -> Any:
        return ir.Constant(i64, value)

    def int32(self, value: int) -> Any:
        return ir.Constant(i32, value)

    def bytes(self, value: int, n: int = 4 * LANES) -> Any:
        return ir.Constant(vec(i8, n), [value & 255] * n)

    def floats(self, value: float) -> Any:
        return ir.Constant(v16f, [value] * LANES)

    def function(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        return cgutils.get_or_insert_function(self.b.module, ir.FunctionType(result, arguments), name)

    def at(self, p: Any, offset: int) -> Any:
        return self.b.add(p, self.const(offset)) if offset else p

    def load(self, p: Any, offset: int, kind: Any) -> Any:
        value = self.b.load(self.b.inttoptr(self.at(p, offset), ir.PointerType(kind)))
        value.align = 1
        return value

    def chunk(self, p: Any, offset: int) -> Any:
        """64 bytes. On AVX2 they are loaded here and nowhere else: LLVM would load early, and spill."""
        if TARGET.name != "AVX2":
            return self.load(p, offset, v64b)
        half = vec(i8, 32)
        kind = ir.FunctionType(half, [i64])
        return self.join(*(self.b.asm(kind, f"vmovdqu {at}($1), $0", "=x,r", [p], True) for at in (offset, offset + 32)))

    def store(self, value: Any, p: Any, offset: int = 0) -> None:
        self.b.store(value, self.b.inttoptr(self.at(p, offset), ir.PointerType(value.type))).align = 1

    def prefetch(self, p: Any, offset: int, after: Any = None) -> None:
        """Ask for a cache line, into the second cache. `after`: 16 float32 that are there before: LLVM would gather all
        requests of a loop in one place, where they wait for each other."""
        if _IS_X86 and after is not None:
            ask = ir.FunctionType(ir.VoidType(), [i64, vec(f32, 4)])
            self.b.asm(ask, f"prefetcht1 {offset}($0)", "r,x", [p, self.part(after, 0, 4)], True)
            return
        call = self.function("llvm.prefetch.p0", ir.VoidType(), [ir.PointerType(i8), i32, i32, i32])
        at = self.b.inttoptr(self.at(p, offset), ir.PointerType(i8))
        self.b.call(call, [at, self.int32(0), self.int32(2), self.int32(1)])

    def splat(self, x: Any, n: int = LANES) -> Any:
        empty = ir.Constant(vec(x.type, n), ir.Undefined)
        one = self.b.insert_element(empty, x, self.int32(0))
        return self.b.shuffle_vector(one, empty, ir.Constant(vec(i32, n), [0] * n))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.b.call(self.function("llvm.fma.v16f32", v16f, [v16f] * 3), [x, y, z])

    def halves(self, p: Any, offset: int) -> Any:
        """16 float16 as float32."""
        return widen_half(self.b, self.load(p, offset, vec(i16, LANES)))

    def small(self, p: Any, offset: int, signed: bool = False) -> Any:
        """16 bytes as int32."""
        x = self.load(p, offset, vec(i8, LANES))
        return self.b.sext(x, v16i) if signed else self.b.zext(x, v16i)

    def ints(self, value: int) -> Any:
        return ir.Constant(v16i, [value] * LANES)

    def part(self, x: Any, start: int, n: int) -> Any:
        """Elements start..start + n of a vector."""
        return self.b.shuffle_vector(x, x, ir.Constant(vec(i32, n), list(range(start, start + n))))

    def exp(self, x: Any) -> Any:
        """e^x of 16 float32 to about 1 unit in the last place; 0 below -87.3, infinity above 88.7.

        Source: the range reduction and polynomial of Cephes' expf.
        """
        b = self.b
        low, high = self.floats(-87.3365447504), self.floats(88.7228317261)
        held = b.select(b.fcmp_ordered("<", x, low), low, x)
        held = b.select(b.fcmp_ordered(">", held, high), high, held)
        nearest = self.function("llvm.rint.v16f32", v16f, [v16f])
        n = b.call(nearest, [b.fmul(held, self.floats(1.44269504088896341))])
        r = self.fma(n, self.floats(-0.693359375), held)
        r = self.fma(n, self.floats(2.12194440e-4), r)
        p = self.floats(1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.fma(p, r, self.floats(c))
        y = b.fadd(self.fma(b.fmul(r, r), p, r), self.floats(1.0))
        # 2^n in two steps: n = 128 has no float32 of its own
        k = b.fptosi(n, v16i)
        first = b.ashr(k, self.ints(1))
        for step in (first, b.sub(k, first)):
            y = b.fmul(y, b.bitcast(b.shl(b.add(step, self.ints(127)), self.ints(23)), v16f))
        y = b.select(b.fcmp_ordered("<", x, low), self.floats(0.0), y)
        return b.select(b.fcmp_ordered(">", x, high), self.floats(float("inf")), y)

    def tanh(self, x: Any) -> Any:
        """1 - 2 / (e^2x + 1), and near 0, where that cancels, the series."""
        b, one = self.b, self.floats(1.0)
        far = b.fsub(one, b.fdiv(self.floats(2.0), b.fadd(self.exp(b.fadd(x, x)), one)))
        square = b.fmul(x, x)
        p = self.floats(62 / 2835)
        for c in (-17 / 315, 2 / 15, -1 / 3, 1.0):
            p = self.fma(p, square, self.floats(c))
        return b.select(b.fcmp_ordered("<", square, self.floats(0.09)), b.fmul(x, p), far)

    def sigmoid(self, x: Any) -> Any:
        b, one = self.b, self.floats(1.0)
        return b.fdiv(one, b.fadd(one, self.exp(b.fneg(x))))

    def join(self, x: Any, y: Any) -> Any:
        n = 2 * x.type.count
        return self.b.shuffle_vector(x, y, ir.Constant(vec(i32, n), list(range(n))))

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def low(self, x: Any) -> Any:
        return self.b.and_(x, self.bytes(15))

    def high(self, x: Any) -> Any:
        return self.b.lshr(x, self.bytes(4))

    def bits(self, x: Any, at: int, width: int, to: int) -> Any:
        """`width` bits from bit `at` of each byte, moved to bit `to`."""
        if at > to:
            x = self.b.lshr(x, self.bytes(at - to))
        elif to > at:
            x = self.b.shl(x, self.bytes(to - at))
        return self.b.and_(x, self.bytes(((1 << width) - 1) << to))

    def lookup(self, table: Sequence[int], index: Any) -> Any:
        """table[index] for bytes 0..15."""
        values = [t & 255 for t in table]
        if TARGET.name == "portable":
            out = self.bytes(values[0])
            for i in range(1, 16):
                out = self.b.select(self.b.icmp_unsigned("==", index, self.bytes(i)), self.bytes(values[i]), out)
            return out
        v32b = vec(i8, 32)
        shuffle = self.function("llvm.x86.avx2.pshuf.b", v32b, [v32b, v32b])
        held = ir.Constant(v32b, values * 2)
        return self.join(*(self.b.call(shuffle, [held, self.part(index, at, 32)]) for at in (0, 32)))


# -- scalars for Numba -------------------------------------------------------------------------------------------------


def _loader(kind: Any, result: Any) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            return Emit(b).load(args[0], 0, kind)

        return result(types.int64), codegen

    return load


def _storer(kind: Any) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            Emit(b).store(args[1], args[0])
            return context.get_dummy_value()

        return types.void(types.int64, kind), codegen

    return store


load8, load16, load32 = _loader(i8, types.uint8), _loader(i16, types.uint16), _loader(i32, types.int32)
load64, loadf = _loader(i64, types.int64), _loader(f32, types.float32)
store8, store16, store32 = _storer(types.uint8), _storer(types.uint16), _storer(types.int32)
store64, storef = _storer(types.int64), _storer(types.float32)


@intrinsic
def half_to_float(typingctx: Any, bits: Any) -> Any:
    """float32 of the float16 whose bits are a uint16."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return widen_half(b, args[0])

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_half(typingctx: Any, x: Any) -> Any:
    """Bits of the float16 nearest to a float32, ties to even."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return narrow_half(b, args[0])

    return types.uint16(types.float32), codegen


@intrinsic
def bits_to_float(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.bitcast(args[0], f32)

    return types.float32(types.int32), codegen


def _address_as(kind: Any, result: Any) -> Any:
    @intrinsic
    def as_pointer(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            return b.inttoptr(args[0], ir.PointerType(kind))

        return types.CPointer(result)(types.int64), codegen

    return as_pointer


as_floats, as_halves = _address_as(f32, types.float32), _address_as(i16, types.uint16)
as_doubles = _address_as(f64, types.float64)
"""Pointers at an address, for `carray`."""


# -- what threads share ------------------------------------------------------------------------------------------------


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address; the value before."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], ir.PointerType(i64)), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.load_atomic(b.inttoptr(args[0], ir.PointerType(i64)), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        b.store_atomic(args[1], b.inttoptr(args[0], ir.PointerType(i64)), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that this is a loop that waits."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        if any(t in llvm.get_process_triple() for t in ("x86_64", "amd64", "i686")):
            b.call(Emit(b).function("llvm.x86.sse2.pause", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), codegen
