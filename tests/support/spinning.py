"""As a program, a worker that has the device `spinning` too, whose graphs take SPIN_S and look at no socket meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from protocol.graph import Graph
from workers.devices import DEVICES
from workers.devices.base import Plan
from workers.devices.host import HostBuffer
from workers.devices.reference import ReferenceDevice
from workers.ticks import Tick, nothing

NAME = "spinning"
SPIN_S = 4.0


class SpinningPlan(Plan):
    def __init__(self, plan: Plan) -> None:
        self._plan, self.graph, self.n_nodes = plan, plan.graph, plan.n_nodes

    def run(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> list[memoryview]:
        due = time.monotonic() + SPIN_S
        while time.monotonic() < due:
            pass
        return self._plan.run(inputs, nothing)


class SpinningDevice(ReferenceDevice):
    name = NAME

    def compile(self, graph: Graph, buffers: Mapping[int, HostBuffer], tick: Tick = nothing) -> SpinningPlan:  # type: ignore[override]
        return SpinningPlan(super().compile(graph, buffers, tick))


DEVICES[NAME] = lambda n_threads, memory_bytes, cpus: SpinningDevice(memory_bytes)

if __name__ == "__main__":
    from workers.__main__ import main

    sys.exit(main())
