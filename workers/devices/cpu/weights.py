"""How weights lie on the CPU device: rows packed in groups as products read them, and copies of types without products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from protocol.dtypes import TYPES, GGMLType, row_bytes
from protocol.errors import OutOfMemory
from protocol.graph import Tensor
from workers.devices.base import Source
from workers.devices.host import HostBuffer, HostDevice
from workers.devices.lower import Lowered
from workers.kernels import layout
from workers.kernels.native import Team
from workers.tensors import Bytes, load
from workers.ticks import PIECE_BYTES, Tick, completing, pieces

MAX_GROUP_BYTES = 16 << 20
"""Longer rows are not packed: a group of them is packed at once, by way of scratch memory."""
WIDENED_BLOCKS = 1 << 12
"""Blocks of weights that are widened at once."""

Ne = tuple[int, int, int, int]


@dataclass(slots=True, eq=False)
class CPUBuffer(HostBuffer):
    """Attributes:
    packed: byte offset of each tensor that is held in packed groups -> its type, ne and size.
    widened: byte offset of each tensor that is multiplied as a copy of another type -> the copy.
    n_layouts: how often these have changed; a plan that was bound to another layout is bound again.
    """

    packed: dict[int, tuple[GGMLType, Ne, int]] = field(default_factory=dict)
    widened: dict[int, CPUBuffer] = field(default_factory=dict)
    n_layouts: int = 0

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)


class Copy:
    """Bytes that are in memory already, as a source: each piece is a copy, so that it may be overwritten where it lay."""

    good = False

    def __init__(self, memory: Bytes) -> None:
        self.memory = memory

    def pieces(self, size: int, tick: Tick) -> Iterator[memoryview]:
        for at, n in pieces(len(self.memory), size):
            yield self.memory[at : at + n].copy().data
        self.good = True


def shape_of(type_id: int, ne: Ne) -> tuple[int, int, int, int]:
    """Kind, bytes of a row, groups that are packed, and blocks of a row."""
    rows = ne[1] * ne[2] * ne[3]
    info = TYPES[type_id]
    return layout.KIND_OF[GGMLType(type_id)], row_bytes(type_id, ne[0]), rows // layout.GROUP, ne[0] // info.block


def packable(type_id: int, ne: Ne) -> bool:
    if type_id not in layout.KIND_OF or ne[1] < layout.GROUP or (ne[2] * ne[3] != 1 and ne[1] % layout.GROUP):
        return False
    if layout.GROUP * row_bytes(type_id, ne[0]) > MAX_GROUP_BYTES:
        return False
    return not (ne[0] % 32 and TYPES[type_id].quantized)


class Weights:
    """Brings weights from GGUF's layout into the device's own and back.

    Threads: use from the device's.
    """

    def __init__(self, device: HostDevice[CPUBuffer], team: Callable[[], Team]) -> None:
        self._device, self._team = device, team

    def pack(self, buffer: CPUBuffer, offset: int, n_bytes: int, type_id: int, ne: Ne, source: Source, tick: Tick) -> None:
        """Store a packable weight as packed groups, which come as rows, a piece at a time."""
        self._pack(type_id, ne, source, buffer.memory[offset : offset + n_bytes], tick)
        if source.good:
            buffer.packed[offset] = (GGMLType(type_id), ne, n_bytes)
            buffer.n_layouts += 1

    def _pack(self, type_id: int, ne: Ne, source: Source, target: Bytes, tick: Tick) -> None:
        """Rows as packed groups; those that are left over stay as they are."""
        kind, row, _, n_blocks = shape_of(type_id, ne)
        group = layout.GROUP * row
        at = 0
        for piece in source.pieces(max(1, PIECE_BYTES // group) * group, tick):
            rows = np.frombuffer(piece, np.uint8)
            n = len(rows) // group
            self._team().call(layout.PACK_ROWS, kind, rows.ctypes.data, row, n, n_blocks, target.ctypes.data + at)
            target[at + n * group : at + len(rows)] = rows[n * group :]
            at += len(rows)
            tick()

    def forget(self, buffer: CPUBuffer, offset: int, n_bytes: int, tick: Tick) -> None:
        """Drop the widened copies of what these bytes belong to; plans that use them are bound again."""
        for at in [at for at, copy in buffer.widened.items() if at < offset + n_bytes and offset < at + copy.n_bytes]:
            self._device.free(buffer.widened.pop(at), tick)
            buffer.n_layouts += 1

    def _unpacked(self, buffer: CPUBuffer, at: int, first: int, last: int) -> Bytes:
        """Rows of a packed tensor in GGUF's layout. Shapes: uint8 [(last - first) * row_bytes]."""
        type_id, ne, _ = buffer.packed[at]
        kind, row, n_groups, n_blocks = shape_of(type_id, ne)
        out = np.empty((last - first) * row, np.uint8)
        self._team().call(layout.UNPACK_ROWS, kind, buffer.address + at, row, first, last, layout.GROUP * n_groups,
                          n_blocks, out.ctypes.data)  # fmt: skip
        return out

    def _groups(self, buffer: CPUBuffer, at: int, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
        """Rows of a packed tensor that hold its bytes low..high, a piece of whole groups at a time.

        Returns: the first row and the one behind the last, and where their bytes begin and end in the tensor.
        """
        type_id, ne, size = buffer.packed[at]
        _, row, _, _ = shape_of(type_id, ne)
        group = layout.GROUP * row
        piece = max(1, PIECE_BYTES // group) * group
        for start in range(low // group * group, high, piece):
            end = min(start + piece, size)
            yield start // row, end // row, start, end

    def widened(self, buffer: CPUBuffer | None, t: Tensor, tick: Tick) -> tuple[int, int] | None:
        """Address and packed rows of a float16 copy of weights whose type has no products of its own.

        Errors: OutOfMemory where there is no room for one.
        """
        if buffer is None or t.op != "NONE" or not TYPES[t.type].quantized:
            return None
        if t.offset not in buffer.widened:
            buffer.widened[t.offset] = self._widen(buffer, t, tick)
        packs = packable(GGMLType.F16, t.ne)
        return buffer.widened[t.offset].address, t.ne[1] // layout.GROUP * layout.GROUP if packs else 0

    def _widen(self, buffer: CPUBuffer, t: Tensor, tick: Tick) -> CPUBuffer:
        n_bytes, free = 2 * t.n_elements, self._device.free_bytes()
        if n_bytes > free:
            name = TYPES[t.type].type.name
            raise OutOfMemory(f"{self._device.name}: {name} weights are multiplied as float16, which needs {n_bytes} bytes "
                              f"more, {free} are free", n_bytes, free)  # fmt: skip
        block, block_bytes = TYPES[t.type].block, TYPES[t.type].bytes
        n_blocks = t.n_elements // block
        blocks = buffer.memory[t.offset : t.offset + n_blocks * block_bytes].reshape(1, 1, 1, n_blocks, block_bytes)
        copy = self._device.alloc(n_bytes)
        try:
            halves = copy.memory.view(np.float16)
            for at, n in pieces(n_blocks, WIDENED_BLOCKS):
                values = load(blocks[:, :, :, at : at + n], t.type, np.float32)
                halves[at * block : (at + n) * block] = values.ravel()
                tick()
            if packable(GGMLType.F16, t.ne):
                self._pack(GGMLType.F16, t.ne, Copy(copy.memory), copy.memory, tick)
        except BaseException:
            self._device.free(copy)
            raise
        return copy

    def unpack(self, buffer: CPUBuffer, offset: int, n_bytes: int, tick: Tick) -> None:
        """Bring every packed tensor that these bytes touch back to GGUF's layout."""
        touched = [(at, p) for at, p in buffer.packed.items() if at < offset + n_bytes and offset < at + p[2]]
        with completing(tick) as steady:
            for at, (_, _, size) in touched:
                for first, last, start, end in self._groups(buffer, at, 0, size):
                    buffer.memory[at + start : at + end] = self._unpacked(buffer, at, first, last)
                    steady()
                del buffer.packed[at]
                buffer.n_layouts += 1

    def read(self, buffer: CPUBuffer, offset: int, out: memoryview, tick: Tick) -> None:
        """Put what is packed back in its places of bytes that were read from `offset` on."""
        for at, (_, _, size) in buffer.packed.items():
            low, high = max(at, offset), min(at + size, offset + len(out))
            if low < high:
                for first, last, start, end in self._groups(buffer, at, low - at, high - at):
                    a, b = max(at + start, low), min(at + end, high)
                    rows = self._unpacked(buffer, at, first, last).data
                    out[a - offset : b - offset] = rows[a - at - start : b - at - start]
                    tick()

    def settle(self, lowered: Lowered, buffers: Mapping[int, CPUBuffer], tick: Tick) -> None:
        """Bring back to GGUF's layout what a graph uses in a way that does not fit the packed one."""
        for i, (t, place) in enumerate(zip(lowered.graph.tensors, lowered.places, strict=True)):
            buffer = buffers.get(place.buffer)
            if buffer is not None and buffer.packed:
                packed = buffer.packed.get(place.start) if i in lowered.weights else None
                if packed is None or packed[:2] != (t.type, t.ne):
                    self.unpack(buffer, place.start, place.end - place.start, tick)
