"""Between the wire's tensors and NumPy: the one place that turns ggml's `ne`/`nb` into arrays and values.

Shapes: ggml's ne = (n0, n1, n2, n3) becomes a NumPy array (n3, n2, n1, n0); a quantised tensor becomes uint8
(n3, n2, n1, n0 / block, block_bytes). BF16 is held as uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.dtypes import TYPES, GGMLType
from protocol.errors import HandleError
from protocol.graph import Tensor
from workers.kernels import quantize, quants

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

NUMPY_TYPE: dict[int, np.dtype[Any]] = {
    GGMLType.F32: np.dtype("<f4"), GGMLType.F16: np.dtype("<f2"), GGMLType.BF16: np.dtype("<u2"),
    GGMLType.F64: np.dtype("<f8"), GGMLType.I8: np.dtype("i1"), GGMLType.I16: np.dtype("<i2"),
    GGMLType.I32: np.dtype("<i4"), GGMLType.I64: np.dtype("<i8"),
}  # fmt: skip


def view(memory: Bytes, t: Tensor, start: int) -> Array:
    """The array of tensor `t` whose first byte is `memory[start]`; shares memory.

    Errors: HandleError when its extent leaves `memory` (all corners are checked).
    """
    if start < 0 or start + t.extent_bytes() > len(memory):
        raise HandleError(f"tensor: bytes {start}..{start + t.extent_bytes()} of a buffer of {len(memory)}")
    info = TYPES[t.type]
    shape: tuple[int, ...] = t.ne[::-1]
    strides: tuple[int, ...] = t.nb[::-1]
    if info.quantized:
        dtype: np.dtype[Any] = np.dtype(np.uint8)
        shape = (*shape[:3], t.ne[0] // info.block, info.bytes)
        strides = (*strides[:3], info.bytes, 1)
    else:
        dtype = NUMPY_TYPE[t.type]
    if 0 in shape:
        return np.empty(shape, dtype)
    # dimensions of one element carry no information in their stride; NumPy's bounds check should not see it
    strides = tuple(s if n > 1 else dtype.itemsize for s, n in zip(strides, shape, strict=True))
    return np.ndarray(shape, dtype, memory.data, start, strides)


def spread(a: Array, n: int, axis: int) -> Array:
    """Each element along an axis n times, as NumPy's `repeat`, which keeps the interpreter's lock while it copies."""
    shape = (*a.shape[: axis + 1], n, *a.shape[axis + 1 :])
    out = np.empty(shape, a.dtype)
    out[...] = np.expand_dims(a, axis + 1)
    return out.reshape(*a.shape[:axis], a.shape[axis] * n, *a.shape[axis + 1 :])


def bf16_to_f32(x: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (x.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: Array) -> npt.NDArray[np.uint16]:
    """Round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 64).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype(np.uint16)


def load(a: Array, type_id: int, dtype: type[np.floating[Any]] = np.float64) -> Array:
    """Values of an array as made by `view`, in `dtype`. Integers come as they are, widened to int64."""
    if type_id == GGMLType.BF16:
        return bf16_to_f32(a).astype(dtype, copy=False)
    if type_id in (GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64):
        return a.astype(np.int64)
    if TYPES[type_id].quantized:
        rows, width = a.shape[:3], a.shape[3] * TYPES[type_id].block
        if a.size == 0:
            return np.empty((*rows, width), dtype)
        values = quants.dequantize(type_id, np.ascontiguousarray(a).reshape(-1, a.shape[-1]))
        return values.reshape(*rows, width).astype(dtype, copy=False)
    return a.astype(dtype, copy=False)


def convert(values: Array, type_id: int, shape: tuple[int, ...]) -> Array:
    """`values` as the array that `view` makes of this type, to be assigned. Shapes: `shape` is that array's."""
    if type_id == GGMLType.BF16:
        return f32_to_bf16(values.astype(np.float32)).reshape(shape)
    if TYPES[type_id].quantized:
        if values.size == 0:
            return np.empty(shape, np.uint8)
        flat = values.astype(np.float32).reshape(-1, TYPES[type_id].block)
        return quantize.quantize(type_id, flat).reshape(shape)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(NUMPY_TYPE[type_id]).reshape(shape)


def store(a: Array, type_id: int, values: Array) -> None:
    """Convert `values` to the type and write them into the array."""
    a[...] = convert(values, type_id, a.shape)
