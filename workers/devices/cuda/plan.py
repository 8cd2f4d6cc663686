"""A plan of the CUDA device: kernels bound to addresses, put together as one CUDA graph when they have run once.

Inputs come from staging memory and outputs go there, at places of the plan's own; whatever changes from run to run lies in
device memory, so a graph that was put together once is right for every run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Protocol

from protocol.dtypes import tensor_bytes
from protocol.errors import GgmqError, HandleError, InternalError, KernelError
from workers import tensors
from workers.devices.base import Plan, StepNote
from workers.devices.bindings import Bindings
from workers.devices.cuda.binding import STATUS_BYTES, Binder, Fallback, Launched
from workers.devices.cuda.copies import Copies, wait_for_all
from workers.devices.cuda.driver import Captured, Driver
from workers.devices.cuda.weights import CUDABuffer, Weights
from workers.devices.host import compute
from workers.devices.lower import Lowered, Node, aligned
from workers.kernels import reference
from workers.ticks import Tick, completing, nothing, paced

GOOD = 0xFFFFFFFF
"""What the status word holds when every index was good."""


class Owner(Protocol):
    """What a plan asks of its device (`CUDADevice`)."""

    driver: Driver
    copies: Copies
    weights: Weights
    n_arenas: int
    staging: memoryview

    @property
    def arena(self) -> int: ...

    def reserve(self, scratch_bytes: int, staging_bytes: int, tick: Tick) -> None: ...


class Places:
    """Where a plan's inputs and outputs lie in staging memory: the status word first, then outputs, then inputs."""

    def __init__(self, lowered: Lowered) -> None:
        graph = lowered.graph
        at = 64
        self.outputs: list[tuple[int, int]] = []
        self.inputs: list[tuple[int, int]] = []
        for indices, places in ((graph.outputs, self.outputs), (graph.inputs, self.inputs)):
            for i in indices:
                n = tensor_bytes(graph.tensors[i].type, graph.tensors[i].ne)
                places.append((at, n))
                at += aligned(n)
        self.n_bytes = at


class Bound:
    """A graph bound to addresses. `parts`: launches that go together, and nodes that the host computes between them."""

    def __init__(self, binder: Binder, places: Places, staging: memoryview) -> None:
        self.binder, self.staging = binder, staging
        self.parts: list[list[Launched] | Node] = []
        for aside, steps in groupby(binder.steps, key=lambda s: isinstance(s, Fallback)):
            if aside:
                self.parts += [s.node for s in steps if isinstance(s, Fallback)]
            else:
                self.parts.append([s for s in steps if isinstance(s, Launched)])
        self.captured: dict[int, Captured] = {}
        self.n_runs = 0

    @property
    def launches(self) -> list[Launched]:
        """Those of all parts, in order."""
        return [s for s in self.binder.steps if isinstance(s, Launched)]


