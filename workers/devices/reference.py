"""The reference device: every op in NumPy and float64, slow and obviously right."""

from __future__ import annotations

from protocol.graph import Graph
from workers.devices.base import Buffer, HostDevice
from workers.plan import HostPlan
from workers.ticks import Tick, nothing


class ReferenceDevice(HostDevice):
    name = "reference"
    kind = "reference"

    def compile(self, graph: Graph, buffers: dict[int, Buffer], tick: Tick = nothing) -> HostPlan:
        return HostPlan(self, graph, buffers)
