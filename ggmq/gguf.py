"""GGUF v2 and v3, read by memory map and trusted with nothing.

Every count and length is held against the bytes that remain before anything is made of it; all arithmetic is in Python
integers. Source: the GGUF specification in ggml's docs.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protocol.dtypes import INTERMEDIATE, TYPES, GGMLType, tensor_bytes
from protocol.errors import FormatError

MAGIC = b"GGUF"
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 1024
MAX_ALIGNMENT = 1 << 20
MAX_SPLITS = 4096

STRING, ARRAY = 8, 9
SCALARS: dict[int, tuple[str, str]] = {
    0: ("B", "u8"), 1: ("b", "i8"), 2: ("H", "u16"), 3: ("h", "i16"), 4: ("I", "u32"), 5: ("i", "i32"),
    6: ("f", "f32"), 7: ("?", "bool"), 10: ("Q", "u64"), 11: ("q", "i64"), 12: ("d", "f64"),
}  # fmt: skip
_SIZE = {t: struct.calcsize("<" + c) for t, (c, _) in SCALARS.items()}
_NUMPY = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_INTS = frozenset({0, 1, 2, 3, 4, 5, 10, 11})
_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


class Value(NamedTuple):
    """A metadata value: its type (for an array that of its elements), the value, and where it stands in the file."""

    type: int
    is_array: bool
    value: Any
    offset: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Units: `offset` from the start of its file, in bytes. Shapes: `ne` is ggml's, 4 long."""

    name: str
    type: GGMLType
    ne: tuple[int, int, int, int]
    offset: int
    n_bytes: int
    part: int


