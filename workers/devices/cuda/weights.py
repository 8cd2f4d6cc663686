"""How weights lie on a CUDA device: packed where they lay (`kernels/cuda/planes.py`), and F16 copies of types without
products.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from protocol.dtypes import TYPES, GGMLType, row_bytes
from protocol.graph import Tensor
from workers.devices.base import Buffer, Source
from workers.devices.cuda.copies import Copies, wait_for_all
from workers.devices.cuda.driver import Driver, Grid
from workers.devices.lower import Lowered, Node
from workers.kernels.cuda.planes import TILE, format_of, packable
from workers.kernels.cuda.product_launches import Pack, PackedRows, Unpack
from workers.kernels.cuda.sources import Kernel
from workers.tensors import load
from workers.ticks import PIECE_BYTES, Tick, completing, pieces

Ne = tuple[int, int, int, int]
WIDENED_BLOCKS = 1 << 14
"""Blocks of weights that are widened at once."""
MAX_TILE_BYTES = 16 << 20
"""Longer rows are not packed: a tile of them goes through staging memory."""


class Memory:
    """Device memory that is given back when nobody holds this any more."""

    def __init__(self, driver: Driver, n_bytes: int) -> None:
        self.address = driver.alloc(max(1, n_bytes))
        self.n_bytes = n_bytes
        self.free = weakref.finalize(self, driver.free, self.address)


@dataclass(slots=True, eq=False)
class CUDABuffer(Buffer):
    """Attributes:
    memory: where it lies.
    packed: byte offset of each tensor that is held packed -> its type, ne and size.
    widened: byte offset of each tensor that is multiplied as a packed F16 copy -> the copy.
    n_layouts: how often these have changed; a plan that was bound to another layout is bound again.
    """

    memory: Memory | None
    packed: dict[int, tuple[GGMLType, Ne, int]] = field(default_factory=dict)
    widened: dict[int, Memory] = field(default_factory=dict)
    n_layouts: int = 0

    @property
    def address(self) -> int:
        return self.memory.address if self.memory is not None else 0


def row_shape(type_id: int, ne: Ne) -> tuple[int, int]:
    """Bytes of a row, and rows of the whole tensor."""
    return row_bytes(type_id, ne[0]), ne[1] * ne[2] * ne[3]


def packs(type_id: int, ne: Ne, address: int) -> bool:
    """Whether a weight at this address is packed when all of it has come."""
    return packable(type_id, ne) and address % 16 == 0 and TILE * row_bytes(type_id, ne[0]) <= MAX_TILE_BYTES


class Weights:
    """Brings weights from GGUF's layout into the device's own and back.

    Threads: use from the device's.
    """

    def __init__(self, driver: Driver, copies: Copies) -> None:
        self._driver, self.copies = driver, copies
        self._room: Memory | None = None

    def raw_room(self, n_bytes: int) -> int:
        """Device memory for rows in GGUF's layout on their way; what is on the stream comes first."""
        if self._room is None or self._room.n_bytes < n_bytes:
            self._room = Memory(self._driver, n_bytes)
        return self._room.address

    def trim(self) -> None:
        self._room = None

    def move(self, record: type[PackedRows], type_id: int, ne: Ne, raw: int, packed: int, first: int, n: int,
             tick: Tick) -> None:  # fmt: skip
        """Put on the stream: rows `first` to `first + n` between the two layouts."""
        kernel = Kernel(record.file, record.function, (("FORMAT", str(format_of(type_id))),))
        _, n_rows = row_shape(type_id, ne)
        argument = record(raw=raw, packed=packed, n_rows=n_rows, k=ne[0], first=first, n=n)
        blocks = n * (ne[0] // max(32, TYPES[type_id].block))
        self._driver.launch(self._driver.function(kernel, tick), Grid(-(-blocks // 128), 1, 128), argument)

    def pack(self, buffer: CUDABuffer, offset: int, n_bytes: int, type_id: int, ne: Ne, source: Source, tick: Tick) -> None:
        """Store a packable weight, which comes as rows, a piece at a time."""
        row, _ = row_shape(type_id, ne)
        tile = TILE * row
        size = max(1, PIECE_BYTES // tile) * tile
        at = 0
        for i, piece in enumerate(source.pieces(size, tick)):
            room = self.raw_room(2 * size) + (i % 2) * size
            self.copies.put(room, piece, tick)
            self.move(Pack, type_id, ne, room, buffer.address + offset, at // row, len(piece) // row, tick)
            at += len(piece)
            tick()
        self.copies.settle(tick)
        if source.good:
            buffer.packed[offset] = (GGMLType(type_id), ne, n_bytes)
            buffer.n_layouts += 1

    def pack_here(self, buffer: CUDABuffer, offset: int, n_bytes: int, type_id: int, ne: Ne, tick: Tick) -> None:
        """A weight that lies in GGUF's layout where it is to lie packed. Errors: OutOfMemory, before anything is changed."""
        raw = Memory(self._driver, n_bytes)
        self._driver.copy(raw.address, buffer.address + offset, n_bytes)
        self.move(Pack, type_id, ne, raw.address, buffer.address + offset, 0, row_shape(type_id, ne)[1], tick)
        wait_for_all(self._driver, tick)
        buffer.packed[offset] = (GGMLType(type_id), ne, n_bytes)
        buffer.n_layouts += 1

    def forget(self, buffer: CUDABuffer, offset: int, n_bytes: int) -> None:
        """Drop the widened copies of what these bytes belong to; plans that use them are bound again."""
        for at in [at for at, copy in buffer.widened.items() if at < offset + n_bytes and offset < at + copy.n_bytes]:
            del buffer.widened[at]
            buffer.n_layouts += 1

    def unpack(self, buffer: CUDABuffer, offset: int, n_bytes: int, tick: Tick) -> None:
        """Bring every packed tensor that these bytes touch back to GGUF's layout. Errors: OutOfMemory."""
        touched = [(at, p) for at, p in buffer.packed.items() if at < offset + n_bytes and offset < at + p[2]]
        for at, (type_id, ne, size) in touched:
            raw = Memory(self._driver, size)
            self.move(Unpack, type_id, ne, raw.address, buffer.address + at, 0, row_shape(type_id, ne)[1], tick)
            self._driver.copy(buffer.address + at, raw.address, size)
            with completing(tick) as steady:
                wait_for_all(self._driver, steady)
                del buffer.packed[at]
                buffer.n_layouts += 1
                steady()

    def _tiles(self, type_id: int, ne: Ne, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Rows of a packed tensor that hold its bytes low..high, a piece of whole tiles at a time: first, and how many."""
        row, n_rows = row_shape(type_id, ne)
        each = max(1, PIECE_BYTES // (TILE * row)) * TILE
        for first in range(low // (TILE * row) * TILE, -(-high // row), each):
            yield first, min(each, n_rows - first)

    def read(self, buffer: CUDABuffer, offset: int, out: memoryview, tick: Tick) -> None:
        """Put what is packed back in its places of bytes that were read from `offset` on."""
        for at, (type_id, ne, size) in buffer.packed.items():
            low, high = max(at, offset), min(at + size, offset + len(out))
            if low >= high:
                continue
            row, _ = row_shape(type_id, ne)
            for first, n in self._tiles(type_id, ne, low - at, high - at):
                room = self.raw_room(n * row)
                self.move(Unpack, type_id, ne, room, buffer.address + at, first, n, tick)
                rows = self.copies.fetch(room, n * row, tick)
                start = at + first * row
                a, b = max(start, low), min(start + n * row, high)
                out[a - offset : b - offset] = rows[a - start : b - start].data

    def widened(self, buffer: CUDABuffer | None, t: Tensor, tick: Tick) -> int | None:
        """Address of a packed F16 copy of weights whose type has no products of its own. Errors: OutOfMemory."""
        if buffer is None or t.op != "NONE" or not TYPES[t.type].quantized or not packable(GGMLType.F16, t.ne):
            return None
        if t.offset not in buffer.widened:
            buffer.widened[t.offset] = self._widen(buffer, t, tick)
        return buffer.widened[t.offset].address

    def _widen(self, buffer: CUDABuffer, t: Tensor, tick: Tick) -> Memory:
        info, n_blocks = TYPES[t.type], t.n_elements // TYPES[t.type].block
        wide, raw = Memory(self._driver, 2 * t.n_elements), Memory(self._driver, 2 * t.n_elements)
        for at, n in pieces(n_blocks, WIDENED_BLOCKS):
            blocks = self.copies.fetch(buffer.address + t.offset + at * info.bytes, n * info.bytes, tick)
            with np.errstate(over="ignore"):  # what is beyond F16 is infinite there
                values = load(blocks.reshape(1, 1, 1, n, info.bytes), t.type, np.float32).astype(np.float16)
            self.copies.store(raw.address + 2 * at * info.block, values.reshape(-1).data, tick)
        self.move(Pack, GGMLType.F16, t.ne, raw.address, wide.address, 0, t.n_rows, tick)
        with completing(tick) as steady:
            self.copies.settle(steady)
            wait_for_all(self._driver, steady)
        return wide

    def settle(self, lowered: Lowered, buffers: Mapping[int, CUDABuffer], tick: Tick) -> None:
        """Bring back to GGUF's layout what a graph uses in a way that does not fit the packed one."""
        for i, (t, place) in enumerate(zip(lowered.graph.tensors, lowered.places, strict=True)):
            buffer = buffers.get(place.buffer)
            if buffer is not None and buffer.packed:
                packed = buffer.packed.get(place.start) if i in lowered.weights else None
                if packed is None or packed[:2] != (t.type, t.ne):
                    self.unpack(buffer, place.start, place.end - place.start, tick)

    def settle_node(self, lowered: Lowered, node: Node, buffers: Mapping[int, CUDABuffer], tick: Tick) -> None:
        """The same for what a node reads that the host computes."""
        for i in node.tensor.src:
            if i >= 0 and lowered.places[i].buffer in buffers:
                place = lowered.places[i]
                self.unpack(buffers[place.buffer], place.start, place.end - place.start, tick)
