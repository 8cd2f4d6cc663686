"""A model on the bus: places its layers, uploads its weights by hash, runs batches through the stages.

`submit` sends one GRAPH_COMPUTE; activations pass from stage to stage by themselves, so the main host sees one round trip
a batch however many stages there are. Many batches may be under way: while one is at the second stage, the next is at the
first. That is how the pieces of a prompt and several sequences keep every stage busy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from broker.placement import Assignment, DeviceMemory, ModelSizes, place
from config.clock import LivedClock
from ggmq.archs.base import Arch
from ggmq.archs.stage import Batch, KVCache, Placed, Stage
from ggmq.cluster import Client
from ggmq.gguf import TensorInfo
from ggmq.manifest import tensor_hashes
from ggmq.upload import Upload
from protocol import limits
from protocol import messages as m
from protocol.content import content_name
from protocol.dtypes import GGMLType
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import DeadlineExceeded, FormatError, HandleError, OutOfMemory, Overloaded, Unavailable
from protocol.frames import Frame

ALIGN = 64
KV_STEP = 256
"""Cells seen are rounded up to this, so that a graph serves many tokens."""
CTX_STEP = 256
SLOT_STEP = 512
"""A slot's cells begin at a multiple of this: attention's blocks then fall alike in every slot, and so do the bits."""
TURN_S = 0.1
"""A compute of a prompt takes about so long when others wait for the same worker."""
MIN_PIECE = 16
PIECE = 64
"""Tokens of a prompt that move on together when there are several stages."""
MAX_GRAPHS = 128
MAX_TRIES = 3
"""So often in a row something is tried again that a worker's silence had ended."""

Progress = Callable[[str, int, int], None]
"""Called with a phase, units done and units in all."""


def model_sizes(arch: Arch, n_ctx: int) -> ModelSizes:
    """Bytes of each layer's weights and KV cache, of the embedding and of the output."""
    n = arch.hp.n_layer
    layers = [0] * n
    for il in range(n):
        layers[il] = _aligned(arch.stage_weights(Stage(0, range(il, il + 1), False, False)))
    shared = {t.name for t in arch.stage_weights(Stage(0, range(1), False, False)) if not t.name.startswith("blk.")}
    head = [t for t in arch.stage_weights(Stage(0, range(0), True, False)) if t.name not in shared]
    tail = [t for t in arch.stage_weights(Stage(0, range(0), False, True)) if t.name not in shared]
    tied = _aligned([t for t in tail if t in head])
    return ModelSizes(layers, [arch.kv_bytes(il, n_ctx) for il in range(n)], _aligned(head), _aligned(tail), tied)


def _aligned(tensors: Sequence[TensorInfo]) -> int:
    return sum(-(-t.n_bytes // ALIGN) * ALIGN for t in tensors)


def device_memory(infos: Sequence[m.ListedDevice]) -> list[DeviceMemory]:
    """Devices as placement sees them; lost ones are left out."""
    return [DeviceMemory(i, f"{d.worker} {d.name}".strip(), d.free_bytes, d.host, d.shares_memory)
            for i, d in enumerate(infos) if d.total_bytes]  # fmt: skip


@dataclass(slots=True)
class LoadReport:
    """Units: bytes; `sent_bytes` went over the bus, `cached_bytes` were found by hash where they were needed: in a cache, or
    in a copy of the file; `kept_bytes` were in the workers' memory, from a run before."""

    sent_bytes: int = 0
    cached_bytes: int = 0
    kept_bytes: int = 0
    n_tensors: int = 0


@dataclass(slots=True)
class _StageOnDevice:
    assignment: Assignment
    placed: dict[str, Placed] = field(default_factory=dict)
    caches: dict[int, KVCache] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        a = self.assignment
        return Stage(a.device, a.layers, a.first, a.last)


class Entry(NamedTuple):
    """One token of a batch, its position in its sequence, and the slot whose cells the sequence has."""

    token: int
    position: int
    slot: int = 0


CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32)])
"""A token that may be taken."""


class UnderWay(NamedTuple):
    """A batch that was sent."""

    seq: int
    n_tokens: int
    n_outputs: int
    argmax: bool
    top_k: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """The graphs of one batch shape: digest and input names, a stage each."""

    digests: tuple[bytes, ...]
    inputs: tuple[tuple[str, ...], ...]


