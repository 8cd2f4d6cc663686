"""As a program, a worker that has the device `breaking` too: the first graph breaks it, as a bad address does a GPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from protocol.errors import DeviceError
from protocol.graph import Graph
from workers.devices import DEVICES
from workers.devices.base import Plan
from workers.devices.host import HostBuffer
from workers.devices.reference import ReferenceDevice
from workers.ticks import Tick, nothing

NAME = "breaking"
WORDS = "the GPU does not work for this process any more: an illegal memory access was encountered"


class BreakingPlan(Plan):
    def __init__(self, device: BreakingDevice, graph: Graph) -> None:
        self._device, self.graph, self.n_nodes = device, graph, len(graph.tensors)

    def run(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> list[memoryview]:
        self._device.broken = True
        raise DeviceError(WORDS)


class BreakingDevice(ReferenceDevice):
    name = NAME

    def compile(self, graph: Graph, buffers: Mapping[int, HostBuffer], tick: Tick = nothing) -> BreakingPlan:  # type: ignore[override]
        return BreakingPlan(self, graph)


DEVICES[NAME] = lambda n_threads, memory_bytes, cpus: BreakingDevice(memory_bytes)

if __name__ == "__main__":
    from workers.__main__ import main

    sys.exit(main())
