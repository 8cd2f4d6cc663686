"""What other workers may read of the weights that are here: in buffers, in the cache, in a copy of the model's file.

Who names the hash of a weight may have it, as one may who asks the cache. Whoever reads verifies what came; but bytes of the
model folder are given only once they have been found to have that hash, since they could be anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from protocol import limits
from protocol import messages as m
from workers.cache import Cache, ModelFolder
from workers.devices.base import Buffer, Device
from workers.ticks import PIECE_BYTES, Tick

MAX_VERIFIED = 4096
"""Weights in files that are remembered to be what their hashes say."""


class Stamp(NamedTuple):
    """What a file is known by as long as nobody writes to it."""

    device: int
    inode: int
    size: int
    changed_ns: int


class Sources:
    """Those of one device's worker. Threads: use from one."""

    def __init__(
        self, device: Device[Any], cache: Cache | None, models: ModelFolder | None,
        holder: Callable[[m.Weight], tuple[Buffer, int] | None],
    ) -> None:  # fmt: skip
        """holder: a buffer that holds a weight which was verified, and where it is there."""
        self.device, self.cache, self.models, self._holder = device, cache, models, holder
        self._verified: dict[m.Weight, Stamp] = {}

    def have(self, weight: m.Weight, tick: Tick) -> bool:
        """Whether it could be read here; its bytes are not looked at."""
        if self._holder(weight) is not None:
            return True
        kept = self.cache is not None and self.cache.has(weight.hash, weight.n_bytes, tick)
        return kept or self._stamp(weight, tick) is not None

    def read(self, weight: m.Weight, at: int, tick: Tick) -> bytes | memoryview | None:
        """Its bytes from `at` on, a chunk at most. None: it is not here, or what is here is something else."""
        n = min(limits.MAX_CHUNK_BYTES, weight.n_bytes - at)
        if n <= 0:
            return None
        held = self._holder(weight)
        if held is not None:
            buffer, offset = held
            return self.device.read(buffer, offset + at, n, tick)
        chunk = self.cache.chunk(weight.hash, weight.n_bytes, at, n, tick) if self.cache is not None else None
        return chunk or self._of_file(weight, at, n, tick)

    def _stamp(self, weight: m.Weight, tick: Tick) -> Stamp | None:
        if self.models is None or not weight.file:
            return None
        info = self.models.look(weight.file, weight.file_offset + weight.n_bytes, tick)
        return Stamp(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns) if info is not None else None

    def _of_file(self, weight: m.Weight, at: int, n: int, tick: Tick) -> bytes | None:
        stamp = self._stamp(weight, tick)
        if self.models is None or stamp is None:
            return None
        if self._verified.get(weight) != stamp:
            reader = self.models.open(weight.file, weight.file_offset, weight.n_bytes, weight.hash, tick)
            if reader is None:
                return None
            with reader:
                for _ in reader.pieces(PIECE_BYTES, tick):
                    tick()
            if not reader.good:
                return None
            self._verified.pop(weight, None)
            while len(self._verified) >= MAX_VERIFIED:
                del self._verified[next(iter(self._verified))]
            self._verified[weight] = stamp
        chunk = self.models.chunk(weight.file, weight.file_offset + at, n, tick)
        return chunk if self._stamp(weight, tick) == stamp else None  # else it may have been written to meanwhile
