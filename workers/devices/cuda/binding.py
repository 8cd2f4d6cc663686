"""Binds the nodes of a lowered graph to kernels; others run the reference kernel on the host, over copies.

A binding is a function of a binder and of nodes: it adds launches and returns whether there are any. `rows`, `attention`,
`products` and `scans` have them. One stream runs them in order, so nothing waits for anything by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from msgspec import structs

from protocol.dtypes import GGMLType
from protocol.graph import Tensor
from workers.devices.bindings import Bindings
from workers.devices.cuda.driver import Driver, Function, Grid
from workers.devices.cuda.weights import CUDABuffer, Memory, Weights
from workers.devices.lower import SCRATCH, Lowered, Node, Scratch, Span
from workers.kernels.cuda.launches import PIECE_THREADS, Four, Launch, MakesColumns, TellsPeaks
from workers.kernels.cuda.sources import Kernel
from workers.ticks import Tick

L = TypeVar("L", bound=Launch)
F32, F16, BF16, I32 = GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.I32
STATUS_BYTES = 256
"""At the beginning of the arena: the word where kernels say which node's index was bad."""
MAX_PEAKS = 1024
"""Words of a plan that `TellsPeaks` has."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A kernel, and what it is called with.

    Attributes:
        node: what it is for; joined: other nodes that it carries out as well.
        about: what a binding notes of it for the next.
    """

    function: Function
    grid: Grid
    argument: Launch
    node: int
    about: Mapping[str, object] | None = None
    joined: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fallback:
    """A node that the host computes."""

    node: Node


