"""A trace as a file that Perfetto opens, and as a table. Pure.

Source: the Trace Event Format, which ui.perfetto.dev reads: complete events (`X`) on threads of processes, times in
microseconds; slices of one thread lie beside or inside each other.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ggmq.archs.memory import LayerMemory
from ggmq.archs.stage import Placed
from ggmq.tracing import Sent, Trace
from protocol.graph import Graph
from protocol.ops import OPS
from protocol.tracing import TracedCompute, TracedHop

HOST, BROKER = 1, 2
"""Processes of the file; the stages follow."""
VIEWS = {"NONE", *(name for name, op in OPS.items() if op.view)}


class Slice(NamedTuple):
    name: str
    begun_ns: int
    ended_ns: int
    args: dict[str, Any]


class StageNames(NamedTuple):
    """What is said of a stage: where it lies, and what its graphs are made of."""

    title: str
    placed: dict[str, Placed]
    memory: dict[int, LayerMemory]


def events(trace: Trace, stages: Sequence[StageNames], graphs: Sequence[Sequence[Graph]]) -> list[dict[str, Any]]:
    """The events of the file. graphs: of each stage, a batch each."""
    start = min([s.begun_ns for s in trace.spans] or [0])
    out = [*_named(HOST, "main host", {1: "engine"})]
    out += _named(BROKER, f"broker{_off(trace.clocks[0].error_ns)}", {1: "messages"})
    out += _slices(HOST, 1, [Slice(s.name, s.begun_ns, s.ended_ns, {}) for s in trace.spans], start)
    flights = [Slice(_batch_name(s), s.ended_ns, s.answered_ns, {"seq": s.under_way.seq}) for s in trace.sent]
    out += _in_lanes(HOST, 2, "under way", [f for f in flights if f.ended_ns], start)
    out += _slices(BROKER, 1, [_hop(h) for h in trace.hops], start)
    for i, (stage, computes) in enumerate(zip(stages, trace.computes, strict=True)):
        pid = BROKER + 1 + i
        out += _named(pid, stage.title + _off(trace.clocks[1 + i].error_ns), {1: "computes"})
        names = {id(g): node_names(g, stage) for g in graphs[i]}
        for c, sent, graph in zip(computes, trace.sent, graphs[i]):
            out += _slices(pid, 1, _compute(c, sent, graph, names[id(graph)]), start)
        waits = [w for c in computes for w in _waits(c)]
        out += _in_lanes(pid, 2, "queue", waits, start)
    for number, (sent, *of_stages) in enumerate(zip(trace.sent, *trace.computes)):
        out += _flow(number, sent, of_stages, start)
    return out


def _off(error_ns: int) -> str:
    return f" (clock within {error_ns / 1e3:.0f} us)"


def _batch_name(sent: Sent) -> str:
    return f"{'decode' if sent.decodes else 'prompt'}, {sent.under_way.n_tokens} token{'s'[: sent.under_way.n_tokens != 1]}"


def _hop(h: TracedHop) -> Slice:
    went = f"stage {', '.join(map(str, h.devices))} out" if h.devices else ""
    came = "request in" if h.from_client else "reply in"
    name = ", ".join(part for part in (came, went, "reply out" if h.replied else "") if part)
    return Slice(name, h.begun_ns, h.ended_ns, {"seq": h.seq})


def _compute(c: TracedCompute, sent: Sent, graph: Graph, names: dict[int, str]) -> Iterator[Slice]:
    args = {"seq": sent.under_way.seq, "in_bytes": c.n_in_bytes, "out_bytes": c.n_out_bytes, "n_steps": len(c.steps)}
    yield Slice(_batch_name(sent), c.begun_ns, c.sent_ns, args)
    if c.ran_ns > c.begun_ns:
        yield Slice("plan", c.begun_ns, c.ran_ns, {})
    yield Slice("graph", c.ran_ns, c.ended_ns, {})
    for s in c.steps:
        what = names.get(s.node, "")
        about = {"node": s.node, "op": graph.tensors[s.node].op, "ne": graph.tensors[s.node].ne} if s.node >= 0 else {}
        yield Slice(f"{s.title} {what}".strip(), s.begun_ns, s.ended_ns, about)
    yield Slice("give", c.ended_ns, c.sent_ns, {"bytes": c.n_out_bytes})


def _waits(c: TracedCompute) -> Iterator[Slice]:
    ready = max(c.arrived_ns, min(c.handed_ns, c.begun_ns))
    if ready > c.arrived_ns:
        yield Slice("wait for activations", c.arrived_ns, ready, {})
    yield Slice("wait for its turn", ready, max(ready, c.begun_ns), {})


# -- names -------------------------------------------------------------------------------------------------------------


def node_names(graph: Graph, stage: StageNames) -> dict[int, str]:
    """What each node is about: the weight that it, or one that is carried out with it, takes; else its layer."""
    weights = {(p.buffer, p.offset): name for name, p in stage.placed.items()}
    layers = {memory.buffer: f"blk.{il}" for il, memory in stage.memory.items()}
    out: dict[int, str] = {}
    layer = ""
    for i, t in enumerate(graph.tensors):
        found = next((weights[at] for at in _leaves(graph, t.src) if at in weights), "")
        found = found or next((layers[buffer] for buffer, _ in _leaves(graph, t.src) if buffer in layers), "")
        if found.startswith("blk."):
            layer = ".".join(found.split(".")[:2])
        elif found:
            layer = ""
        out[i] = found.removesuffix(".weight") or layer
    following = ""
    for i in reversed(range(len(graph.tensors))):  # an RMS_NORM is one step with the MUL by its weights
        t = graph.tensors[i]
        if t.op in ("RMS_NORM", "NORM") and following:
            out[i] = following
        if t.op not in VIEWS:
            following = out[i]
    return out


def _leaves(graph: Graph, src: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Buffers and offsets of the sources that lie in one, through their views."""
    for i in src:
        if i >= 0:
            root, _ = graph.root(i)
            t = graph.tensors[root]
            if t.buffer:
                yield t.buffer, t.offset