class _Cursor:
    """A place in a file. Every read is bounded by what remains."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)

    def fail(self, expected: str, got: object, at: int | None = None) -> FormatError:
        where = self.at if at is None else at
        return FormatError(f"{self.path.name}: byte {where}: expected {expected}, got {got}; "
                           "the file is damaged or was not downloaded whole")  # fmt: skip

    def need(self, n: int, what: str) -> None:
        if n > self.end - self.at:
            raise self.fail(f"{n} bytes of {what}", f"{self.end - self.at} to the end of the file")

    def unpack(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += size
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        at = self.at
        n = self.unpack("Q", f"the length of {what}")
        if limit is not None and n > limit:
            raise self.fail(f"{what} of at most {limit} bytes", n, at)
        self.need(n, what)
        raw = self.data[self.at : self.at + n]
        self.at += n
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            if limit is not None:
                raise self.fail(f"{what} in UTF-8", repr(raw[:40]), at) from None
            return raw.decode("utf-8", "surrogateescape")

    def strings(self, n: int, what: str) -> list[str]:
        out: list[str] = []
        data, at, end = self.data, self.at, self.end
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(n):
            if at + 8 > end:
                self.at = at
                raise self.fail(f"the length of an element of {what}", "the end of the file")
            size = unpack(data, at)[0]
            if size > end - at - 8:
                self.at = at
                raise self.fail(f"an element of {what} of {size} bytes", f"{end - at - 8} to the end of the file")
            raw = data[at + 8 : at + 8 + size]
            at += 8 + size
            out.append(raw.decode("utf-8", "surrogateescape"))
        self.at = at
        return out


def _value(c: _Cursor, key: str) -> Value:
    start = c.at
    kind = c.unpack("I", f"the type of {key}")
    if kind in SCALARS:
        at = c.at
        if kind == 7:
            raw = c.unpack("B", key)
            if raw > 1:
                raise c.fail("a bool of 0 or 1", raw, at)
            return Value(kind, False, bool(raw), start)
        return Value(kind, False, c.unpack(SCALARS[kind][0], key), start)
    if kind == STRING:
        return Value(kind, False, c.string(key), start)
    if kind != ARRAY:
        raise c.fail("a value type of 0 to 12", kind, start)
    at = c.at
    inner, n = c.unpack("I", f"the element type of {key}"), c.unpack("Q", f"the length of {key}")
    if inner == STRING:
        c.need(8 * n, f"{key}, {n} strings")
        return Value(inner, True, c.strings(n, key), start)
    if inner not in SCALARS:
        raise c.fail("array elements that are scalars or strings", f"type {inner}", at)
    c.need(_SIZE[inner] * n, f"{key}, {n} elements")
    value = np.frombuffer(c.data, _NUMPY[inner], n, c.at).copy()
    c.at += _SIZE[inner] * n
    return Value(inner, True, value, start)


class _Part:
    """One file: its metadata, its tensors, its bytes."""

    def __init__(self, path: Path, index: int) -> None:
        try:
            with open(path, "rb") as f:
                size = f.seek(0, 2)
                self.map: mmap.mmap | bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except FileNotFoundError:
            raise FormatError(f"{path}: no such file; give the path of a GGUF file with -m") from None
        except (OSError, ValueError) as e:
            raise FormatError(f"{path}: cannot be read: {e}") from None
        c = _Cursor(path, self.map)
        magic = self.map[:4]
        if magic != MAGIC:
            raise c.fail(f"the mark {MAGIC!r}", repr(bytes(magic)), 0)
        c.at = 4
        self.version = c.unpack("I", "the version")
        if self.version not in (2, 3):
            swapped = self.version & 0xFFFF == 0 and self.version >> 24 in (1, 2, 3)
            raise c.fail("version 2 or 3", "a big-endian file" if swapped else self.version, 4)
        n_tensors, n_kv = c.unpack("Q", "the tensor count"), c.unpack("Q", "the key count")
        if n_tensors > (c.end - c.at) // 32:
            raise c.fail("a tensor count that the file can hold", n_tensors, 8)
        if n_kv > (c.end - c.at) // 13:
            raise c.fail("a key count that the file can hold", n_kv, 16)
        self.metadata: dict[str, Value] = {}
        for _ in range(n_kv):
            at = c.at
            key = c.string("a key", MAX_KEY_BYTES)
            if key in self.metadata or not key:
                raise c.fail("each key once, and none empty", repr(key), at)
            self.metadata[key] = _value(c, key)
        self.tensors = self._tensors(c, n_tensors, index)
        self.n_parts, self.number = self._count("split.count", 1), self._count("split.no", -1)

    def _count(self, key: str, default: int) -> int:
        v = self.metadata.get(key)
        return default if v is None or v.is_array or v.type not in _INTS else int(v.value)

    def _tensors(self, c: _Cursor, n_tensors: int, index: int) -> dict[str, TensorInfo]:
        raw: list[tuple[str, GGMLType, tuple[int, int, int, int], int, int, int]] = []
        seen: set[str] = set()
        for _ in range(n_tensors):
            at = c.at
            name = c.string("a tensor's name", MAX_NAME_BYTES)
            if name in seen or not name:
                raise c.fail("each tensor name once, and none empty", repr(name), at)
            seen.add(name)
            at = c.at
            n_dims = c.unpack("I", f"the dimensions of {name}")
            if not 1 <= n_dims <= 4:
                raise c.fail(f"1 to 4 dimensions of {name}", n_dims, at)
            dims = [c.unpack("Q", f"the shape of {name}") for _ in range(n_dims)]
            if any(d == 0 or d >= 1 << 63 for d in dims):
                raise c.fail(f"dimensions of {name} of at least 1", dims, at)
            ne = (*dims, *(1,) * (4 - n_dims))
            at = c.at
            kind = c.unpack("I", f"the type of {name}")
            if kind not in TYPES or kind in INTERMEDIATE:
                raise c.fail(f"a live ggml type for {name}", kind, at)
            if ne[0] % TYPES[kind].block:
                raise c.fail(f"rows of {name} in whole blocks of {TYPES[kind].block}", ne[0], at)
            size = tensor_bytes(kind, ne)
            if size > c.end:
                raise c.fail(f"{name} to fit the file of {c.end} bytes", f"{size} bytes", at)
            offset = c.unpack("Q", f"the offset of {name}")
            raw.append((name, GGMLType(kind), (ne[0], ne[1], ne[2], ne[3]), offset, size, at))
        alignment = self.metadata.get("general.alignment")
        align = 32
        if alignment is not None:
            ok = alignment.type == 4 and not alignment.is_array
            align = alignment.value if ok else 0
            if align < 1 or align & (align - 1) or align > MAX_ALIGNMENT:
                raise c.fail(f"general.alignment as u32, a power of two up to {MAX_ALIGNMENT}", alignment.value,
                             alignment.offset)  # fmt: skip
        start = -(-c.at // align) * align
        out = {}
        for name, kind, ne, offset, size, at in raw:
            if offset % align:
                raise c.fail(f"the offset of {name} in steps of {align}", offset, at)
            if start + offset + size > c.end:
                raise c.fail(f"{name} to end inside the file of {c.end} bytes", f"byte {start + offset + size}", at)
            out[name] = TensorInfo(name, kind, ne, start + offset, size, index)
        return out


class GGUF:
    """A model file, or a set of split files opened by any of them.

    Attributes:
        metadata: by key; of split files that of the first.
        tensors: by name, over all parts.
    Errors: FormatError with the file, the byte offset, what was expected and what came.
    Threads: reading is safe from several.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        opened = _Part(path, 0)
        self.paths = split_paths(path, opened.n_parts)
        self._parts = [_Part(p, i) for i, p in enumerate(self.paths)] if len(self.paths) > 1 else [opened]
        for i, part in enumerate(self._parts):
            if len(self._parts) > 1 and (part.number, part.n_parts) != (i, len(self._parts)):
                raise FormatError(f"{self.paths[i].name}: expected part {i} of {len(self._parts)} by its name, got split.no "
                                  f"{part.number} and split.count {part.n_parts}")  # fmt: skip
        self.version = self._parts[0].version
        self.metadata = self._parts[0].metadata
        self.path = self.paths[0]
        self.tensors: dict[str, TensorInfo] = {}
        for p, part in zip(self.paths, self._parts, strict=True):
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise FormatError(f"{p.name}: tensor {name} is also in another part of the split file")
                self.tensors[name] = info
        total = self.metadata.get("split.tensors.count")
        if len(self.paths) > 1 and total is not None and total.value != len(self.tensors):
            raise FormatError(f"{path.name}: split.tensors.count is {total.value}, the parts hold {len(self.tensors)}")

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, in the map."""
        t = self.tensors[name]
        return memoryview(self._parts[t.part].map)[t.offset : t.offset + t.n_bytes]

    @property
    def n_bytes(self) -> int:
        return sum(t.n_bytes for t in self.tensors.values())

    def _fail(self, key: str, expected: str, v: Value) -> FormatError:
        got = f"{'array of ' if v.is_array else ''}{'string' if v.type == STRING else SCALARS[v.type][1]}"
        shown = "" if v.is_array else f" {v.value!r}"
        return FormatError(f"{self.path.name}: byte {v.offset}: key {key}: expected {expected}, got {got}{shown}")

    def _find(self, key: str, default: Any) -> Value | None:
        v = self.metadata.get(key)
        if v is None and default is ...:
            raise FormatError(f"{self.path.name}: key {key} is missing; the model cannot be run without it")
        return v

    def integer(self, key: str, default: Any = ...) -> int:
        """An integer key of any width."""
        v = self._find(key, default)
        if v is None:
            return default
        if v.is_array or v.type not in _INTS:
            raise self._fail(key, "an integer", v)
        return int(v.value)

    def number(self, key: str, default: Any = ...) -> float:
        v = self._find(key, default)
        if v is None:
            return default
        if v.is_array or v.type not in (6, 12):
            raise self._fail(key, "a float", v)
        return float(v.value)

    def text(self, key: str, default: Any = ...) -> str:
        v = self._find(key, default)
        if v is None:
            return default
        if v.is_array or v.type != STRING:
            raise self._fail(key, "a string", v)
        return str(v.value)

    def boolean(self, key: str, default: Any = ...) -> bool:
        v = self._find(key, default)
        if v is None:
            return default
        if v.is_array or v.type != 7:
            raise self._fail(key, "a bool", v)
        return bool(v.value)

    def texts(self, key: str, default: Any = ...) -> list[str]:
        v = self._find(key, default)
        if v is None:
            return default
        if not v.is_array or v.type != STRING:
            raise self._fail(key, "an array of strings", v)
        return list(v.value)

    def numbers(self, key: str, default: Any = ..., floats: bool = False) -> np.ndarray[Any, Any]:
        """An array key of integers (or bools), or with `floats` of floats."""
        v = self._find(key, default)
        if v is None:
            return default
        if not v.is_array or v.type not in ((6, 12) if floats else _INTS | {7}):
            raise self._fail(key, f"an array of {'floats' if floats else 'integers'}", v)
        return np.asarray(v.value)

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())


def split_paths(path: Path, n_parts: int) -> list[Path]:
    """All parts of a file that says it has so many, in order. Errors: FormatError names the first missing part."""
    if n_parts <= 1:
        return [path]
    match = _SPLIT.match(path.name)
    if n_parts > MAX_SPLITS or match is None or int(match[3]) != n_parts:
        raise FormatError(f"{path.name}: split.count: expected at most {MAX_SPLITS} parts, and a name such as "
                          f"NAME-00001-of-{n_parts:05d}.gguf, got {n_parts} parts")  # fmt: skip
    paths = [path.with_name(f"{match[1]}-{i:05d}-of-{n_parts:05d}.gguf") for i in range(1, n_parts + 1)]
    for p in paths:
        if not p.exists():
            raise FormatError(f"{p}: part of a split file is missing; expected {n_parts} parts beside {path.name}")
    return paths
