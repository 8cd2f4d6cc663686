"""Weights and memory on devices, a layer at a time: allocated, asked for by hash, and sent where they are missing.

A layer's weights are one buffer and its memory is another, so that a layer can be moved, or a model freed, alone. What a
stage holds besides its layers, the embedding or the output, is a buffer of its own.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec import Struct, field

from ggmq.archs.base import Arch
from ggmq.archs.memory import LayerMemory, Room, aligned
from ggmq.archs.stage import Placed, Stage
from ggmq.cluster import Client
from ggmq.gguf import TensorInfo
from ggmq.placement import Assignment
from protocol import limits
from protocol import messages as m
from protocol.content import content_name
from protocol.errors import HandleError

HASH_WINDOW = 64
"""Questions for hashes that are under way at once."""

Progress = Callable[[str, int, int], None]
"""Called with a phase, units done and units in all."""


class LoadReport(Struct):
    """Units: bytes; `sent_bytes` went over the bus, `cached_bytes` were found by hash where they were needed: in a cache, or
    in a copy of the file; `kept_bytes` were in the workers' memory, from a run before."""

    sent_bytes: int = 0
    cached_bytes: int = 0
    kept_bytes: int = 0
    n_tensors: int = 0


class Part(Struct):
    """What is loaded and freed together: a layer, or what a stage holds besides its layers.

    Attributes:
        device: where it lies.
        buffer: of its weights.
        placed: its weights.
        n_bytes: of that buffer.
        memory: what a layer keeps of the sequences, in a buffer of its own.
        loaded: the weights are there.
    """

    device: int
    buffer: int
    placed: list[Placed]
    n_bytes: int
    memory: LayerMemory | None = None
    loaded: bool = False

    @property
    def buffers(self) -> list[int]:
        return [self.buffer, *([self.memory.buffer] if self.memory is not None and self.memory.n_bytes else [])]


class PlacedStage(Struct):
    """A stage and where everything of it lies.

    Attributes:
        parts: by layer; below 0 for what is not a layer's: -1, and of a stage that grew what it lacked of it.
    """

    assignment: Assignment
    parts: dict[int, Part] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        a = self.assignment
        return Stage(a.device, a.layers, a.first, a.last)

    @property
    def placed(self) -> dict[str, Placed]:
        return {p.info.name: p for part in self.parts.values() for p in part.placed}

    @property
    def memory(self) -> dict[int, LayerMemory]:
        return {il: part.memory for il, part in self.parts.items() if part.memory is not None}


