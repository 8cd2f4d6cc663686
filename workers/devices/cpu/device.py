"""The CPU device: a team of threads that runs Numba kernels over repacked weights.

Ops without a kernel of their own run the reference kernel on the caller's thread.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from protocol.graph import Graph
from workers.devices.base import Abilities, Source
from workers.devices.cpu.plan import BINDINGS, PATTERNS, CPUPlan, Profile
from workers.devices.cpu.program import PART_COST, Pace
from workers.devices.cpu.weights import Copy, CPUBuffer, Ne, Weights, packable
from workers.devices.host import HostDevice
from workers.devices.lower import lower_aside
from workers.devices.system import cpu_model
from workers.kernels import layout, native
from workers.tensors import Bytes
from workers.ticks import Tick, completing, nothing


class CPUDevice(HostDevice[CPUBuffer]):
    """Attributes:
    weights: how they lie in its buffers.
    """

    name = "CPU"
    kind = "cpu"

    def __init__(self, n_threads: int, memory_bytes: int = 0, cpus: Sequence[int] = ()) -> None:
        super().__init__(memory_bytes)
        self._n_threads = n_threads
        self._profile = Profile() if os.environ.get("GGMQ_PROFILE", "0") not in ("", "0") else None
        self._kernels, self._cpus = native.Kernels(cpu_model()), cpus
        self._team: native.Team | None = None
        self._pace = Pace(PART_COST * n_threads)
        self.weights = Weights(self, lambda: self.team)

    def begin(self) -> None:
        self._kernels.begin()

    def share(self, between: Tick | None, short: bool = False) -> None:
        super().share(between, short)
        self._pace.short = short

    def prepare(self, tick: Tick = nothing) -> None:
        """Kernels are compiled on the first work for this CPU, and kept."""
        if self._team is None:
            self._team = native.Team(self._kernels.get(tick), self._n_threads, self._cpus)

    @property
    def team(self) -> native.Team:
        self.prepare()
        assert self._team is not None  # prepared
        return self._team

    def n_threads(self) -> int:
        return self._n_threads

    @property
    def kernel_compiles(self) -> int:  # type: ignore[override]
        """1 when the compiler was loaded into this process, where nothing is to be compiled."""
        return int("numba" in sys.modules)

    def profile(self) -> list[str]:
        lines = self._profile.lines() if self._profile is not None else []
        return [f"profile of {self.name}, {self._n_threads} threads, {lines[0]}", *lines[1:]] if lines else []

    def abilities(self) -> Abilities:
        at_all = super().abilities()
        ops = frozenset(op for op in at_all.slow_ops if (op,) in BINDINGS)
        types = frozenset(int(t) for t in layout.KINDS)
        return Abilities(ops, at_all.slow_ops - ops, types, at_all.slow_types - types)

    def buffer_of(self, n_bytes: int, memory: Bytes, room: mmap.mmap | None) -> CPUBuffer:
        return CPUBuffer(n_bytes, memory, room)

    def finish(
        self, buffer: CPUBuffer, offset: int, n_bytes: int, type_id: int, ne: Ne, tick: Tick = nothing
    ) -> None:
        if packable(type_id, ne):  # else the bytes lie where they should
            self.fill(buffer, offset, n_bytes, type_id, ne, Copy(buffer.memory[offset : offset + n_bytes]), tick)

    def fill(
        self, buffer: CPUBuffer, offset: int, n_bytes: int, type_id: int, ne: Ne, source: Source, tick: Tick = nothing
    ) -> bool:
        """Rows are packed as they come, a piece at a time; no second copy of a weight is made."""
        buffer.check(offset, n_bytes, "write")
        self._raw(buffer, offset, n_bytes, tick)
        if not packable(type_id, ne):
            return super().fill(buffer, offset, n_bytes, type_id, ne, source, tick)
        with self.or_zeros(buffer, offset, n_bytes, source, tick):
            self.weights.pack(buffer, offset, n_bytes, type_id, ne, source, tick)
        return source.good

    def _raw(self, buffer: CPUBuffer, offset: int, n_bytes: int, tick: Tick) -> None:
        """Other bytes come here."""
        self.weights.unpack(buffer, offset, n_bytes, tick)
        self.weights.forget(buffer, offset, n_bytes, tick)

    def write(self, buffer: CPUBuffer, offset: int, data: bytes | memoryview, tick: Tick = nothing) -> None:
        buffer.check(offset, len(data), "write")
        self._raw(buffer, offset, len(data), tick)
        super().write(buffer, offset, data, tick)

    def read(self, buffer: CPUBuffer, offset: int, n_bytes: int, tick: Tick = nothing) -> memoryview:
        out = super().read(buffer, offset, n_bytes, tick)
        self.weights.read(buffer, offset, out, tick)
        return out

    def free(self, buffer: CPUBuffer, tick: Tick = nothing) -> None:
        with completing(tick) as steady:
            self.weights.forget(buffer, 0, buffer.n_bytes, steady)
            buffer.packed.clear()
            buffer.n_layouts += 1  # a plan that were run now would find that its buffer has no bytes
            super().free(buffer, steady)

    def scratch_bytes(self) -> int:
        return super().scratch_bytes() + (len(self._team.scratch) if self._team is not None else 0)

    def trim(self, tick: Tick = nothing) -> None:
        if self._team is not None:
            self._team.scratch = np.zeros(0, np.uint8)  # a plan reserves what it needs when it runs
        super().trim(tick)

    def compile(self, graph: Graph, buffers: Mapping[int, CPUBuffer], tick: Tick = nothing) -> CPUPlan:
        lowered = lower_aside(graph, tick, PATTERNS)
        plan = CPUPlan(lowered, buffers, self.team, self.weights, self.arena, self._pace, self._profile)
        plan.bind(tick)
        return plan
