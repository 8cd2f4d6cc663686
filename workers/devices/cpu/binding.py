"""Binds the nodes of a lowered graph to steps of the team; others run the reference kernel on the caller's thread.

A binding is a function of a binder and of nodes: it adds steps and returns whether there are any. `rows`, `attention`,
`products` and `scans` have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy.typing as npt

from protocol.dtypes import GGMLType
from workers.devices.bindings import Bindings
from workers.devices.cpu.program import Program
from workers.devices.cpu.weights import CPUBuffer, Weights
from workers.devices.host import HostMemory, Step, compute
from workers.devices.lower import Lowered, Node, Scratch, Span
from workers.kernels import layout, records
from workers.ticks import Tick

F32, F16, I32 = GGMLType.F32, GGMLType.F16, GGMLType.I32


class Rows(NamedTuple):
    """Evenly spaced rows: address of the first, bytes from one to the next, how many, and elements of each."""

    at: int
    row: int
    n_rows: int
    n: int

    def alike(self, other: Rows) -> bool:
        return (self.n_rows, self.n) == (other.n_rows, other.n)


class Binder:
    """One pass over a graph.

    Attributes:
        thread_bytes: what each thread needs of memory of its own.
        preludes: called before each run of the plan.
        fallbacks: ops of the nodes without a kernel.
        kept: arrays that steps point to.
    """

    def __init__(
        self, lowered: Lowered, buffers: Mapping[int, CPUBuffer], memory: HostMemory, weights: Weights, bindings: Bindings,
        n_threads: int, tick: Tick,
    ) -> None:  # fmt: skip
        self.lowered, self.buffers, self.memory, self.weights, self.tick = lowered, buffers, memory, weights, tick
        self._bindings = bindings
        self.tensors = lowered.graph.tensors
        self.program = Program(n_threads)
        self.scratch = Scratch(lowered)
        self.thread_bytes = layout.PANEL_BYTES  # more than the 192 bytes that a rest of 16 lanes needs
        self.preludes: list[Step] = []
        self.fallbacks: list[str] = []
        self.kept: list[npt.NDArray[Any]] = []

    def bind(self) -> None:
        """Every node, once."""
        for group in self.lowered.groups:
            self.tick()
            if len(group) > 1 and self._try(group):
                continue
            for node in group:
                if not self._try((node,)):
                    self._fall_back(node)
        self.program.flush()

    def _try(self, nodes: Sequence[Node]) -> bool:
        binding = self._bindings.get(tuple(n.op.name for n in nodes))
        return binding is not None and all(0 not in n.tensor.ne for n in nodes) and binding(self, *nodes)

    def _fall_back(self, node: Node) -> None:
        for i, t in zip(node.tensor.src, node.src, strict=True):
            if t is not None and t.op == "NONE" and t.buffer in self.buffers:
                place = self.place(i)
                self.weights.unpack(self.buffers[t.buffer], place.start, place.end - place.start, self.tick)
        self.program.add_aside(node, partial(compute, self.memory.reference(node), node.cost))
        self.fallbacks.append(node.op.name)

    # -- what bindings ask ---------------------------------------------------------------------------------------------

    def place(self, i: int) -> Span:
        return self.lowered.places[i]

    def address(self, i: int) -> int:
        """Where tensor `i` begins."""
        return self.memory.address(self.lowered.places[i])

    def rows(self, i: int, kind: GGMLType = F32) -> Rows | None:
        """A float32 (or float16) tensor whose rows are evenly spaced."""
        t = self.tensors[i]
        if t.type != kind or t.nb[0] != (4 if kind == F32 else 2) or 0 in t.ne:
            return None
        if t.ne[2] == t.ne[3] == 1 or (t.nb[2] == t.nb[1] * t.ne[1] and t.nb[3] == t.nb[2] * t.ne[2]):
            return Rows(self.address(i), t.nb[1], t.n_rows, t.ne[0])
        if t.ne[1] == t.ne[3] == 1:
            return Rows(self.address(i), t.nb[2], t.n_rows, t.ne[0])
        return None

    def add(self, node: Node, step: records.Step) -> None:
        """A step that reads the node's sources and writes its result."""
        self.program.add(node, step, [self.place(j) for j in node.tensor.src if j >= 0], [self.place(node.index)])

    def need(self, n_bytes: int) -> None:
        """Each thread needs so much memory of its own."""
        self.thread_bytes = max(self.thread_bytes, n_bytes)