@dataclass(slots=True)
class Binder:
    """One pass over a graph.

    Attributes:
        base: address of the arena, which has the plan's scratch memory behind the status word.
        steps: launches and fallbacks, in order.
        kept: memory that kernels read and no node writes.
        written: places in buffers that nodes write; untouched: inputs that none writes.
        zeroed: memory that all launches leave as zeros, by its size.
        peaks: address of words that are zeros when a run begins, and how many are used.
        made: tensors whose columns a launch makes besides, and the step.
    """

    lowered: Lowered
    buffers: Mapping[int, CUDABuffer]
    base: int
    driver: Driver
    weights: Weights
    bindings: Bindings
    tick: Tick
    scratch: Scratch = field(init=False)
    steps: list[Launched | Fallback] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    kept: list[Memory] = field(default_factory=list)
    written: list[Span] = field(init=False)
    untouched: frozenset[int] = field(init=False)
    zeroed: dict[int, int] = field(default_factory=dict)
    peaks: tuple[int, int] = (0, 0)
    made: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scratch = Scratch(self.lowered)
        results = (self.lowered.places[n.index] for n in self.lowered.nodes)
        self.written = [place for place in results if place.buffer != SCRATCH]
        graph = self.lowered.graph
        written = {graph.root(n.tensor.view_src)[0] for n in self.lowered.nodes if n.tensor.view_src >= 0}
        self.untouched = frozenset(graph.inputs) - written

    def bind(self) -> None:
        """Every node, once."""
        for group in self.lowered.groups:
            self.tick()
            if len(group) > 1 and self._try(group):
                continue
            for node in group:
                if 0 not in node.tensor.ne and not self._try((node,)):
                    self.steps.append(Fallback(node))
                    self.fallbacks.append(node.op.name)
        self._leave_out_rows()

    def _leave_out_rows(self) -> None:
        """Of tensors that nobody reads but products, by their columns."""
        graph, n_more = self.lowered.graph, [-n for n in self.lowered.n_products]
        for i in (*graph.outputs, *(j for t in graph.tensors for j in (*t.src, t.view_src) if j >= 0)):
            n_more[i] += 1
        for i, at in self.made.items():
            step = self.steps[at]
            if not n_more[i] and self.tensors[i].view_src < 0 and self.scratch.all_have_columns(i):
                assert isinstance(step, Launched)  # `last` has said so
                self.steps[at] = replace(step, argument=structs.replace(step.argument, only_columns=True))

    def _try(self, nodes: Sequence[Node]) -> bool:
        binding = self.bindings.get(tuple(n.op.name for n in nodes))
        return binding is not None and all(0 not in n.tensor.ne for n in nodes) and binding(self, *nodes)

    # -- what bindings ask ---------------------------------------------------------------------------------------------

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.lowered.graph.tensors

    @property
    def status(self) -> int:
        """Address for `Launch.status`."""
        return self.base

    def at(self, span: Span) -> int:
        """Where a span begins."""
        if span.buffer == SCRATCH:
            return self.base + STATUS_BYTES + span.start
        return self.buffers[span.buffer].address + span.start

    def address(self, i: int) -> int:
        """Where tensor `i` begins."""
        return self.at(self.lowered.places[i])

    def more(self, n_bytes: int) -> int:
        """Address of scratch memory of this plan's own."""
        return self.at(self.scratch.more(n_bytes))

    def constant(self, data: bytes) -> int:
        """Address of these bytes, as long as the plan lives."""
        memory = Memory(self.driver, len(data))
        self.weights.copies.store(memory.address, memoryview(data), self.tick)
        self.kept.append(memory)
        return memory.address

    def zeros(self, n_bytes: int) -> int:
        """Address of zeros, which launches use one after the other and leave as they were."""
        if n_bytes not in self.zeroed:
            self.zeroed[n_bytes] = self.constant(bytes(n_bytes))
        return self.zeroed[n_bytes]

    def makes_columns(self, i: int, at: int, row: int, scales: int, wide: bool) -> bool:
        """Whether the launch before this makes columns of tensor `i` besides; it does from now on."""
        last, t = self.last(MakesColumns), self.tensors[i]
        if last is None or last.columns or last.rows_made() != (self.address(i), t.ne[0], t.n_rows):
            return False
        self.widen(structs.replace(last, columns=at, columns_row=row, columns_scales=scales, columns_wide=wide))
        self.made[i] = len(self.steps) - 1
        return True

    def tells_peaks(self, i: int) -> int:
        """Address of the largest magnitudes of tensor `i`'s rows, which the launch before this tells from now on; 0 where it
        cannot."""
        last, step, t = self.last(TellsPeaks), self.steps[-1] if self.steps else None, self.tensors[i]
        made = (self.address(i), t.ne[0], t.n_rows)
        if last is None or last.columns or last.peaks or last.rows_made() != made or made[0] % 16 or t.ne[0] % 4:
            return 0
        at, n = self.peaks if self.peaks[0] else (self.more(4 * MAX_PEAKS), 0)
        if n + t.n_rows > MAX_PEAKS:
            return 0
        self.peaks = at, n + t.n_rows
        assert isinstance(step, Launched)  # `last` has said so
        grid = Grid(t.n_rows, last.pieces(), PIECE_THREADS, 0) if last.pieces() else step.grid
        self.steps[-1] = replace(step, grid=grid, argument=structs.replace(last, peaks=at + 4 * n))
        return at + 4 * n

    def last(self, kind: type[L]) -> L | None:
        """What the launch before this is called with, if it is of this kind: it may do more besides, or be left out."""
        step = self.steps[-1] if self.steps else None
        return step.argument if isinstance(step, Launched) and isinstance(step.argument, kind) else None

    def widen(self, argument: Launch, y: int = 0, *joined: int) -> None:
        """The launch before this is called with something else, with y blocks, if that is not 0, and for more nodes."""
        step = self.steps[-1]
        assert isinstance(step, Launched)  # `last` has said so
        grid = step.grid._replace(y=y or step.grid.y)
        self.steps[-1] = replace(step, grid=grid, argument=argument, joined=step.joined + joined)

    def apart(self, n: Node, *own: int) -> bool:
        """Whether a node may run together with those of the launch before this. `own`: sources that do not count."""
        step, places = self.steps[-1], self.lowered.places
        assert isinstance(step, Launched)  # `last` has said so
        for i in (step.node, *step.joined):
            sources = (places[j] for j in self.tensors[i].src if j >= 0)
            if any(places[n.index].meets(place) for place in (places[i], *sources)):
                return False
            if any(places[j].meets(places[i]) for j in n.tensor.src if j >= 0 and j not in own):
                return False
        return True

    def stays(self, i: int) -> bool:
        """Whether a buffer holds tensor `i` and no node writes there: kernels may read it before those in front are done."""
        place = self.lowered.places[i]
        return place.buffer != SCRATCH and not any(place.meets(other) for other in self.written)

    def given(self, *of: int) -> bool:
        """Whether these are of inputs, which come before all launches and which none writes; -1 is nothing."""
        return all(self.lowered.graph.root(i)[0] in self.untouched for i in of if i >= 0)

    def add(
        self, node: Node, argument: Launch, x: int, y: int = 1, threads: int = 256, shared: int = 0,
        about: Mapping[str, object] | None = None, **macros: object,
    ) -> None:  # fmt: skip
        """A kernel of so many blocks, compiled with these macros; `shared`: as `Grid` has it, `about`: as `Launched`."""
        given = tuple(sorted((name, str(value)) for name, value in macros.items()))
        function = self.driver.function(Kernel(argument.file, argument.function, given), self.tick)
        self.steps.append(Launched(function, Grid(x, y, threads, shared), argument, node.index, about))


def ceil_div(n: int, size: int) -> int:
    return -(-n // size)


def strides(t: Tensor) -> Four:
    """ggml's strides, with 0 where there is one element: a result broadcasts over it."""
    return tuple(0 if n == 1 else size for n, size in zip(t.ne, t.nb, strict=True))  # type: ignore[return-value]
