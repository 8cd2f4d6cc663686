"""The reference device: every op in NumPy and float64, slow and obviously right."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from functools import partial

from protocol.graph import Graph
from workers.devices.host import HostBuffer, HostDevice, HostMemory, HostPlan, Step, compute
from workers.devices.lower import lower_aside
from workers.tensors import Bytes
from workers.ticks import Tick, nothing


class ReferenceDevice(HostDevice[HostBuffer]):
    name = "reference"
    kind = "reference"

    def buffer_of(self, n_bytes: int, memory: Bytes, room: mmap.mmap | None) -> HostBuffer:
        return HostBuffer(n_bytes, memory, room)

    def compile(self, graph: Graph, buffers: Mapping[int, HostBuffer], tick: Tick = nothing) -> HostPlan:
        lowered = lower_aside(graph, tick)
        memory = HostMemory(lowered, buffers, self.arena)
        steps: list[tuple[Step, int]] = []
        for n in lowered.nodes:
            steps.append((partial(compute, memory.reference(n), n.cost), n.index))
            tick()
        return HostPlan(memory, steps)
