"""The reference device: every op in NumPy and float64, slow and obviously right."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from functools import partial

from protocol.graph import Graph
from workers.devices.host import HostBuffer, HostDevice, HostMemory, HostPlan
from workers.devices.lower import lower
from workers.kernels import reference
from workers.tensors import Bytes
from workers.ticks import Tick, nothing


class ReferenceDevice(HostDevice[HostBuffer]):
    name = "reference"
    kind = "reference"

    def buffer_of(self, n_bytes: int, memory: Bytes, room: mmap.mmap | None) -> HostBuffer:
        return HostBuffer(n_bytes, memory, room)

    def compile(self, graph: Graph, buffers: Mapping[int, HostBuffer], tick: Tick = nothing) -> HostPlan:
        lowered = lower(graph)
        memory = HostMemory(lowered, buffers, self.arena)
        return HostPlan(memory, [(partial(reference.run, memory.reference(n)), n.index) for n in lowered.nodes])
