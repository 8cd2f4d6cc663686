"""Weights on their way into buffers: chunks come in order, and count when all have come and have the hash.

An upload that breaks off can be gone on with: while its buffer is there from what came, and behind that from what a cache
holds of it, also when the worker was started again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from protocol import messages as m
from protocol.errors import Overloaded, ProtocolError
from workers.cache import Cache
from workers.devices.base import Buffer, Device
from workers.growing import Growing
from workers.leases import overlap
from workers.ticks import PIECE_BYTES, Tick
from workers.work import Key, Write

MAX_UPLOADS = 64


@dataclass(slots=True)
class Upload:
    """Attributes:
    hash: of what came, the first `at` bytes.
    entry: of the cache, into which they go.
    """

    digest: bytes
    n_bytes: int
    entry: Growing | None
    hash: Any = field(default_factory=blake3)
    at: int = 0

    def leave(self) -> None:
        if self.entry is not None:
            self.entry.leave()


class Uploads:
    """Those of one device. Threads: use from its own."""

    def __init__(self, device: Device[Any], cache: Cache | None) -> None:
        self.device, self.cache = device, cache
        self._under_way: dict[tuple[Key, int, int], Upload] = {}

    def write(self, work: Write, buffer: Buffer, tick: Tick) -> None:
        """Store a chunk of a weight with a hash; with the last one the weight is there.

        Errors: ProtocolError when the bytes have another hash than they should, or when what came before was overwritten;
            Overloaded.
        """
        h, at = work.h, (work.key, work.h.buffer, work.h.offset)
        data = memoryview(work.request.payload[0])
        if not h.at:
            self._room(work.key)
            entry = self.cache.begin(h.hash, h.n_bytes) if self.cache is not None else None
            self._under_way[at] = Upload(h.hash, h.n_bytes, entry)
        upload = self._under_way.get(at)
        if upload is None:
            raise ProtocolError(f"SET_TENSOR: byte {h.at}: expected what came before it, but that has been overwritten; "
                                "send the tensor again")  # fmt: skip
        try:
            self.device.write(buffer, h.offset + h.at, data, tick)
            self._note(upload, data, tick)
        except BaseException:
            del self._under_way[at]
            upload.leave()
            raise
        if not work.last:
            return
        del self._under_way[at]
        if upload.hash.digest() != h.hash:
            if upload.entry is not None:
                upload.entry.drop()  # nobody can make that right by sending the rest
            raise ProtocolError("SET_TENSOR: the bytes received do not have the hash that was announced; send them again")
        if upload.entry is not None:
            upload.entry.keep()
        self.device.finish(buffer, h.offset, h.n_bytes, h.type, h.ne, tick)

    def _note(self, upload: Upload, data: memoryview, tick: Tick) -> None:
        while data:
            piece = data[: PIECE_BYTES - upload.at % PIECE_BYTES]
            upload.hash.update(piece)
            upload.at += len(piece)
            if upload.entry is not None:
                upload.entry.add(piece, tick, b"" if upload.at % PIECE_BYTES else upload.hash.digest())
            data = data[len(piece) :]
            tick()

    def under_way(self, key: Key, h: m.SetTensorHash) -> int:
        """How many bytes of a weight have come into this very place; 0: nothing."""
        upload = self._under_way.get((key, h.buffer, h.offset))
        return upload.at if upload is not None and (upload.digest, upload.n_bytes) == (h.hash, h.n_bytes) else 0

    def resume(self, key: Key, h: m.SetTensorHash, buffer: Buffer, tick: Tick) -> int:
        """Fill in what the cache has of a weight whose upload broke off. Returns: so many bytes."""
        self._room(key)
        entry = self.cache.resume(h.hash, h.n_bytes, tick) if self.cache is not None else None
        if entry is None:
            return 0
        upload = Upload(h.hash, h.n_bytes, entry)
        try:
            for piece, so_far in entry.left(tick):
                self.device.write(buffer, h.offset + upload.at, piece, tick)
                upload.hash = so_far
                upload.at += len(piece)
        except BaseException:
            upload.leave()
            raise
        if upload.at:
            self._under_way[key, h.buffer, h.offset] = upload
        else:
            entry.drop()
        return upload.at

    def _room(self, key: Key) -> None:
        if sum(k[0] == key for k in self._under_way) >= MAX_UPLOADS:
            raise Overloaded(f"SET_TENSOR: {MAX_UPLOADS} tensors of this session are on their way; finish one first")

    def changed(self, key: Key, buffer: int, part: range) -> None:
        """Something else comes into these bytes."""
        self._leave([k for k, u in self._under_way.items()
                     if k[:2] == (key, buffer) and overlap(range(k[2], k[2] + u.n_bytes), part)])  # fmt: skip

    def leave(self, key: Key, buffer: int = 0) -> None:
        """Nothing more comes into a buffer; 0: into none of the session."""
        self._leave([k for k in self._under_way if k[0] == key and buffer in (0, k[1])])

    def _leave(self, places: list[tuple[Key, int, int]]) -> None:
        for place in places:
            self._under_way.pop(place).leave()