class Runner:
    """A loaded model.

    Attributes:
        n_ctx: the longest context of a sequence, in tokens.
        n_slot_cells: cells that a sequence has in the cache, at least n_ctx.
        n_slots: sequences that the KV cache has cells for.
        activations: their type between stages, F32 or F16.
        direct: activations go from worker to worker; otherwise they pass through the broker.
        compute_s: time that workers spent computing, summed over stages.
        load_s: how long `load` took.
        note: told what a user should know while something is waited for.
    Threads: use from one.
    """

    def __init__(
        self, client: Client, arch: Arch, n_ctx: int, assignments: Sequence[Assignment], n_slots: int = 1,
        activations: GGMLType = GGMLType.F32,
    ) -> None:  # fmt: skip
        self.client, self.arch, self.n_slots, self.activations = client, arch, n_slots, activations
        self.n_ctx, self.n_slot_cells = n_ctx, n_cells(n_ctx, n_slots) // n_slots
        self.load_s = 0.0
        self.direct = False
        self.stages = [_StageOnDevice(a) for a in assignments]
        self.compute_s = 0.0
        self._tokens_per_s = 0.0
        self.report = LoadReport()
        self.note: Callable[[str], None] = lambda text: None
        self._graphs: dict[tuple[int, int, int, bool, int, bool], Compiled] = {}

    # -- loading -------------------------------------------------------------------------------------------------------

    def load(self, progress: Progress | None = None) -> LoadReport:
        """Allocate on every stage's device and fill: what a worker has by hash is not sent. Begins again when a worker was
        silent for a while.

        Errors: what the workers report.
        """
        start = time.perf_counter()
        for n_left in reversed(range(MAX_TRIES)):
            try:
                self._load(progress)
                break
            except OutOfMemory:  # another worker of the same host may keep what nobody uses
                self.client.settle()
                self.client.drain()
                if not n_left or not self.client.release():
                    raise
            except Unavailable as e:
                if not n_left:
                    raise
                self._await(e)
                self.client.drain()
        self.load_s = time.perf_counter() - start
        return self.report

    def _load(self, progress: Progress | None) -> None:
        self.report = LoadReport()
        self._graphs.clear()
        hashed = 0
        total = self.arch.gguf.n_bytes

        def on_hash(n: int) -> None:
            nonlocal hashed
            hashed += n
            if progress is not None:
                progress("hashing", hashed, total)

        hashes = tensor_hashes(self.arch.gguf, on_hash)
        pending, allocated = [], []
        for i, s in enumerate(self.stages):
            weights = self.arch.stage_weights(s.stage)
            at = 0
            for t in weights:
                s.placed[t.name] = Placed(t, 2 * i + 1, at)
                at += -(-t.n_bytes // ALIGN) * ALIGN
            kv_at = 0
            for il in s.assignment.layers:
                cells = self.n_slot_cells * self.n_slots
                k = 2 * cells * self.arch.hp.n_head_kv[il] * self.arch.hp.d_k
                s.caches[il] = KVCache(2 * i + 2, kv_at, kv_at + k, cells)
                kv_at += self.arch.kv_bytes(il, cells)
            session, device = self.client.session, s.assignment.device
            name = content_name(max(at, 1), (p.part(hashes[p.info.name]) for p in s.placed.values()))
            weights_here = m.AllocBuffer(session, 2 * i + 1, max(at, 1), name)
            allocated.append(self.client.submit(weights_here, device=device))
            pending.append(self.client.submit(m.AllocBuffer(session, 2 * i + 2, max(kv_at, 1)), device=device))
        link = self._ask_links()
        kept = [self.client.found(seq) for seq in allocated]
        for seq in pending:
            self.client.wait(seq)
        self._upload(hashes, kept, progress)
        self._learn_links(link)

    def _ask_links(self) -> int:
        return self.client.submit(m.Link(self.client.session, [s.assignment.device for s in self.stages]))

    def _learn_links(self, asked: int) -> None:
        self.direct = self.client.found(asked)

    def recover(self, error: Unavailable) -> bool:
        """Wait for a worker that was silent, and make everything as it was.

        Returns: whether the stages hold what they held. If not, the weights are loaded again and the KV cache is empty.
        Errors: `error`, or what came after it, when a worker is gone for good or does not come back.
        """
        for _ in range(MAX_TRIES):
            self._await(error)
            try:
                if not self._held():
                    self.client.drain()
                    self._load(None)
                    return False
                self._learn_links(self._ask_links())
                return True
            except Unavailable as e:
                error = e
        raise error

    def _held(self) -> bool:
        """Whether every stage still has its buffers: a worker that was started again has not."""
        asked = [self.client.submit(m.GetTensor(self.client.session, 2 * i + 2, 0, 1), device=s.assignment.device)
                 for i, s in enumerate(self.stages)]  # fmt: skip
        held = True
        for seq in asked:
            try:
                self.client.wait(seq)
            except HandleError:
                held = False
        return held

    def _await(self, error: Unavailable) -> None:
        """Until all devices of the stages are ready. Errors: `error` when one is lost, or silent for too long."""
        if isinstance(error, (Overloaded, DeadlineExceeded)) or self.client.lost:
            raise error
        self.client.cancel()
        clock, said = LivedClock(), False
        due = clock.now_s() + limits.RETURN_S
        while True:
            infos = self.client.devices()
            states = {infos[s.assignment.device].state if s.assignment.device < len(infos) else "none" for s in self.stages}
            if states == {"ready"}:
                self.client.settle()
                return
            if states != {"silent"} and states != {"silent", "ready"}:
                raise error
            if clock.now_s() > due:
                raise error
            if not said:
                silent = [d for s in self.stages if (d := infos[s.assignment.device]).state == "silent"]
                names = ", ".join(f"{d.worker} ({d.name})" for d in silent)
                self.note(f"worker {names} answers nothing; waiting for it, {limits.RETURN_S:.0f} s at most")
                said = True
            time.sleep(0.05)

    def _upload(self, hashes: dict[str, bytes], kept: Sequence[bool], progress: Progress | None) -> None:
        """Fill the stages' buffers, save those that were `kept`."""
        sizes = [sum(p.info.n_bytes for p in s.placed.values()) for s in self.stages]
        total = sum(sizes)
        done = self.report.kept_bytes = sum(n for n, there in zip(sizes, kept, strict=True) if there)
        uploads = [Upload(self, s.assignment.device, s.placed.values(), hashes)
                   for s, there in zip(self.stages, kept, strict=True) if not there]  # fmt: skip
        while any(u.busy for u in uploads):
            for u in uploads:
                done += u.advance()
                if progress is not None:
                    progress("loading", done, total)

    @property
    def _n_ctx_counted(self) -> int:
        """The context as llama.cpp counts it when it chooses between short and long factors: in steps of 256."""
        return -(-self.n_ctx // CTX_STEP) * CTX_STEP

    # -- running -------------------------------------------------------------------------------------------------------

    def _compile(self, batch: Batch) -> Compiled:
        key = (batch.n_tokens, batch.n_kv, batch.n_outputs, batch.argmax, batch.top_k, batch.many)
        known = self._graphs.get(key)
        if known is not None:
            return known
        digests, inputs, pending = [], [], []
        for s in self.stages:
            graph, names = self.arch.build(s.stage, s.placed, s.caches, batch)
            frame = encode_graph(graph)
            digest = graph_digest(frame)
            put = m.GraphPut(self.client.session, digest)
            pending.append(self.client.submit(put, [frame], device=s.assignment.device))
            digests.append(digest)
            inputs.append(tuple(names))
        for seq in pending:
            self.client.wait(seq)
        while len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        compiled = self._graphs[key] = Compiled(tuple(digests), tuple(inputs))
        return compiled

    def forward(
        self, tokens: Sequence[int] | npt.NDArray[np.int32], n_past: int, outputs: Sequence[int], argmax: bool = False,
        slot: int = 0, top_k: int = 0,
    ) -> npt.NDArray[Any]:  # fmt: skip
        """Run tokens of one sequence at positions n_past, n_past + 1, ...; their keys and values stay in the cache.

        With several stages the tokens go in pieces, so that all stages work at once; where others use the same workers, in
        pieces of bounded time.

        Shapes: returns float32 [len(outputs), n_vocab], the logits after the tokens that `outputs` (indices) names; or
        with `argmax` int32 [len(outputs)], with `top_k` CANDIDATE [len(outputs), top_k], the tokens of the largest logits.
        Errors: what the workers report; FormatError for a token outside the vocabulary or a context that is full.
        """
        size = PIECE if len(self.stages) > 1 else max(1, len(tokens))
        if len(tokens) > MIN_PIECE and self._shares():
            size = min(size, self._piece_of_a_turn())
        under_way = []
        for at in range(0, max(1, len(tokens)), size):
            entries = [Entry(int(t), n_past + at + i, slot) for i, t in enumerate(tokens[at : at + size])]
            under_way.append(self.submit(entries, [o - at for o in outputs if at <= o < at + size], argmax, top_k))
        return np.concatenate([self.wait(u) for u in under_way])

    def _shares(self) -> bool:
        """Whether others hold something on the devices of the stages: their tokens come between the pieces of a prompt."""
        infos = self.client.devices()
        return any(infos[s.assignment.device].n_sessions > 1 for s in self.stages if s.assignment.device < len(infos))

    def _piece_of_a_turn(self) -> int:
        """Tokens that take about TURN_S in a stage, a power of two, so that few graphs serve."""
        n = int(TURN_S * self._tokens_per_s)
        return max(MIN_PIECE, 1 << (n.bit_length() - 1)) if n else PIECE

    def submit(
        self, entries: Sequence[Entry], outputs: Sequence[int], argmax: bool = False, top_k: int = 0
    ) -> UnderWay:
        """Send a batch of tokens of any sequences on its way, and do not wait for it.

        `outputs`: indices of the entries whose logits are wanted, none if only the cache is to be filled.
        Errors: FormatError for a token outside the vocabulary, a position outside the context, a slot that is not there.
        """
        hp, n = self.arch.hp, len(entries)
        if n == 0 or not all(0 <= e.token < hp.n_vocab for e in entries):
            raise FormatError(f"tokens: expected at least one, each of 0 to {hp.n_vocab - 1}")
        last = max(e.position for e in entries)
        if last >= self.n_ctx:
            raise FormatError(f"context: {last + 1} tokens do not fit {self.n_ctx}; use a larger -c")
        if not all(0 <= e.slot < self.n_slots for e in entries):
            raise FormatError(f"slots: expected 0 to {self.n_slots - 1}; the model was loaded for {self.n_slots} sequences")
        many = any(e.slot for e in entries)
        end = max(e.slot * self.n_slot_cells + e.position for e in entries) + 1
        n_kv = min(self.n_slot_cells * self.n_slots, -(-end // KV_STEP) * KV_STEP)
        compiled = self._compile(Batch(n, n_kv, len(outputs), argmax, top_k, many, self._n_ctx_counted, self.activations))
        feeds = self._feeds(entries, outputs)
        payloads: list[list[Frame]] = [
            [feeds[name]() for name in names if name != "hidden"] for names in compiled.inputs
        ]
        route = [m.RouteStep(s.assignment.device, digest, len(payload))
                 for s, digest, payload in list(zip(self.stages, compiled.digests, payloads, strict=True))[1:]]  # fmt: skip
        header = m.GraphCompute(self.client.session, compiled.digests[0], len(payloads[0]), route)
        frames = [f for payload in payloads for f in payload]
        seq = self.client.submit(header, frames, self.stages[0].assignment.device)
        return UnderWay(seq, n, len(outputs), argmax, top_k)

    def wait(self, batch: UnderWay) -> npt.NDArray[Any]:
        """What a batch gave. Shapes: as `forward`'s. Errors: what the workers report."""
        reply = self.client.wait(batch.seq)
        assert isinstance(reply.header, m.ComputeDone)  # the decoder gives GRAPH_COMPUTE's reply this type
        self.compute_s += reply.header.compute_s
        if batch.n_tokens >= MIN_PIECE and reply.header.compute_s:
            self._tokens_per_s = batch.n_tokens * len(self.stages) / reply.header.compute_s
        raw = reply.payload[0] if batch.n_outputs else b""
        if batch.argmax:
            return np.frombuffer(raw, np.int32)
        if batch.top_k:
            out = np.empty((batch.n_outputs, batch.top_k), CANDIDATE)
            if batch.n_outputs:
                out["id"] = np.frombuffer(raw, np.int32).reshape(out.shape)
                out["logit"] = np.frombuffer(reply.payload[1], np.float32).reshape(out.shape)
            return out
        return np.frombuffer(raw, np.float32).reshape(batch.n_outputs, self.arch.hp.n_vocab)

    def _feeds(self, entries: Sequence[Entry], outputs: Sequence[int]) -> dict[str, Callable[[], Frame]]:
        """The bytes of each input, made only when a stage wants it."""
        pos = np.array([e.position for e in entries])
        base = np.array([e.slot for e in entries]) * self.n_slot_cells

        def temperature() -> Frame:
            scale, length = self.arch.attn_temperature()
            return (np.log(np.floor(pos / length) + 1) * scale + 1).astype(np.float32).tobytes()

        return {
            "tokens": lambda: np.array([e.token for e in entries], np.int32).tobytes(),
            "positions": lambda: pos.astype(np.int32).tobytes(),
            "cells": lambda: (base + pos).astype(np.int64).tobytes(),
            "cell": lambda: (base + pos).astype(np.float32).tobytes(),
            "first_cell": lambda: base.astype(np.float32).tobytes(),
            "temperature": temperature,
            "out_ids": lambda: np.asarray(outputs, np.int32).tobytes(),
        }

    def logits(self, tokens: npt.NDArray[np.int32], chunk: int) -> npt.NDArray[np.float32]:
        """Logits at every position, in pieces of `chunk`. Shapes: int32 [n] to float32 [n, n_vocab]."""
        out = []
        for at in range(0, len(tokens), chunk):
            piece = tokens[at : at + chunk]
            out.append(self.forward(piece, at, range(len(piece))))
        return np.concatenate(out)


def plan(
    arch: Arch, infos: Sequence[m.ListedDevice], n_ctx: int, split: Sequence[float] | None = None,
    ngl: int | None = None, host: str = "", order: Sequence[str] = (),
) -> list[Assignment]:  # fmt: skip
    """Where the layers go. With `ngl` below the layer count the first layers stay on the worker named `host`.

    `order`: names of workers; devices are taken in this order, and others after them, whenever they connected.

    Errors: OutOfMemory, ConfigError.
    """
    sizes = model_sizes(arch, n_ctx)
    rank = {name: i for i, name in enumerate(order)}
    memory = sorted(device_memory(infos), key=lambda d: (_rank(infos[d.index], rank), d.index))
    n = arch.hp.n_layer
    mine = [d for d in memory if host and infos[d.index].worker == host]
    others = [d for d in memory if d not in mine]
    keep = 0 if ngl is None or not mine else max(0, n - ngl)
    if not keep:
        return place(sizes, others or memory, split)
    whole = keep == n or not others
    tail, tied = (sizes.tail, sizes.tied) if whole else (0, 0)
    head = ModelSizes(sizes.layers[:keep], sizes.kv[:keep], sizes.head, tail, tied)
    out = [_shift(a, 0, True, whole) for a in place(head, mine)]
    if whole:
        return out
    rest = place(ModelSizes(sizes.layers[keep:], sizes.kv[keep:], 0, sizes.tail), others, split)
    return out + [_shift(a, keep, False, a.last) for a in rest]


def _rank(info: m.ListedDevice, rank: dict[str, int]) -> int:
    """Where a worker stands in the order: by its name, or by the address where it listens."""
    return min(rank.get(info.worker, len(rank)), rank.get(info.address, len(rank)))


def _shift(a: Assignment, by: int, first: bool, last: bool) -> Assignment:
    layers = range(a.layers.start + by, a.layers.stop + by)
    return Assignment(a.device, layers, first, last, a.weight_bytes, a.kv_bytes)


def n_cells(n_ctx: int, n_slots: int) -> int:
    """Cells of a cache for so many sequences of `n_ctx` tokens."""
    return n_ctx if n_slots == 1 else -(-n_ctx // SLOT_STEP) * SLOT_STEP * n_slots


def default_n_ctx(arch: Arch, wanted: int) -> int:
    """Cells for a context: `wanted`, or the training length up to 4096. 0 means not said."""
    n = wanted or min(arch.hp.n_ctx_train, 4096)
    return math.ceil(n / 32) * 32
