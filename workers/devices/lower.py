"""What every device needs of a graph before it binds its kernels, worked out once and without arrays or addresses.

Nodes in order, the place of every tensor, scratch memory by liveness, neighbours that one kernel may carry out, hazards,
and what several nodes share. A place is a `Span` of a buffer; a plan's own scratch memory is one buffer more, with a
number that no client's has. A device puts the spans where its memory is.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from protocol.dtypes import GGMLType, tensor_bytes
from protocol.errors import HandleError
from protocol.graph import Graph, Tensor
from protocol.ops import Op, op_of
from workers.devices.base import Buffer
from workers.ticks import Tick, alongside

ALIGN = 64
SCRATCH = 0
"""The number of a plan's own memory; on the wire it stands for no buffer."""
PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")
LARGE_GRAPH = 500
"""A graph of so many tensors is lowered in some hundredths of a second."""


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGN) * ALIGN


class Span(NamedTuple):
    """Bytes start..end of a buffer."""

    buffer: int
    start: int
    end: int

    def meets(self, other: Span) -> bool:
        return self.buffer == other.buffer and self.start < other.end and other.start < self.end


@dataclass(frozen=True, slots=True)
class Node:
    """A node that something is to be done for.

    Attributes:
        index: its tensor in the graph.
        src: tensors of the sources, None where one is left out; their indices are `tensor.src`.
    """

    index: int
    op: Op
    tensor: Tensor
    params: dict[str, Any]
    src: tuple[Tensor | None, ...]

    def req(self, i: int) -> Tensor:
        """A source that the op cannot do without."""
        t = self.src[i]
        assert t is not None  # the op table promised it
        return t

    def opt(self, i: int) -> Tensor | None:
        return self.src[i] if i < len(self.src) else None

    @property
    def cost(self) -> int:
        """About how many multiplications it is in NumPy; an element that is read or written is as 64 of them."""
        n = self.tensor.n_elements
        cost = 64 * max(n, *(t.n_elements for t in self.src if t is not None), 0)
        if self.op.name in (*PRODUCTS, "OUT_PROD"):
            cost += n * self.req(0).ne[0 if self.op.name in PRODUCTS else 1]
        elif self.op.name in ("FLASH_ATTN_EXT", "PAGED_ATTN"):
            cost += 2 * n * self.req(1).ne[1]
        elif self.op.name == "SSM_SCAN":
            cost += 64 * n * self.req(0).ne[0]
        return cost


class RopeKey(NamedTuple):
    """Rotations with the same key have the same angles: words of op_params, tensors of positions and of factors or -1."""

    params: tuple[int, ...]
    positions: int
    factors: int


@dataclass(frozen=True, slots=True)
class Lowered:
    """A graph as devices bind it.

    Attributes:
        groups: nodes in order; several in one where one kernel may carry them out.
        places: of every tensor.
        scratch_bytes: what results need of the plan's own memory.
        n_products: how many products read each tensor as their columns.
        weights: leaves that are read as source 0 of products and GET_ROWS and in no other way.
    """

    graph: Graph
    groups: tuple[tuple[Node, ...], ...]
    places: tuple[Span, ...]
    scratch_bytes: int
    n_products: tuple[int, ...]
    weights: frozenset[int]

    @property
    def nodes(self) -> Iterable[Node]:
        return (node for group in self.groups for node in group)

    def check(self, buffers: Mapping[int, Buffer]) -> None:
        """HandleError unless every buffer is there, and holds what is placed in it."""
        for i, (number, start, end) in enumerate(self.places):
            if number == SCRATCH:
                continue
            buffer = buffers.get(number)
            if buffer is None:
                raise HandleError(f"tensor {i}: buffer {number} is not one of this session")
            buffer.check(start, end - start, f"tensor {i}")

    def rope_key(self, node: Node) -> RopeKey | None:
        """For a ROPE whose angles are known before the graph runs; None where a node makes them."""
        positions, factors = node.tensor.src[1], node.tensor.src[2] if len(node.tensor.src) > 2 else -1
        graph, t = self.graph, node.req(1)
        leaves = all(j < 0 or graph.tensors[graph.root(j)[0]].op == "NONE" for j in (positions, factors))
        if not leaves or t.type != GGMLType.I32 or t.ne[0] != t.n_elements:
            return None
        return RopeKey(node.tensor.params, positions, factors)


