"""Carries out a worker's Work on its device: the objects behind the handles that the state machine keeps."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from config.terminal import print_line
from protocol import limits
from protocol import messages as m
from protocol.content import Part
from protocol.errors import Cancelled, GgmqError, InternalError, OutOfMemory
from protocol.tracing import TracedCompute, TracedStep, encode_noted
from workers.cache import Cache, ModelFolder
from workers.devices.base import Buffer, Device, Plan
from workers.leases import Content, Leases, written
from workers.links import Links
from workers.sources import Sources
from workers.state import WorkerState
from workers.ticks import PIECE_BYTES, Tick, completing, nothing, paced, pieces
from workers.tracing import Traces
from workers.uploads import Uploads
from workers.work import (
    Alloc,
    Compile,
    Compute,
    Copy,
    Count,
    Describe,
    EndSession,
    Fetch,
    Free,
    GiveUp,
    Key,
    LinkInstruction,
    Note,
    Read,
    Seek,
    Serve,
    Work,
    Write,
)

T = TypeVar("T")
MAX_PLANS = 64
MEMORY = b"memory of "
"""Before a secret in the name of a lease: longer than the name of a content, so that neither is taken for the other."""
ASIDE_BYTES = 1 << 20
"""Scratch memory that a compute between parts of another may need: what was there is kept meanwhile."""


class Executor:
    """Attributes:
    buffers: by session, then by the client's id.
    plans: by (session, graph digest); one that had to go is compiled again when it comes again.
    make_room: frees what is kept for peers that are asleep; whether there was any.
    uploads: weights on their way into them.
    sources: what other workers may read of what is here.
    contents: by (session, buffer), of buffers whose client said what they will hold.
    secrets: by (session, buffer), of buffers that stay for whoever knows this when their broker has gone.
    n_fallbacks: nodes that were computed without a kernel of the device's own.
    traces: when computes ran, for sessions that asked.
    broke: why the device computes nothing any more.
    """

    def __init__(
        self, device: Device[Any], state: WorkerState, links: Links, cache: Cache | None, models: ModelFolder | None = None,
        keep_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.device, self.state, self.links, self.cache, self.models = device, state, links, cache, models
        self.buffers: dict[Key, dict[int, Buffer]] = {}
        self.plans: dict[tuple[Key, bytes], Plan] = {}
        self.make_room: Callable[[], bool] = lambda: False
        self.uploads = Uploads(device, cache)
        self.sources = Sources(device, cache, models, self._holder)
        self.contents: dict[tuple[Key, int], Content] = {}
        self.secrets: dict[tuple[Key, int], bytes] = {}
        self.leases = Leases(device, keep_s)
        self.n_fallbacks = 0
        self.traces = Traces()
        self.broke: GgmqError | None = None
        self._warned: set[str] = set()

    def execute(self, work: Work, tick: Tick) -> Sequence[LinkInstruction]:
        """Do it, and say what to send. Every failure becomes an ordinary error reply."""
        try:
            if isinstance(work, Compute):
                return self._compute(work, tick)
            header, payload = self._do(work, paced(tick), tick)
        except GgmqError as e:
            if self.device.broken:
                self.broke = e
            if isinstance(work, Write) and isinstance(work.request.header, m.FetchTensor):
                return self.links.fetches.failed(work, e)
            return self.state.failed(work, e)
        except MemoryError:
            free = self.device.info().free_bytes
            return self.state.failed(work, OutOfMemory(f"out of memory, {free} bytes free", 0, free))
        except Exception as e:
            return self.state.failed(work, InternalError(f"{work.request.command.name}: {type(e).__name__}: {e}"))
        if isinstance(work, Write) and isinstance(work.request.header, m.FetchTensor):
            return self.links.fetches.stored(work)
        return self.state.done(work, header, payload)

    def aside(self, key: Key, h: m.StageCompute, within_s: float) -> Plan | None:
        """The plan of a compute that may be done between parts of another; None: it may take longer than so long, or needs
        much scratch memory, or nobody knows."""
        plan = self.plans.get((key, h.digest))
        if plan is None or not 0 < plan.took_s <= within_s:
            return None
        scratch_bytes = plan.scratch_bytes
        return plan if scratch_bytes is not None and scratch_bytes <= ASIDE_BYTES else None

    def _compute(self, work: Compute, tick: Tick) -> Sequence[LinkInstruction]:
        """Run a graph; its outputs go back, or on to the next worker."""
        h, pace = work.h, paced(tick)
        if h.give is not None:
            self.links.can_give(work, h.give)
        noted = self.traces.begun(work.key, work.request, time.monotonic_ns()) if self.traces else None
        plan = self.plans.get((work.key, h.digest)) or self._compile(work, pace)
        start = time.perf_counter()
        run = partial(plan.run, work.request.payload, tick)
        if noted is not None:
            run = partial(_run_noted, plan, work, tick, noted)
        out = self._with_room(run, pace)
        took = plan.took_s = time.perf_counter() - start
        self.n_fallbacks += len(plan.fallbacks)
        done = m.ComputeDone(h.spent_s + took, h.spent_nodes + plan.n_nodes)
        payload = tuple(_copied(o, pace) for o in out)  # sockets may send later than the next run writes
        return self.state.done(work, done, payload) if h.give is None else self.links.give(work, h.give, done, payload)

    def _do(self, work: Work, pace: Tick, tick: Tick) -> tuple[m.Header, Sequence[bytes | memoryview]]:
        key = work.key
        mine = self.buffers.get(key, {})
        match work:
            case Alloc(h=h):
                self.device.prepare(tick)
                return m.Found(self._alloc(key, h, pace)), ()
            case Free(h=h):
                self._forget_plans(key, h.buffer)
                self.uploads.leave(key, h.buffer)
                self.contents.pop((key, h.buffer), None)
                self.secrets.pop((key, h.buffer), None)
                self.device.free(mine.pop(h.buffer), pace)
            case Write(h=h):
                self._write(work, mine[h.buffer], pace)
            case Fetch(h=h):
                return self._fetch(key, h, mine[h.buffer], pace), ()
            case Seek(h=h):
                return m.Had([i for i, w in enumerate(h.weights) if self.sources.have(w, pace)]), ()
            case Serve(h=h):
                chunk = self.sources.read(h.weight, h.at, pace)
                return (m.Found(False), ()) if chunk is None else (m.Found(True), [chunk])
            case Read(h=h):
                parts = [self.device.read(mine[e.buffer], e.offset, e.n_bytes, pace) for e in h.extents]
                return m.Ok(), [b"".join(parts) if h.more else parts[0]]
            case Copy(h=h):
                self._changed(key, h.dst_buffer, _part(h.dst_offset, h.n_bytes))
                self.device.copy(mine[h.src_buffer], h.src_offset, mine[h.dst_buffer], h.dst_offset, h.n_bytes, pace)
            case Compile():
                self._compile(work, pace)
            case EndSession():
                self.free_session(key, pace)
            case GiveUp():
                any_kept = len(self.leases) > 0
                while self.leases.give_up(pace):
                    pass
                return m.Found(any_kept), ()
            case Count():
                return self._stats(), ()
            case Note(h=h):
                noted = self.traces.ask(key, h.n_computes)
                return m.Traced(time.monotonic_ns()), [encode_noted(noted)]
            case Describe():
                return m.DeviceList([self._described()], 1), ()
            case _:
                raise InternalError(f"{work.request.command.name}: nothing for a device to do")
        return m.Ok(), ()

    def _with_room(self, do: Callable[[], T], tick: Tick, make_room: Callable[[], bool] = lambda: False) -> T:
        """Do something that finds out at its beginning whether there is memory for it: what is only kept makes room."""
        while True:
            try:
                return do()
            except OutOfMemory:
                if not self.leases.give_up(tick) and not make_room():
                    raise

    def _alloc(self, key: Key, h: m.AllocBuffer, tick: Tick) -> bool:
        """Returns: whether the buffer holds already what it is to hold."""
        name = h.content or (MEMORY + h.secret if h.secret else b"")
        kept = self.leases.take(name, h.n_bytes) if name else None
        buffer = kept.buffer if kept else self._with_room(partial(self._alloc_new, key, h.n_bytes), tick, self.make_room)
        self.buffers.setdefault(key, {})[h.buffer] = buffer
        if h.content:
            self.contents[key, h.buffer] = Content(h.content, h.n_bytes, kept.parts if kept else ())
        elif name:
            self.secrets[key, h.buffer] = name
        return kept is not None

    def _alloc_new(self, key: Key, n_bytes: int) -> Buffer:
        """Whoever comes first has the memory, but what the graphs of others need in passing is left to them.

        Errors: OutOfMemory.
        """
        if any(mine for other, mine in self.buffers.items() if other != key):
            info = self.device.info()
            spared = max(0, min(limits.SCRATCH_BYTES, info.total_bytes // 8) - self.device.scratch_bytes())
            free = max(0, info.free_bytes - spared)
            if n_bytes > free:
                raise OutOfMemory(f"a buffer needs {n_bytes} bytes, {free} are free; {spared} more are for graphs of others",
                                  n_bytes, free)  # fmt: skip
        return self.device.alloc(n_bytes)

    def _verified(self, key: Key, h: m.SetTensor | m.SetTensorHash) -> None:
        content = self.contents.get((key, h.buffer))
        if content is not None:
            content.verified(_weight(h))

    def _fetch(self, key: Key, h: m.SetTensorHash, buffer: Buffer, tick: Tick) -> m.Found:
        """Fill a weight from what is here, as far as it is."""
        content = self.contents.get((key, h.buffer))
        if content is not None and content.holds(_weight(h)):
            return m.Found(True)
        at = self.uploads.under_way(key, h)
        if at:
            return m.Found(False, at)
        self._changed(key, h.buffer, _part(h.offset, h.n_bytes))
        if self._find(buffer, h, tick):
            self._verified(key, h)
            return m.Found(True)
        return m.Found(False, self.uploads.resume(key, h, buffer, tick))

    def _holder(self, weight: m.Weight) -> tuple[Buffer, int] | None:
        """A buffer that holds a weight whose bytes were verified, and where it is there."""
        for (key, number), content in self.contents.items():
            part = content.part_of(weight.hash, weight.n_bytes)
            if part is not None:
                return self.buffers[key][number], part.offset
        return self.leases.holder(weight.hash, weight.n_bytes)

    def _find(self, buffer: Buffer, h: m.SetTensorHash, tick: Tick) -> bool:
        """Fill a weight from what is here already."""
        places = []
        if self.models is not None:
            places.append(partial(self.models.open, h.file, h.file_offset, h.n_bytes, h.hash, tick))
        if self.cache is not None:
            places.append(partial(self.cache.open, h.hash, h.n_bytes, tick))
        for place in places:
            reader = place()
            if reader is not None:
                with reader:
                    if self.device.fill(buffer, h.offset, h.n_bytes, h.type, h.ne, reader, tick):
                        return True
        return False

    def _write(self, work: Write, buffer: Buffer, tick: Tick) -> None:
        h, n = work.h, len(work.request.payload[0])
        if not h.hash:
            self._changed(work.key, h.buffer, _part(h.offset + h.at, n))
            self.device.write(buffer, h.offset + h.at, work.request.payload[0], tick)
            return
        if not h.at:
            self._changed(work.key, h.buffer, _part(h.offset, h.n_bytes))
        self.uploads.write(work, buffer, tick)
        if work.last:
            self._verified(work.key, h)

    def _changed(self, key: Key, buffer: int, part: range) -> None:
        """Something else comes into these bytes: what was there, or was coming, is not what its hash says."""
        self.uploads.changed(key, buffer, part)
        content = self.contents.get((key, buffer))
        if content is not None:
            content.changed(part)

    def _compile(self, work: Compile | Compute, tick: Tick) -> Plan:
        for buffer in written(work.graph):
            if (work.key, buffer) in self.contents:
                self.contents[work.key, buffer].spoil()
        plan = self._with_room(partial(self.device.compile, work.graph, self.buffers.get(work.key, {}), tick), tick)
        for op in sorted(set(plan.fallbacks) - self._warned):
            self._warned.add(op)
            print_line(f"worker: {self.device.name}: no kernel of its own for {op} with such types and strides; "
                       "it runs in NumPy", file=sys.stderr)  # fmt: skip
        while len(self.plans) >= MAX_PLANS:  # who has most gives the oldest: those of others stay
            n_of = Counter(key for key, _ in self.plans)
            most = max(n_of, key=n_of.__getitem__)
            del self.plans[next(at for at in self.plans if at[0] == most)]
        self.plans[(work.key, work.h.digest)] = plan
        return plan

    def _forget_plans(self, key: Key, buffer: int) -> None:
        used = [k for k, p in self.plans.items() if k[0] == key and any(t.buffer == buffer for t in p.graph.tensors)]
        for k in used:
            del self.plans[k]

    def free_session(self, key: Key, tick: Tick = nothing, keep_s: float = 0.0) -> None:
        """Give back everything of a session, to the last byte, save weights that are kept for the next.

        keep_s: for so long at least, where its client may be back; what has a secret stays too then.
        """
        for k in [k for k in self.plans if k[0] == key]:
            del self.plans[k]
        self.traces.drop(key)
        buffers = self.buffers.pop(key, {})
        self.uploads.leave(key)
        with contextlib.suppress(Cancelled), completing(tick) as steady:
            for number, buffer in buffers.items():
                content, secret = self.contents.pop((key, number), None), self.secrets.pop((key, number), b"")
                if content is not None and content.complete:
                    self.leases.leave(content.name, buffer, steady, content.parts, keep_s)
                elif secret and keep_s:
                    self.leases.leave(secret, buffer, steady, at_least_s=keep_s)
                else:
                    self.device.free(buffer, steady)
            self.device.trim(steady)

    def info(self) -> m.DeviceInfo:
        """The device as it describes itself; what is only kept is free."""
        info = self.device.info()
        return msgspec.structs.replace(info, free_bytes=min(info.total_bytes, info.free_bytes + self.leases.n_bytes))

    def _described(self) -> m.ListedDevice:
        """The device with what it can run."""
        can = self.device.abilities()
        return m.ListedDevice(**msgspec.structs.asdict(self.info()), fast_ops=sorted(can.fast_ops),
                              slow_ops=sorted(can.slow_ops), fast_types=sorted(can.fast_types),
                              slow_types=sorted(can.slow_types))  # fmt: skip

    def close(self) -> None:
        """The process ends: what is still to be kept is, within a bound."""
        if self.cache is not None:
            self.cache.close()

    def _stats(self) -> m.Stats:
        info, state, cache = self.info(), self.state, self.cache
        buffers = [b for mine in self.buffers.values() for b in mine.values()]
        return m.Stats(
            device=info.name, free_bytes=info.free_bytes, total_bytes=info.total_bytes, rss_bytes=rss_bytes(),
            n_sessions=len(state.sessions), n_buffers=len(buffers), buffer_bytes=sum(b.n_bytes for b in buffers),
            kept_bytes=self.leases.n_bytes,
            n_graphs=len(self.plans), n_computes=state.n_computes, n_refused=state.n_refused, n_fenced=state.n_fenced,
            payload_in_bytes=state.payload_in_bytes, wire_in_bytes=state.wire_in_bytes,
            wire_out_bytes=state.wire_out_bytes, handed_out_bytes=state.handed_out_bytes,
            cache_hits=cache.hits if cache else 0, cache_misses=cache.misses if cache else 0,
            cache_repairs=cache.repairs if cache else 0, n_fallbacks=self.n_fallbacks,
            kernel_compiles=self.device.kernel_compiles,
        )  # fmt: skip


def _run_noted(plan: Plan, work: Compute, tick: Tick, noted: TracedCompute) -> list[memoryview]:
    """Run a plan, and note what it did when."""
    plan.prepare_notes(paced(tick))
    noted.ran_ns = time.monotonic_ns()
    out, steps = plan.run_noted(work.request.payload, tick)
    noted.ended_ns, noted.n_out_bytes = time.monotonic_ns(), sum(len(o) for o in out)
    noted.steps = [TracedStep(title, node, begun, ended) for title, node, begun, ended in steps]
    return out


def _weight(h: m.SetTensor | m.SetTensorHash) -> Part:
    return Part(h.offset, h.n_bytes, h.type, h.ne, h.hash)


def _copied(data: memoryview, tick: Tick) -> bytes | memoryview:
    if len(data) <= PIECE_BYTES:
        return bytes(data)
    copy = memoryview(bytearray(len(data)))
    for at, n in pieces(len(data)):
        copy[at : at + n] = data[at : at + n]
        tick()
    return copy


def _part(offset: int, n_bytes: int) -> range:
    return range(offset, offset + n_bytes)


def rss_bytes() -> int:
    """Memory that this process holds, in bytes; 0 where the host does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            for line in f:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
