"""A graph compiled for a device in host memory: order, scratch by liveness, bound kernels, resolved addresses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from protocol.dtypes import tensor_bytes
from protocol.errors import GgmqError, HandleError, InternalError, KernelError
from protocol.graph import Graph
from protocol.ops import op_of
from workers import tensors
from workers.devices.base import Buffer, HostDevice, Plan
from workers.kernels import reference
from workers.kernels.reference import Node
from workers.tensors import Array, Bytes
from workers.ticks import TICK_S, Tick

ALIGN = 64


def lay_out(graph: Graph) -> tuple[dict[int, int], int]:
    """Place the roots that live in scratch so that two whose lives overlap never share bytes.

    Returns: offset of each such root, and the size of the arena. First fit over a list of free gaps, in order.
    """
    n = len(graph.tensors)
    root = [graph.root(i)[0] for i in range(n)]
    last = list(range(n))
    for i, t in enumerate(graph.tensors):
        for j in (i, *t.src):
            if j >= 0:
                last[root[j]] = max(last[root[j]], i)
    for i in graph.outputs:
        last[root[i]] = n
    for i in graph.inputs:
        last[i] = max(last[i], i)
    ends: dict[int, list[int]] = {}
    offsets: dict[int, int] = {}
    live: list[tuple[int, int, int]] = []  # (offset, size, root), sorted by offset
    arena = 0
    order = [*graph.inputs, *(i for i in range(n) if i not in set(graph.inputs))]
    for i in order:
        t = graph.tensors[i]
        if t.view_src < 0 and not t.buffer:
            size = -(-max(1, tensor_bytes(t.type, t.ne)) // ALIGN) * ALIGN
            at, slot = 0, 0
            for slot, (start, length, _) in enumerate(live):
                if start - at >= size:
                    break
                at = start + length
            else:
                slot = len(live)
            live.insert(slot, (at, size, i))
            offsets[i] = at
            arena = max(arena, at + size)
            ends.setdefault(last[i], []).append(i)
        done = ends.pop(i, None) if t.op != "NONE" else None
        if done:
            live = [entry for entry in live if entry[2] not in done]
    return offsets, arena


Step = Callable[[], None]


class HostPlan(Plan):
    """Nodes bound to arrays, run one after the other.

    A device with kernels of its own overrides `_steps`; here every node runs the reference kernel.
    """

    def __init__(self, device: HostDevice, graph: Graph, buffers: dict[int, Buffer]) -> None:
        self.graph = graph
        self.buffers = buffers
        offsets, self.arena_bytes = lay_out(graph)
        arena = device.arena(self.arena_bytes)
        self.memory: list[tuple[Bytes, int]] = []
        arrays: list[Array] = []
        for i, t in enumerate(graph.tensors):
            root, start = graph.root(i)
            r = graph.tensors[root]
            if r.buffer:
                buffer = buffers.get(r.buffer)
                if buffer is None:
                    raise HandleError(f"tensor {i}: buffer {r.buffer} is not one of this session")
                buffer.check(r.offset, tensor_bytes(r.type, r.ne), f"tensor {root}")
                base, at = buffer.memory, r.offset
            else:
                base, at = arena, offsets[root]
            self.memory.append((base, at + start))
            arrays.append(tensors.view(base, t, at + start))
        self.inputs = [self._bytes(i) for i in graph.inputs]
        self.outputs = [self._bytes(i) for i in graph.outputs]
        nodes = []
        for i, t in enumerate(graph.tensors):
            op = op_of(t)
            if op.view or t.op == "NONE":
                continue
            nodes.append(Node(i, op, t, op.values(t.params), arrays[i],
                              [arrays[j] if j >= 0 else None for j in t.src],
                              [graph.tensors[j] if j >= 0 else None for j in t.src]))  # fmt: skip
        self.n_nodes = len(nodes)
        self.steps = self._steps(nodes)

    def _steps(self, nodes: list[Node]) -> list[tuple[Step, int]]:
        """What `run` calls in turn, and the node that each begins with."""
        return [(partial(reference.run, node), node.index) for node in nodes]

    def _bytes(self, i: int) -> memoryview:
        t = self.graph.tensors[i]
        if not t.contiguous:
            raise HandleError(f"tensor {i}: an input or output is contiguous; make it so with CONT")
        base, at = self.memory[i]
        return base[at : at + tensor_bytes(t.type, t.ne)].data

    def run(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> list[memoryview]:
        if len(inputs) != len(self.inputs):
            raise HandleError(f"graph takes {len(self.inputs)} inputs, got {len(inputs)}")
        for i, (target, data) in enumerate(zip(self.inputs, inputs, strict=True)):
            if len(target) != len(data):
                raise HandleError(f"input {i}: expected {len(target)} bytes, got {len(data)}")
        for target, data in zip(self.inputs, inputs, strict=True):
            target[:] = memoryview(data).cast("B")
        due = time.monotonic() + TICK_S
        with np.errstate(all="ignore"):
            for step, index in self.steps:
                try:
                    step()
                except GgmqError:
                    raise
                except MemoryError as e:
                    raise KernelError(f"node {index}: out of memory in a kernel") from e
                except Exception as e:
                    raise InternalError(f"node {index} ({self.graph.tensors[index].op}): {type(e).__name__}: {e}") from e
                now = time.monotonic()
                if now >= due:
                    tick()
                    due = now + TICK_S
        return self.outputs