def lower(graph: Graph, patterns: Collection[tuple[str, ...]] = (), runs: Collection[tuple[str, ...]] = ()) -> Lowered:
    """Lower a validated graph.

    `patterns`: ops of neighbours that the device has one kernel for, such as ("RMS_NORM", "MUL"). `runs`: ops that stand one
    behind the other and that it may carry out at once: what these read, no result of theirs is laid over.
    Errors: HandleError for an input or output that does not lie in one piece.
    """
    for i in (*graph.inputs, *graph.outputs):
        if not graph.tensors[i].contiguous:
            raise HandleError(f"tensor {i}: an input or output is contiguous; make it so with CONT")
    nodes = []
    for i, t in enumerate(graph.tensors):
        op = op_of(t)
        if not op.view and t.op != "NONE":
            sources = tuple(graph.tensors[j] if j >= 0 else None for j in t.src)
            nodes.append(Node(i, op, t, op.values(t.params), sources))
    groups = _grouped(graph, nodes, patterns)
    offsets, scratch_bytes = lay_out(graph, [*groups, *_runs(nodes, runs)])
    places = []
    for i, t in enumerate(graph.tensors):
        root, start = graph.root(i)
        r = graph.tensors[root]
        at = (r.offset if r.buffer else offsets[root]) + start
        places.append(Span(r.buffer or SCRATCH, at, at + t.extent_bytes()))
    n_products = [0] * len(graph.tensors)
    for node in nodes:
        if node.op.name in PRODUCTS:
            n_products[node.tensor.src[1]] += 1
    whole = tuple(_apart(groups, places))
    return Lowered(graph, whole, tuple(places), scratch_bytes, tuple(n_products), _weights(graph))


def lower_aside(
    graph: Graph, tick: Tick, patterns: Collection[tuple[str, ...]] = (), runs: Collection[tuple[str, ...]] = ()
) -> Lowered:
    """As `lower`; a large graph takes a while."""
    if len(graph.tensors) < LARGE_GRAPH:
        return lower(graph, patterns, runs)
    return alongside.do(partial(lower, graph, patterns, runs), tick)


def lay_out(graph: Graph, groups: Iterable[Sequence[Node]] = ()) -> tuple[dict[int, int], int]:
    """Place the roots that live in scratch so that two whose lives overlap never share bytes. What a group reads lives until
    its last result is written.

    Returns: offset of each such root, and the size of the arena. First fit over a list of free gaps, in order.
    """
    n = len(graph.tensors)
    root = [graph.root(i)[0] for i in range(n)]
    last = list(range(n))
    for i, t in enumerate(graph.tensors):
        for j in (i, *t.src):
            if j >= 0:
                last[root[j]] = max(last[root[j]], i)
    for group in groups:
        for j in (j for node in group for j in node.tensor.src if j >= 0):
            last[root[j]] = max(last[root[j]], group[-1].index)
    for i in graph.outputs:
        last[root[i]] = n
    for i in graph.inputs:
        last[i] = max(last[i], i)
    ends: dict[int, list[int]] = {}
    offsets: dict[int, int] = {}
    live: list[tuple[int, int, int]] = []  # (offset, size, root), sorted by offset
    arena = 0
    inputs = set(graph.inputs)
    for i in (*graph.inputs, *(i for i in range(n) if i not in inputs)):
        t = graph.tensors[i]
        if t.view_src < 0 and not t.buffer:
            size = aligned(max(1, tensor_bytes(t.type, t.ne)))
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


def _grouped(graph: Graph, nodes: Sequence[Node], patterns: Collection[tuple[str, ...]]) -> list[tuple[Node, ...]]:
    """Nodes in order, those together that stand together in a pattern, each of which takes the result before it, which
    nobody else wants; of several patterns the longest."""
    n_uses = [0] * len(graph.tensors)
    for t in graph.tensors:
        for j in t.src:
            if j >= 0:
                n_uses[j] += 1
    for i in graph.outputs:
        n_uses[i] += 1
    longest_first = sorted(patterns, key=len, reverse=True)
    groups, at = [], 0
    while at < len(nodes):
        size = 1
        for pattern in longest_first:
            group = nodes[at : at + len(pattern)]
            if tuple(n.op.name for n in group) == pattern and _is_chain(group, n_uses):
                size = len(pattern)
                break
        groups.append(tuple(nodes[at : at + size]))
        at += size
    return groups


