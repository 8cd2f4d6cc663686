"""A graph as a program of the CPU device's team: steps in order, and before which of them the threads must meet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from protocol.errors import KernelError
from protocol.graph import Graph
from workers.devices.base import Buffer
from workers.kernels import layout
from workers.kernels.native import Team
from workers.kernels.reference import Node
from workers.kernels.steps import HEADER, WORD, WORDS
from workers.kernels.steps import Step as Record
from workers.plan import ALIGN, HostPlan, Step
from workers.tensors import Array
from workers.ticks import Tick, nothing, paced

if TYPE_CHECKING:  # the device makes plans: at run time it imports this file
    from workers.devices.cpu import CPUDevice

Range = tuple[int, int]
Words = npt.NDArray[np.int64]
TICK_COST = 400_000_000
"""Multiplications after which a running plan looks at its sockets: some milliseconds."""
STEP_COST = 4 * TICK_COST
"""A product that needs more of them is several steps."""


def _run_team(team: Team, graph: Graph, program: Words, profile: Words | None, first: int, last: int) -> None:
    bad = team.run(program, first, last, profile)
    if bad >= 0:
        raise KernelError(f"node {bad} ({graph.tensors[bad].op}): an index points outside the tensor that it names")


class StepPlan(HostPlan):
    """A plan whose nodes run on the team where they are bound to steps; a subclass binds them.

    Attributes:
        program: the team's steps, one row each.
        profile: nanoseconds of each of them, when the device profiles.
    """

    def __init__(self, device: CPUDevice, graph: Graph, buffers: dict[int, Buffer], tick: Tick) -> None:
        self.device = device
        used = [buffers[t.buffer] for t in graph.tensors if t.buffer in buffers]
        self._used_buffers = list({id(b): b for b in used}.values())
        self._rebind(graph, buffers, tick)

    def _rebind(self, graph: Graph, buffers: dict[int, Buffer], tick: Tick) -> None:
        """Bind to the layouts that the buffers have now. Calls the tick while it changes them."""
        self._layouts, layouts = -1, -1
        self._tick = tick
        while layouts != self._layout():  # a node without a kernel may ask for its weights in GGUF's layout
            self.device.unpack_for(graph, buffers, tick)
            layouts = self._layout()
            self._bind_all(graph, buffers)
        self._layouts, self._tick = layouts, nothing

    def _layout(self) -> int:
        return sum(b.n_layouts for b in self._used_buffers)

    def run(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> list[memoryview]:
        if self._layouts != self._layout():
            self._rebind(self.graph, self.buffers, paced(tick))
        self.device.settle(self._end, tick)
        self.device.team.reserve(self._scratch_bytes)
        if self.profile is None:
            return super().run(inputs, tick)
        self.profile[:] = 0
        start = time.perf_counter()
        out = super().run(inputs, tick)
        rest = time.perf_counter() - start
        for record, ns in zip(self._records, self.profile, strict=True):
            self.device.count(record.title(), ns / 1e9, 1)
            rest -= ns / 1e9
        self.device.count("between: inputs, tables, NumPy ops", rest, 1)
        return out

    def _bind_all(self, graph: Graph, buffers: dict[int, Buffer]) -> None:
        self._records: list[Record] = []
        self._waits: list[bool] = []
        self._record_nodes: list[int] = []
        self._reads: list[Range] = []
        self._writes: list[Range] = []
        self._quantized: dict[int, Range] = {}
        self._free: list[Range] = []
        self._parts: dict[int, int] = {}
        self._tables: dict[tuple[object, ...], tuple[int, int]] = {}
        self._preludes: list[Step] = []
        self._turns: list[Array] = []
        self._used = [0] * len(graph.tensors)
        self._products_of = [0] * len(graph.tensors)
        for t in graph.tensors:
            for j in t.src:
                if j >= 0:
                    self._used[j] += 1
            if t.op in ("MUL_MAT", "MUL_MAT_ID"):
                self._products_of[t.src[1]] += 1
        for i in graph.outputs:
            self._used[i] += 1
        super().__init__(self.device, graph, buffers)

    # -- from nodes to steps -------------------------------------------------------------------------------------------

    def _steps(self, nodes: list[Node]) -> list[tuple[Step, int]]:
        self._out: list[tuple[Step | Range, int]] = []
        self._first_record = 0
        self._end = -(-self.arena_bytes // ALIGN) * ALIGN
        self._scratch_bytes = layout.PANEL_BYTES  # more than the 192 bytes that a rest of 16 lanes needs
        cost, skip, fallbacks = 0, -1, []
        for k, node in enumerate(nodes):
            if node.index == skip:
                continue
            following = nodes[k + 1] if k + 1 < len(nodes) else None
            bound, fused = self._bind(node, following)
            if not bound:
                self._flush()
                self._out.append((self._fallback(node), node.index))
                fallbacks.append(node.op.name)
                cost = 0
                continue
            if fused and following is not None:
                skip = following.index
            cost += self._cost(node)
            if cost > TICK_COST:
                self._flush()
                cost = 0
        self._flush()
        self.fallbacks = tuple(fallbacks)
        self.program = np.zeros((len(self._records), WORDS), np.int64)
        for i, (record, wait) in enumerate(zip(self._records, self._waits, strict=True)):
            self.program[i, :HEADER] = record.opcode, wait
            record.pack(self.program[i], WORD * HEADER)
        self.profile = np.zeros(len(self._records), np.int64) if self.device.profiling else None
        self.device.arena(self._end)
        # what runs steps must not hold the plan: a plan that holds itself keeps its buffers
        out, self._out = self._out, []
        run = partial(_run_team, self.device.team, self.graph, self.program, self.profile)
        return [(prelude, -1) for prelude in self._preludes] + [
            (partial(run, *step) if isinstance(step, tuple) else step, node) for step, node in out
        ]

    def _flush(self) -> None:
        """What was added so far is one run of the team; behind it the sockets are looked at."""
        if self._first_record < len(self._records):
            self._out.append(((self._first_record, len(self._records)), self._record_nodes[self._first_record]))
        self._first_record = len(self._records)
        self._reads, self._writes = [], []

    @staticmethod
    def _cost(n: Node) -> int:
        if n.op.name in ("MUL_MAT", "MUL_MAT_ID"):
            a = n.src_tensor[0]
            assert a is not None  # products have their sources
            return n.tensor.n_elements * a.ne[0]
        return n.tensor.n_elements * 64

    def _bind(self, node: Node, following: Node | None) -> tuple[bool, bool]:
        """Add a node's steps. Returns whether it has any, and whether the node behind it is in them too."""
        raise NotImplementedError

    def _fallback(self, node: Node) -> Step:
        """What runs a node that has no steps."""
        raise NotImplementedError

    def _add(self, node: Node, record: Record, reads: list[Range], writes: list[Range]) -> None:
        """Append a step; the threads meet before it when it touches what was written since they last met."""

        def meets(new: list[Range], old: list[Range]) -> bool:
            return any(a < d and c < b for a, b in new for c, d in old)

        wait = meets(reads, self._writes) or meets(writes, self._writes) or meets(writes, self._reads)
        if wait:
            self._reads, self._writes = [], []
        self._reads += reads
        self._writes += writes
        self._records.append(record)
        self._waits.append(wait)
        self._record_nodes.append(node.index)

    def _more(self, n_bytes: int) -> int:
        """The address of further scratch memory of this plan."""
        at = self._end
        self._end += -(-n_bytes // ALIGN) * ALIGN
        return int(self.device.arena_address() + at)

    def _address(self, i: int) -> int:
        base, at = self.memory[i]
        return int(base.ctypes.data + at)

    def _range(self, i: int) -> Range:
        at = self._address(i)
        return at, at + self.graph.tensors[i].extent_bytes()
