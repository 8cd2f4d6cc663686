"""Weights and memory on devices, a layer at a time: allocated, asked for by hash, and sent where they are missing.

A layer's weights are one buffer and its memory is another, so that a layer can be moved, or a model freed, alone. What a
stage holds besides its layers, the embedding or the output, is a buffer of its own.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec import Struct, field

from ggmq.archs.base import Arch
from ggmq.archs.memory import Cells, LayerMemory, Room, aligned
from ggmq.archs.stage import Placed, Stage
from ggmq.cluster import Client
from ggmq.gguf import TensorInfo
from ggmq.placement import Assignment
from ggmq.sources import Sources
from protocol import limits
from protocol import messages as m
from protocol.content import content_name
from protocol.errors import DeadlineExceeded, HandleError, ProtocolError

HASH_WINDOW = 64
"""Questions for hashes that are under way at once."""
FETCH_WINDOW = 2
"""Weights that one worker fetches from others at once."""
POLL_S = 0.02

Progress = Callable[[str, int, int], None]
"""Called with a phase, units done and units in all."""


class LoadReport(Struct):
    """Units: bytes; `sent_bytes` went over the bus, `cached_bytes` were found by hash where they were needed: in a cache, in
    a copy of the file, or of an upload that broke off; `fetched_bytes` came from other workers; `kept_bytes` were in the
    workers' memory, from a run before."""

    sent_bytes: int = 0
    cached_bytes: int = 0
    fetched_bytes: int = 0
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
        secret: by which that is found again when the broker has gone; empty where it must not be, since a step that is done
            again does not leave the same there.
        found: it was, as it had been left.
        loaded: the weights are there.
        kept: its weights were there from a run before.
    """

    device: int
    buffer: int
    placed: list[Placed]
    n_bytes: int
    memory: LayerMemory | None = None
    secret: bytes = b""
    found: bool = False
    loaded: bool = False
    kept: bool = False

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
                part.secret = secrets.token_bytes(limits.MIN_SECRET_BYTES) if isinstance(part.memory.keeps, Cells) else b""
            placed.parts[il] = part
        return placed

    def load(self, parts: Sequence[Part], hashes: dict[str, bytes], progress: Progress | None = None) -> None:
        """Allocate and fill. What is there from a run before is not asked for, what is found by hash is not sent, and what
        came before a connection broke is not sent again; so it may be called again after an error, for the same parts.

        Errors: what the workers report.
        """
        client, under_way = self.client, deque[int]()
        for part in parts:
            name = content_name(max(part.n_bytes, 1), (p.part(hashes[p.info.name]) for p in part.placed))
            alloc = m.AllocBuffer(client.session, part.buffer, max(part.n_bytes, 1), name)
            under_way.append(client.submit(alloc, device=part.device))
        with_memory = [(part, part.memory) for part in parts if part.memory is not None and part.memory.n_bytes]
        for part, memory in with_memory:
            alloc = m.AllocBuffer(client.session, memory.buffer, memory.n_bytes, secret=part.secret)
            under_way.append(client.submit(alloc, device=part.device))
        for part in parts:
            with contextlib.suppress(HandleError):  # it is there since the connection was there before: as it was
                part.kept = client.found(under_way.popleft())
                self.report.kept_bytes += sum(p.info.n_bytes for p in part.placed) if part.kept else 0
        for part, _ in with_memory:
            with contextlib.suppress(HandleError):
                part.found = client.found(under_way.popleft())
        sizes = [sum(p.info.n_bytes for p in part.placed) for part in parts]
        kept = sum(n for n, part in zip(sizes, parts, strict=True) if part.kept)
        by_device: dict[int, list[Placed]] = {}
        for part in parts:
            if not part.kept:
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


class Missing(Struct):
    """A weight that a worker lacks.

    Attributes:
        at: so many of its first bytes are there.
        resumed: whether those are of an upload that broke off, which nobody has verified yet.
    """

    placed: Placed
    at: int = 0
    resumed: bool = False


class Upload:
    """Fills weights of one device: asked for by hash first; what is missing is fetched from a worker that has it, or else
    sent in chunks under credits.

    Attributes:
        at: of the first weight to send, so many bytes are on their way or there.
        fetching: questions under way: seq, weight, the device that has it, and when it was asked, by the monotonic clock.
        sent: chunks under way: seq, weight, bytes.
    """

    def __init__(self, loader: Loader, device: int, weights: Iterable[Placed], hashes: dict[str, bytes]) -> None:
        self.gguf, self.client, self.report, self.hashes = loader.arch.gguf, loader.client, loader.report, hashes
        self.device = device
        self.sources = Sources(loader.client, device)
        self.to_ask = deque(weights)
        self.asked: deque[tuple[int, Placed]] = deque()
        self.missing: list[Missing] = []
        self.to_fetch: deque[tuple[Missing, int]] = deque()
        self.fetching: deque[tuple[int, Missing, int, float]] = deque()
        self.to_send: deque[Missing] = deque()
        self.sent: deque[tuple[int, Missing, int]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.to_ask or self.asked or self.missing or self.to_fetch or self.fetching or self.to_send or self.sent)

    def advance(self) -> int:
        """Keep the windows full, then wait for one reply. Returns: bytes that are now in place."""
        while self.to_ask and len(self.asked) < HASH_WINDOW:
            self._ask(self.to_ask.popleft())
        if len(self.to_send) > 1 and self.sources.come():  # what was not begun may come from there
            self.missing += [self.to_send.pop() for _ in range(len(self.to_send) - 1)][::-1]
        if self.missing and (not self.asked or len(self.missing) >= limits.MAX_WEIGHTS_ASKED):
            self._look_elsewhere()
        while self.to_fetch and len(self.fetching) < FETCH_WINDOW:
            self._fetch(*self.to_fetch.popleft())
        while self.to_send and len(self.sent) < limits.CREDIT_CHUNKS:
            self._send_chunk(self.to_send[0])
        if self.sent and (len(self.sent) == limits.CREDIT_CHUNKS or not (self.asked or self._fetched)):
            return self._stored(*self.sent.popleft())
        if self.asked:
            return self._answered(*self.asked.popleft())
        if self.fetching:
            with contextlib.suppress(DeadlineExceeded):  # others have something to be sent meanwhile
                self.client.await_reply(self.fetching[0][0], POLL_S)
        return self._came(*self.fetching.popleft()) if self._fetched else 0

    @property
    def _fetched(self) -> bool:
        """Whether it is known what became of the oldest question to another worker."""
        return bool(self.fetching) and self.client.answered(self.fetching[0][0])

    def _weight(self, p: Placed) -> m.Weight:
        t = p.info
        return m.Weight(self.hashes[t.name], t.n_bytes, self.gguf.paths[t.part].name[:256], t.offset)

    def _ask(self, p: Placed) -> None:
        w = self._weight(p)
        query = m.SetTensorHash(self.client.session, p.buffer, p.offset, w.n_bytes, w.hash, int(p.info.type), p.info.ne,
                                w.file, w.file_offset)  # fmt: skip
        self.asked.append((self.client.submit(query, device=self.device), p))
        self.report.n_tensors += 1

    def _answered(self, seq: int, p: Placed) -> int:
        header = self.client.wait(seq).header
        assert isinstance(header, m.Found)  # the decoder gives this command's reply this type
        there = p.info.n_bytes if header.found else _begun(header, p)
        self.report.cached_bytes += there
        if not header.found:
            self.missing.append(Missing(p, there, there > 0))
        return there

    def _look_elsewhere(self) -> None:
        """Decide where each missing weight comes from."""
        missing, self.missing = self.missing, []
        for weight, source in zip(missing, self.sources.of([self._weight(w.placed) for w in missing]), strict=True):
            if source is None:
                self.to_send.append(weight)
            else:
                self.to_fetch.append((weight, source))

    def _fetch(self, missing: Missing, source: int) -> None:
        p = missing.placed
        fetch = m.FetchTensor(self.client.session, p.buffer, p.offset, int(p.info.type), p.info.ne, self._weight(p), source)
        self.fetching.append((self.client.submit(fetch, device=self.device), missing, source, time.monotonic()))

    def _came(self, seq: int, missing: Missing, source: int, since_s: float) -> int:
        """What became of a weight that another worker was to send."""
        header = self.client.wait(seq).header
        assert isinstance(header, m.Found)  # the decoder gives this command's reply this type
        p, before = missing.placed, missing.at
        missing.at = p.info.n_bytes if header.found else _begun(header, p)
        came = missing.at - before
        self.report.fetched_bytes += max(0, came)
        if not header.found and came > 0 and time.monotonic() - since_s >= limits.FETCH_S:  # it takes long, and goes on
            self.to_fetch.appendleft((missing, source))
        elif not header.found:
            missing.resumed = missing.at > 0
            self.to_send.append(missing)
            self.sources.failed(source)
            self.to_send.extend(w for w, other in self.to_fetch if other == source)
            self.to_fetch = deque(of for of in self.to_fetch if of[1] != source)
        return came

    def _send_chunk(self, missing: Missing) -> None:
        p, t = missing.placed, missing.placed.info
        chunk = self.gguf.data(t.name)[missing.at : missing.at + limits.MAX_CHUNK_BYTES]
        part = m.SetTensor(self.client.session, p.buffer, p.offset, t.n_bytes, missing.at, int(t.type), t.ne,
                           self.hashes[t.name])  # fmt: skip
        self.sent.append((self.client.submit(part, [chunk], device=self.device), missing, len(chunk)))
        self.report.sent_bytes += len(chunk)
        missing.at += len(chunk)
        if missing.at == t.n_bytes:
            self.to_send.popleft()

    def _stored(self, seq: int, missing: Missing, n: int) -> int:
        try:
            self.client.wait(seq)
        except ProtocolError:
            if not missing.resumed:
                raise
            return n - self._begin_again(missing)
        return n

    def _begin_again(self, missing: Missing) -> int:
        """What an upload that broke off had left was not what it should be. Returns: so many bytes do not count any more."""
        counted = missing.at
        for seq, other, n in self.sent:
            if other is missing:
                counted -= n
                with contextlib.suppress(ProtocolError):
                    self.client.wait(seq)
        self.sent = deque(s for s in self.sent if s[1] is not missing)
        self.to_send = deque([Missing(missing.placed), *(w for w in self.to_send if w is not missing)])
        return counted


def _begun(header: m.Found, p: Placed) -> int:
    """So many bytes of a weight are there. A worker that says what cannot be has none."""
    return header.at if header.at < p.info.n_bytes else 0
