"""Carries out a worker's Work on its device: the objects behind the handles that the state machine keeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from protocol import messages as m
from protocol.errors import GgmqError, InternalError, OutOfMemory, ProtocolError
from workers.cache import Cache, ModelFolder, content_hash
from workers.devices.base import Buffer, Device, Plan, Tick
from workers.links import LinkInstruction, Links
from workers.state import Key, Work, WorkerState

MAX_PLANS = 64


class Executor:
    """Attributes:
    buffers: by session, then by the client's id.
    plans: by (session, graph digest); the oldest is recompiled when it comes again.
    make_room: frees what is kept for peers that are asleep; whether there was any.
    """

    def __init__(
        self, device: Device, state: WorkerState, links: Links, cache: Cache | None, models: ModelFolder | None = None
    ) -> None:
        self.device, self.state, self.links, self.cache, self.models = device, state, links, cache, models
        self.buffers: dict[Key, dict[int, Buffer]] = {}
        self.plans: dict[tuple[Key, bytes], Plan] = {}
        self.make_room: Callable[[], bool] = lambda: False

    def execute(self, work: Work, tick: Tick) -> Sequence[LinkInstruction]:
        """Do it, and say what to send. Every failure becomes an ordinary error reply."""
        h = work.request.header
        gives = isinstance(h, m.GraphCompute) and h.give is not None
        try:
            if gives:
                self.links.can_give(work)
            header, payload = self._do(work, tick)
        except GgmqError as e:
            return self.state.failed(work, e)
        except MemoryError:
            free = self.device.info().free_bytes
            return self.state.failed(work, OutOfMemory(f"{self.device.name}: out of memory, {free} bytes free", 0, free))
        except Exception as e:
            return self.state.failed(work, InternalError(f"{work.request.command.name}: {type(e).__name__}: {e}"))
        if gives and isinstance(header, m.ComputeDone):
            return self.links.give(work, header, tuple(payload))
        return self.state.done(work, header, payload)

    def _do(self, work: Work, tick: Tick) -> tuple[m.Header, Sequence[bytes | memoryview]]:
        h, key = work.request.header, work.key
        mine = self.buffers.setdefault(key, {}) if work.verb != "stats" else {}
        match h:
            case m.AllocBuffer():
                mine[h.buffer] = self._alloc(h.n_bytes)
            case m.FreeBuffer():
                self._forget_plans(key, h.buffer)
                self.device.free(mine.pop(h.buffer))
            case m.SetTensor():
                self._write(work, h, mine[h.buffer])
            case m.SetTensorHash():
                return m.Found(self._find(mine[h.buffer], h)), ()
            case m.GetTensor():
                return m.Ok(), [self.device.read(mine[h.buffer], h.offset, h.n_bytes)]
            case m.CopyTensor():
                self.device.copy(mine[h.src_buffer], h.src_offset, mine[h.dst_buffer], h.dst_offset, h.n_bytes)
            case m.GraphPut():
                self._compile(work, h.digest)
            case m.GraphCompute():
                plan = self.plans.get((key, h.digest)) or self._compile(work, h.digest)
                start = time.perf_counter()
                out = plan.run(work.request.payload, tick)
                took = time.perf_counter() - start
                # sockets may send later than the next run writes: the outputs leave as copies
                return m.ComputeDone(h.spent_s + took, h.spent_nodes + plan.n_nodes), [bytes(o) for o in out]
            case m.Drain():
                self.free_session(key)
            case m.StatsQuery():
                return self._stats(), ()
            case _:
                raise ProtocolError(f"{work.request.command.name}: nothing for a device to do")
        return m.Ok(), ()

    def _alloc(self, n_bytes: int) -> Buffer:
        try:
            return self.device.alloc(n_bytes)
        except OutOfMemory:
            if not self.make_room():
                raise
            return self.device.alloc(n_bytes)

    def _find(self, buffer: Buffer, h: m.SetTensorHash) -> bool:
        """Fill a weight from what is here already."""
        places = []
        if self.models is not None:
            places.append(partial(self.models.open, h.file, h.file_offset, h.n_bytes, h.hash))
        if self.cache is not None:
            places.append(partial(self.cache.open, h.hash, h.n_bytes))
        for place in places:
            reader = place()
            if reader is not None and self.device.fill(buffer, h.offset, h.n_bytes, h.type, h.ne, reader):
                return True
        return False

    def _write(self, work: Work, h: m.SetTensor, buffer: Buffer) -> None:
        self.device.write(buffer, h.offset + h.at, work.request.payload[0])
        if not work.finish:
            return
        data = buffer.memory[h.offset : h.offset + h.n_bytes].data
        if content_hash(data) != h.hash:
            raise ProtocolError("SET_TENSOR: the bytes received do not have the hash that was announced; send them again")
        if self.cache is not None:
            self.cache.put(h.hash, data)
        self.device.finish(buffer, h.offset, h.n_bytes, h.type, h.ne)

    def _compile(self, work: Work, digest: bytes) -> Plan:
        assert work.graph is not None  # the state machine looked it up
        plan = self.device.compile(work.graph, self.buffers.get(work.key, {}))
        while len(self.plans) >= MAX_PLANS:
            del self.plans[next(iter(self.plans))]
        self.plans[(work.key, digest)] = plan
        return plan

    def _forget_plans(self, key: Key, buffer: int) -> None:
        used = [k for k, p in self.plans.items() if k[0] == key and any(t.buffer == buffer for t in p.graph.tensors)]
        for k in used:
            del self.plans[k]

    def free_session(self, key: Key) -> None:
        """Give back everything of a session."""
        for k in [k for k in self.plans if k[0] == key]:
            del self.plans[k]
        for buffer in self.buffers.pop(key, {}).values():
            self.device.free(buffer)

    def _stats(self) -> m.Stats:
        info, state, cache = self.device.info(), self.state, self.cache
        buffers = [b for mine in self.buffers.values() for b in mine.values()]
        return m.Stats(
            device=info.name, free_bytes=info.free_bytes, total_bytes=info.total_bytes, rss_bytes=rss_bytes(),
            n_sessions=len(state.sessions), n_buffers=len(buffers), buffer_bytes=sum(b.n_bytes for b in buffers),
            n_graphs=len(self.plans), n_computes=state.n_computes, n_refused=state.n_refused, n_fenced=state.n_fenced,
            payload_in_bytes=state.payload_in_bytes, wire_in_bytes=state.wire_in_bytes,
            wire_out_bytes=state.wire_out_bytes, handed_out_bytes=state.handed_out_bytes,
            cache_hits=cache.hits if cache else 0, cache_misses=cache.misses if cache else 0,
            cache_repairs=cache.repairs if cache else 0, kernel_compiles=self.device.kernel_compiles,
        )  # fmt: skip


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