def _runs(nodes: Sequence[Node], runs: Collection[tuple[str, ...]]) -> Iterator[Sequence[Node]]:
    """Nodes wherever the ops of a run stand."""
    names = tuple(n.op.name for n in nodes)
    for run in runs:
        yield from (nodes[i : i + len(run)] for i in range(len(nodes)) if names[i : i + len(run)] == run)


def _is_chain(group: Sequence[Node], n_uses: Sequence[int]) -> bool:
    return all(b.tensor.src[0] == a.index and n_uses[a.index] == 1 for a, b in pairwise(group))


def _apart(groups: Iterable[tuple[Node, ...]], places: Sequence[Span]) -> Iterator[tuple[Node, ...]]:
    """The groups whose last result may be written while the first is read; the nodes of others alone."""
    for group in groups:
        source, result = places[group[0].tensor.src[0]] if group[0].tensor.src else None, places[group[-1].index]
        if len(group) == 1 or source is None or source.start == result.start or not source.meets(result):
            yield group
        else:
            yield from ((node,) for node in group)


def _weights(graph: Graph) -> frozenset[int]:
    leaves = {i for i, t in enumerate(graph.tensors) if t.op == "NONE"}
    for t in graph.tensors:
        leaves.discard(t.view_src)
        leaves.difference_update(t.src[1:] if t.op in (*PRODUCTS, "GET_ROWS") else t.src)
    return frozenset(leaves)


class Hazards:
    """Which steps must wait: those that touch what was written, or write what was read, since all last waited."""

    def __init__(self) -> None:
        self._reads: list[Span] = []
        self._writes: list[Span] = []

    def waits(self, reads: Sequence[Span], writes: Sequence[Span]) -> bool:
        """Whether the next step, with these spans, waits for all that came before it."""
        wait = _meet(reads, self._writes) or _meet(writes, self._writes) or _meet(writes, self._reads)
        if wait:
            self.clear()
        self._reads += reads
        self._writes += writes
        return wait

    def clear(self) -> None:
        """All have waited."""
        self._reads, self._writes = [], []


def _meet(new: Sequence[Span], old: Sequence[Span]) -> bool:
    return any(b == c and start < last and first < end for b, start, end in new for c, first, last in old)


class Scratch:
    """A plan's own memory beyond its results, handed out while nodes are bound in their order.

    Attributes:
        n_bytes: what the plan needs in all.
    """

    def __init__(self, lowered: Lowered) -> None:
        self.n_bytes = aligned(lowered.scratch_bytes)
        self._shared: dict[Hashable, Span] = {}
        self._wanted = list(lowered.n_products)
        self._columns: dict[int, Span] = {}
        self._free: list[Span] = []

    def more(self, n_bytes: int) -> Span:
        at = self.n_bytes
        self.n_bytes += aligned(n_bytes)
        return Span(SCRATCH, at, at + n_bytes)

    def shared(self, key: Hashable, n_bytes: int) -> tuple[Span, bool]:
        """A place that all who name this key share. Returns: it, and whether the caller is the first."""
        known = self._shared.get(key)
        if known is not None:
            return known, False
        self._shared[key] = self.more(n_bytes)
        return self._shared[key], True

    def columns(self, i: int, n_bytes: int) -> tuple[Span, bool]:
        """A place for tensor `i` as one more of its products reads it: prepared by the first, given away after the last.

        Returns: it, and whether the caller is the first.
        """
        known = self._columns.get(i)
        if known is None:
            free = next((s for s in self._free if s.end - s.start >= n_bytes), None)
            if free is not None:
                self._free.remove(free)
            self._columns[i] = free or self.more(n_bytes)
        place = self._columns[i]
        self._wanted[i] -= 1
        if not self._wanted[i]:
            self._free.append(self._columns.pop(i))
        return place, known is None

    def all_have_columns(self, i: int) -> bool:
        """Whether every product that reads tensor `i` has asked for its place."""
        return not self._wanted[i]
