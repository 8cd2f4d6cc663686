"""A plan of the CPU device: a program for the team, bound to where weights lie now and bound again when that changes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from protocol.errors import KernelError
from protocol.graph import Graph
from workers.devices.base import Plan, StepNote
from workers.devices.bindings import Bindings
from workers.devices.cpu import attention, products, rows, scans
from workers.devices.cpu.binding import Binder
from workers.devices.cpu.program import Pace, Parts, Run, Words
from workers.devices.cpu.weights import CPUBuffer, Weights
from workers.devices.host import Arena, HostMemory, HostPlan
from workers.devices.lower import Lowered
from workers.kernels.native import Team
from workers.ticks import Tick, paced

BINDINGS = Bindings({**rows.BINDINGS, **attention.BINDINGS, **products.BINDINGS, **scans.BINDINGS})
PATTERNS = tuple(ops for ops in BINDINGS if len(ops) > 1)


class Profile:
    """Seconds and steps, by what a step is called."""

    def __init__(self) -> None:
        self._rows: dict[str, list[float]] = {}

    def count(self, op: str, seconds: float, n: int = 1) -> None:
        row = self._rows.setdefault(op, [0.0, 0])
        row[0] += seconds
        row[1] += n

    def lines(self) -> list[str]:
        """What all took, then each, the longest first; nothing where nothing ran."""
        total = sum(s for s, _ in self._rows.values())
        rows = sorted(self._rows.items(), key=lambda row: -row[1][0])
        lines = [f"{op:32} {s * 1e3:10.2f} ms {100 * s / total:5.1f} % {n:9.0f} steps" for op, (s, n) in rows]
        return [f"{total * 1e3:.2f} ms", *lines] if rows else []


class Stamps:
    """When each step of a plan began and ended in its last run, while `on`.

    Attributes:
        ns: by the monotonic clock. Shapes: [n_steps, 2].
    """

    def __init__(self, n_steps: int) -> None:
        self.ns = np.zeros((n_steps, 2), np.int64)
        self.on = False


def _run_team(team: Team, graph: Graph, words: Words, stamps: Stamps | None, first: int, last: int) -> None:
    bad = team.run(words, first, last, stamps.ns if stamps is not None and stamps.on else None)
    if bad >= 0:
        raise KernelError(f"node {bad} ({graph.tensors[bad].op}): an index points outside the tensor that it names")


class Bound:
    """A graph bound to addresses.

    Attributes:
        words: the team's steps.
        stamps, titles, nodes: of the steps, for a plan whose steps are noted.
        scratch_bytes: of the arena; thread_bytes: of each thread's own memory.
    """

    def __init__(self, binder: Binder, team: Team, pace: Pace, noting: bool) -> None:
        program = binder.program
        self.fallbacks = tuple(binder.fallbacks)
        self.scratch_bytes, self.thread_bytes = binder.scratch.n_bytes, binder.thread_bytes
        self.words = program.words()
        self.stamps = Stamps(len(program.steps)) if noting else None
        self.titles, self.nodes = ([s.title() for s in program.steps], program.nodes) if noting else ([], [])
        # what runs steps must not hold the plan: a plan that holds itself keeps its buffers
        run = partial(_run_team, team, binder.lowered.graph, self.words, self.stamps)
        parts = [*((prelude, -1) for prelude in binder.preludes), *program.parts]
        self._runs = [part if isinstance(part, Run) else None for part in parts]
        self._parts = Parts(parts, run, pace)
        self.host = HostPlan(binder.memory, self._parts)
        self.kept = binder.kept

    def run_noted(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> tuple[list[memoryview], list[StepNote]]:
        assert self.stamps is not None  # it was bound for it
        self.stamps.on = self._parts.alone = True
        try:
            out, parts = self.host.run_noted(inputs, tick)
        finally:
            self.stamps.on = self._parts.alone = False
        notes: list[StepNote] = []
        for run, part in zip(self._runs, parts, strict=True):
            if run is None:
                notes.append(part._replace(title=f"{part.title} in NumPy") if part.node >= 0 else part)
                continue
            steps = slice(run.first, run.last)
            named = zip(self.titles[steps], self.nodes[steps], self.stamps.ns[steps].tolist(), strict=True)
            notes += [StepNote(title, node, *stamps) for title, node, stamps in named]
        return out, notes


class CPUPlan(Plan):
    """`bind` it, then run it; it binds itself again when weights have been packed or unpacked since.

    Attributes:
        program: the team's steps, a row of words each.
    """

    def __init__(
        self, lowered: Lowered, buffers: Mapping[int, CPUBuffer], team: Team, weights: Weights, arena: Arena, pace: Pace,
        profile: Profile | None,
    ) -> None:  # fmt: skip
        self.graph = lowered.graph
        self.n_nodes = sum(len(group) for group in lowered.groups)
        self._lowered, self._buffers, self._team, self._weights, self._arena = lowered, buffers, team, weights, arena
        self._pace, self._profile, self._noting = pace, profile, profile is not None
        used = {span.buffer for span in lowered.places}
        self._used_buffers = [buffer for number, buffer in buffers.items() if number in used]
        self._bound: Bound | None = None
        self._layouts = -1

    @property
    def fallbacks(self) -> tuple[str, ...]:  # type: ignore[override]
        return self._bound.fallbacks if self._bound is not None else ()

    @property
    def scratch_bytes(self) -> int | None:
        return self._bound.scratch_bytes if self._bound is not None and self._layouts == self._layout() else None

    @property
    def program(self) -> Words:
        assert self._bound is not None  # a plan is bound before it is given out
        return self._bound.words

    def _layout(self) -> int:
        return sum(b.n_layouts for b in self._used_buffers)

    def bind(self, tick: Tick) -> Bound:
        """Bind to the layouts that the buffers have now. Calls the tick while it changes them."""
        self._layouts, layouts = -1, -1
        while layouts != self._layout():  # a node without a kernel may ask for its weights in GGUF's layout
            self._weights.settle(self._lowered, self._buffers, tick)
            layouts = self._layout()
            memory = HostMemory(self._lowered, self._buffers, self._arena)
            binder = Binder(self._lowered, self._buffers, memory, self._weights, BINDINGS, self._team.n_threads, tick)
            binder.bind()
            self._arena.memory(binder.scratch.n_bytes)
            self._bound = Bound(binder, self._team, self._pace, self._noting)
        self._layouts = layouts
        assert self._bound is not None  # just bound
        return self._bound

    def _ready(self, tick: Tick) -> Bound:
        bound = self._bound
        if bound is None or self._layouts != self._layout():
            bound = self.bind(paced(tick))
        self._arena.settle(bound.scratch_bytes, tick)
        self._team.reserve(bound.thread_bytes)
        return bound

    def run(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> list[memoryview]:
        bound = self._ready(tick)
        if self._profile is None:
            return bound.host.run(inputs, tick)
        start = time.perf_counter()
        out, notes = bound.run_noted(inputs, tick)
        rest = time.perf_counter() - start
        for note in notes:
            seconds = (note.ended_ns - note.begun_ns) / 1e9
            self._profile.count(note.title, seconds)
            rest -= seconds
        self._profile.count("between: inputs, waiting for each other", rest)
        return out

    def prepare_notes(self, tick: Tick) -> None:
        if not self._noting:
            self._noting = True
            self.bind(tick)

    def run_noted(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> tuple[list[memoryview], list[StepNote]]:
        return self._ready(tick).run_noted(inputs, tick)