class Loader:
    """Loads parts of one model.

    Threads: use from one.
    """

    def __init__(self, client: Client, arch: Arch, room: Room) -> None:
        self.client, self.arch, self.room = client, arch, room
        self.report = LoadReport()

    def place(self, assignment: Assignment, parts: Mapping[int, Part] | None = None) -> PlacedStage:
        """Number the buffers of a stage, and say what lies where in them. Nothing is sent.

        parts: what is on its device already and stays as it is.
        """
        placed = PlacedStage(assignment, dict(parts or {}))
        there, other = placed.placed, min([0, *placed.parts]) - 1
        weights: dict[int, list[TensorInfo]] = {il: [] for il in (other, *assignment.layers)}
        for t in self.arch.stage_weights(placed.stage):
            if t.name not in there:
                weights[int(t.name.split(".", 2)[1]) if t.name.startswith("blk.") else other].append(t)
        for il, tensors in weights.items():
            if il in placed.parts or (il < 0 and not tensors):
                continue
            part = Part(assignment.device, self.client.new_buffer(), [], 0)
            for t in tensors:
                part.placed.append(Placed(t, part.buffer, part.n_bytes))
                part.n_bytes += aligned(t.n_bytes)
            if il >= 0:
                part.memory = LayerMemory(self.arch.memory(il), self.room, self.client.new_buffer())
            placed.parts[il] = part
        return placed

    def load(self, parts: Sequence[Part], hashes: dict[str, bytes], progress: Progress | None = None) -> None:
        """Allocate and fill. What is there from a run before is not asked for, what is found by hash is not sent.

        Errors: what the workers report.
        """
        client, asked, pending = self.client, [], []
        for part in parts:
            name = content_name(max(part.n_bytes, 1), (p.part(hashes[p.info.name]) for p in part.placed))
            alloc = m.AllocBuffer(client.session, part.buffer, max(part.n_bytes, 1), name)
            asked.append(client.submit(alloc, device=part.device))
            if part.memory is not None and part.memory.n_bytes:
                alloc = m.AllocBuffer(client.session, part.memory.buffer, part.memory.n_bytes)
                pending.append(client.submit(alloc, device=part.device))
        there = [client.found(seq) for seq in asked]
        for seq in pending:
            client.wait(seq)
        sizes = [sum(p.info.n_bytes for p in part.placed) for part in parts]
        kept = sum(n for n, is_there in zip(sizes, there, strict=True) if is_there)
        self.report.kept_bytes += kept
        by_device: dict[int, list[Placed]] = {}
        for part, is_there in zip(parts, there, strict=True):
            if not is_there:
                by_device.setdefault(part.device, []).extend(part.placed)
        uploads = [Upload(self, device, weights, hashes) for device, weights in by_device.items()]
        done, total = kept, sum(sizes)
        while any(u.busy for u in uploads):
            for u in uploads:
                done += u.advance()
                if progress is not None:
                    progress("loading", done, total)
        for part in parts:
            part.loaded = True

    def free(self, parts: Iterable[Part]) -> None:
        """Give back what parts hold, as far as it is there. Errors: Unavailable when a worker cannot be told."""
        asked = [self.client.submit(m.FreeBuffer(self.client.session, buffer), device=part.device)
                 for part in parts for buffer in part.buffers]  # fmt: skip
        for seq in asked:
            with contextlib.suppress(HandleError):
                self.client.wait(seq)


class Upload:
    """Fills weights of one device: asked for by hash first, what is missing sent in chunks under credits."""

    def __init__(self, loader: Loader, device: int, weights: Iterable[Placed], hashes: dict[str, bytes]) -> None:
        self.gguf, self.client, self.report, self.hashes = loader.arch.gguf, loader.client, loader.report, hashes
        self.device = device
        self.to_ask = deque(weights)
        self.asked: deque[tuple[int, Placed]] = deque()
        self.to_send: deque[Placed] = deque()
        self.at = 0
        self.sent: deque[tuple[int, int]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.to_ask or self.asked or self.to_send or self.sent)

    def advance(self) -> int:
        """Keep the windows full, then wait for one reply. Returns: bytes that are now in place."""
        session, report = self.client.session, self.report
        while self.to_ask and len(self.asked) < HASH_WINDOW:
            p = self.to_ask.popleft()
            t = p.info
            file = self.gguf.paths[t.part].name
            query = m.SetTensorHash(session, p.buffer, p.offset, t.n_bytes, self.hashes[t.name], int(t.type), t.ne,
                                    file[:256], t.offset)  # fmt: skip
            self.asked.append((self.client.submit(query, device=self.device), p))
            report.n_tensors += 1
        while self.to_send and len(self.sent) < limits.CREDIT_CHUNKS:
            p = self.to_send[0]
            t = p.info
            chunk = self.gguf.data(t.name)[self.at : self.at + limits.MAX_CHUNK_BYTES]
            part = m.SetTensor(session, p.buffer, p.offset, t.n_bytes, self.at, int(t.type), t.ne, self.hashes[t.name])
            self.sent.append((self.client.submit(part, [chunk], device=self.device), len(chunk)))
            report.sent_bytes += len(chunk)
            self.at += len(chunk)
            if self.at == t.n_bytes:
                self.to_send.popleft()
                self.at = 0
        if self.sent and (not self.asked or len(self.sent) == limits.CREDIT_CHUNKS):
            seq, n = self.sent.popleft()
            self.client.wait(seq)
            return n
        if self.asked:
            seq, p = self.asked.popleft()
            if self.client.found(seq):
                report.cached_bytes += p.info.n_bytes
                return p.info.n_bytes
            self.to_send.append(p)
        return 0