# -- the format --------------------------------------------------------------------------------------------------------


def _named(pid: int, process: str, threads: dict[int, str]) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": process}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    for tid, name in threads.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _slices(pid: int, tid: int, slices: Iterable[Slice], start_ns: int) -> Iterator[dict[str, Any]]:
    for s in sorted(slices, key=lambda s: (s.begun_ns, -s.ended_ns)):
        yield {"ph": "X", "name": s.name, "pid": pid, "tid": tid, "ts": (s.begun_ns - start_ns) / 1e3,
               "dur": max(0, s.ended_ns - s.begun_ns) / 1e3, "args": s.args}  # fmt: skip


def _in_lanes(pid: int, first: int, name: str, slices: Iterable[Slice], start_ns: int) -> Iterator[dict[str, Any]]:
    """Slices that may overlap, on as many threads as they need."""
    lanes: list[list[Slice]] = []
    for s in sorted(slices, key=lambda s: s.begun_ns):
        lane = next((lane for lane in lanes if lane[-1].ended_ns <= s.begun_ns), None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(s)
    for i, lane in enumerate(lanes):
        yield from list(_named(pid, "", {first + i: name if not i else f"{name} {i + 1}"}))[2:]
        yield from _slices(pid, first + i, lane, start_ns)


def _flow(number: int, sent: Sent, computes: Sequence[TracedCompute], start_ns: int) -> Iterator[dict[str, Any]]:
    """Arrows: from the engine over the stages."""
    at = [(HOST, sent.begun_ns), *((BROKER + 1 + i, c.begun_ns) for i, c in enumerate(computes))]
    for i, (pid, ns) in enumerate(at):
        ph = "s" if not i else "f" if i == len(at) - 1 else "t"
        yield {"ph": ph, "id": number, "name": "batch", "cat": "batch", "pid": pid, "tid": 1, "bp": "e",
               "ts": (ns - start_ns) / 1e3}  # fmt: skip


# -- the table ---------------------------------------------------------------------------------------------------------


def parts_of_a_token(trace: Trace, stages: Sequence[str]) -> list[tuple[str, float]]:
    """Where the time of a batch that decodes went, from one answer to the next, on average; they add up to all of it.

    Units: seconds.
    """
    hops: dict[int, list[TracedHop]] = {}
    for h in trace.hops:
        hops.setdefault(h.seq, []).append(h)
    sums: Counter[str] = Counter()
    n = 0
    for i, sent in enumerate(trace.sent):
        if not i or not sent.decodes or not sent.answered_ns or any(len(c) <= i for c in trace.computes):
            continue
        n += 1
        at = trace.sent[i - 1].answered_ns
        for name, ns in _way(sent, hops.get(sent.under_way.seq, []), [c[i] for c in trace.computes], stages):
            then = min(max(at, ns), sent.answered_ns)  # clocks are set beside each other only so well
            sums[name] += then - at
            at = then
    return [(name, ns / n / 1e9) for name, ns in sums.items()] if n else []


def _way(
    sent: Sent, hops: Sequence[TracedHop], computes: Sequence[TracedCompute], stages: Sequence[str]
) -> Iterator[tuple[str, int]]:
    """What a batch was doing until when."""
    yield "main host: sample, schedule", sent.begun_ns
    if hops:
        yield "main host: submit", hops[0].begun_ns
        yield "broker: request in, stages out", hops[0].ended_ns
    for i, (c, stage) in enumerate(zip(computes, stages, strict=True)):
        yield "to the first worker" if not i else "from worker to worker", c.handed_ns or c.arrived_ns
        yield f"{stage}: queue", c.begun_ns
        yield f"{stage}: graph", c.ended_ns
    yield "back to the broker", hops[-1].begun_ns if hops else sent.answered_ns
    yield "broker: reply in, reply out", hops[-1].ended_ns if hops else sent.answered_ns
    yield "main host: reply in", sent.answered_ns


def kernels_of_a_token(trace: Trace) -> list[tuple[str, float, float]]:
    """By what a step is called: its time and how many of it there are for a batch that decodes, on average, longest first.

    Units: seconds, steps.
    """
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    decoding = [i for i, s in enumerate(trace.sent) if s.decodes]
    for computes in trace.computes:
        for i in decoding:
            for s in computes[i].steps if i < len(computes) else ():
                seconds[s.title] += s.ended_ns - s.begun_ns
                counts[s.title] += 1
    n = max(1, len(decoding))
    return [(title, ns / n / 1e9, counts[title] / n) for title, ns in seconds.most_common()]


def between_tokens_s(trace: Trace) -> float:
    """The median of the times from one answer to the next, of batches that decode."""
    gaps = [b.answered_ns - a.answered_ns for a, b in zip(trace.sent, trace.sent[1:]) if b.decodes and b.answered_ns]
    return statistics.median(gaps) / 1e9 if gaps else 0.0