class CUDAPlan(Plan):
    """`bind` it, then run it; it binds itself again when weights or the arena have moved."""

    def __init__(self, device: Owner, lowered: Lowered, buffers: Mapping[int, CUDABuffer], bindings: Bindings) -> None:
        self.graph = lowered.graph
        self.n_nodes = sum(len(group) for group in lowered.groups)
        self._device, self._lowered, self._buffers, self._bindings = device, lowered, buffers, bindings
        used = {span.buffer for span in lowered.places}
        self._used = [buffer for number, buffer in buffers.items() if number in used]
        self._places = Places(lowered)
        self._bound: Bound | None = None
        self._layouts = (-1, -1)

    @property
    def fallbacks(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self._bound.binder.fallbacks) if self._bound is not None else ()

    def _layout(self) -> tuple[int, int]:
        return sum(b.n_layouts for b in self._used), self._device.n_arenas

    def bind(self, tick: Tick) -> Bound:
        """Bind to the layouts that the buffers have now. Errors: HandleError, OutOfMemory."""
        device, lowered = self._device, self._lowered
        lowered.check(self._buffers)
        layouts = (-1, -1)
        while layouts != self._layout():  # a node without a kernel asks for its weights in GGUF's layout, scratch may move
            device.weights.settle(lowered, self._buffers, tick)
            layouts = self._layout()
            binder = Binder(lowered, self._buffers, device.arena, device.driver, device.weights, self._bindings, tick)
            binder.bind()
            for step in binder.steps:
                if isinstance(step, Fallback):
                    device.weights.settle_node(lowered, step.node, self._buffers, tick)
            device.reserve(STATUS_BYTES + binder.scratch.n_bytes, self._places.n_bytes, tick)
            self._bound = Bound(binder, self._places, device.staging)
        self._layouts = layouts
        assert self._bound is not None  # just bound
        return self._bound

    def _ready(self, tick: Tick) -> Bound:
        if self._bound is None or self._layouts != self._layout():
            return self.bind(paced(tick))
        return self._bound

    def run(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> list[memoryview]:
        return self._run(inputs, tick, None)

    def run_noted(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> tuple[list[memoryview], list[StepNote]]:
        """A note for each launch; the host waits for one before it puts the next on the stream."""
        notes: list[StepNote] = []
        return self._run(inputs, tick, notes), notes

    def _run(self, inputs: Sequence[bytes | memoryview], tick: Tick, notes: list[StepNote] | None) -> list[memoryview]:
        bound = self._ready(tick)
        if len(inputs) != len(self._places.inputs):
            raise HandleError(f"graph takes {len(self._places.inputs)} inputs, got {len(inputs)}")
        for i, ((_, n), data) in enumerate(zip(self._places.inputs, inputs, strict=True)):
            if n != len(data):
                raise HandleError(f"input {i}: expected {n} bytes, got {len(data)}")
        for (at, n), data in zip(self._places.inputs, inputs, strict=True):
            bound.staging[at : at + n] = memoryview(data).cast("B")
        if notes is None and all(isinstance(part, list) for part in bound.parts):
            with completing(tick) as steady:  # it uses staging memory until the stream has done all
                self._run_whole(bound, paced(steady))
                self._wait(steady)
        else:
            self._run_parts(bound, tick, notes)
            self._wait(tick)
        bound.n_runs += 1
        bad = int.from_bytes(bound.staging[:4], "little")
        if bad != GOOD:
            raise KernelError(f"node {bad} ({self.graph.tensors[bad].op}): an index points outside the tensor that it names")
        return [bound.staging[at : at + n] for at, n in self._places.outputs]

    def _run_whole(self, bound: Bound, tick: Tick) -> None:
        """All of it as one piece of work, from the second run on."""
        if bound.n_runs == 0:
            self._put(bound, tick)  # a stream that is full takes one more when it has done another
            return
        if 0 not in bound.captured:
            bound.captured[0] = self._device.driver.capture(lambda: self._put(bound, nothing))
        bound.captured[0].launch()

    def _put(self, bound: Bound, tick: Tick) -> None:
        self._begin(bound)
        for launches in bound.parts:
            assert isinstance(launches, list)  # nothing of it is the host's
            for step in launches:
                self._device.driver.launch(step.function, step.grid, step.argument)
                tick()
        self._end(bound)

    def _begin(self, bound: Bound) -> None:
        """The status word, the peaks and the inputs."""
        driver, binder = self._device.driver, bound.binder
        driver.fill(binder.status, 0xFF, 4)
        at, n = binder.peaks
        if n:
            driver.fill(at, 0, 4 * n)
        for (at, n), i in zip(self._places.inputs, self.graph.inputs, strict=True):
            if n:
                driver.upload(binder.address(i), bound.staging[at : at + n])

    def _end(self, bound: Bound) -> None:
        driver, binder = self._device.driver, bound.binder
        driver.download(bound.staging[:4], binder.status)
        for (at, n), i in zip(self._places.outputs, self.graph.outputs, strict=True):
            if n:
                driver.download(bound.staging[at : at + n], binder.address(i))

    def _run_parts(self, bound: Bound, tick: Tick, notes: list[StepNote] | None) -> None:
        """Part after part, with what the host computes between them."""
        driver, tick = self._device.driver, paced(tick)
        self._begin(bound)
        for part in bound.parts:
            if isinstance(part, Node):
                begun_ns = time.monotonic_ns()
                self._compute_here(bound, part, tick)
                if notes is not None:
                    notes.append(StepNote(f"{part.op.name} in NumPy", part.index, begun_ns, time.monotonic_ns()))
                continue
            for step in part:
                begun_ns = time.monotonic_ns() if notes is not None else 0
                driver.launch(step.function, step.grid, step.argument)
                if notes is not None:
                    self._wait(tick)
                    notes.append(StepNote(step.argument.title(), step.node, begun_ns, time.monotonic_ns()))
        self._end(bound)

    def _compute_here(self, bound: Bound, node: Node, tick: Tick) -> None:
        """One node by its definition: its operands come to the host, its result goes back."""
        binder, places = bound.binder, self._lowered.places
        of = [*(j for j in node.tensor.src if j >= 0), node.index]
        copies = self._device.copies
        held = {i: copies.fetch(binder.address(i), places[i].end - places[i].start, tick) for i in of}
        for i in of:  # what shares bytes with the result is that result
            if i != node.index and places[i] == places[node.index]:
                held[i] = held[node.index]
        arrays = {i: tensors.view(held[i], self.graph.tensors[i], 0) for i in of}
        src = [arrays[j] if j >= 0 else None for j in node.tensor.src]
        try:
            compute(reference.Node(node.index, node.op, node.tensor, node.params, arrays[node.index], src, list(node.src)),
                    node.cost, tick)  # fmt: skip
        except GgmqError:
            raise
        except MemoryError as e:
            raise KernelError(f"node {node.index}: out of memory in a kernel") from e
        except Exception as e:
            raise InternalError(f"node {node.index} ({node.tensor.op}): {type(e).__name__}: {e}") from e
        copies.store(binder.address(node.index), held[node.index].data, tick)

    def _wait(self, tick: Tick) -> None:
        """Until the stream has done all, looking at the sockets meanwhile."""
        wait_for_all(self._device.driver, tick)
