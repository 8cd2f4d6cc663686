"""What `ggmq top` shows, drawn for a terminal of any width, with colours or without. Pure: times are passed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from config.terminal import safe_line
from ggmq.overview import ClusterState, DeviceState, HostState, SlotView, WorkerState

LATELY_S = 5.0
BAR = 10
COLOURS = {"ready": "green", "silent": "yellow", "lost": "bold red"}
UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


class Sample(NamedTuple):
    at_s: float
    state: ClusterState


class Seen:
    """What was seen lately, for what changes with time.

    Attributes:
        where: what is asked.
        error: why it does not answer; empty while it does.
        heard_s: when it last answered.
        counts_tokens: it knows of tokens, and not of devices alone.
    """

    def __init__(self, where: str, counts_tokens: bool) -> None:
        self.where, self.counts_tokens = where, counts_tokens
        self.error, self.heard_s = "", 0.0
        self._samples: deque[Sample] = deque()

    def heard(self, now_s: float, state: ClusterState) -> None:
        self.error, self.heard_s = "", now_s
        self._samples.append(Sample(now_s, state))
        while len(self._samples) > 2 and self._samples[1].at_s <= now_s - LATELY_S:
            self._samples.popleft()

    @property
    def state(self) -> ClusterState | None:
        return self._samples[-1].state if self._samples else None

    def per_second(self, worker: str, index: int, counter: str) -> float:
        """How fast a counter of a device grows; 0 where it began anew."""
        first, last = self._samples[0], self._samples[-1]
        before, after = (_device(s.state, worker, index) for s in (first, last))
        if before is None or after is None or last.at_s <= first.at_s:
            return 0.0
        return max(0.0, (getattr(after, counter) - getattr(before, counter)) / (last.at_s - first.at_s))

    def wire_per_second(self, worker: str, index: int) -> float:
        """Bytes that a device's worker moves, counting what goes from worker to worker once."""
        parts = [self.per_second(worker, index, c) for c in ("wire_in_bytes", "wire_out_bytes", "handed_out_bytes")]
        return max(0.0, parts[0] + parts[1] - parts[2])


def _workers(state: ClusterState) -> Iterator[tuple[HostState, WorkerState]]:
    return ((host, worker) for host in state.hosts for worker in host.workers)


def _device(state: ClusterState, worker: str, index: int) -> DeviceState | None:
    return next((d for _, w in _workers(state) if w.name == worker for d in w.devices if d.index == index), None)


def size(n_bytes: float) -> str:
    unit, scale = next(((u, s) for u, s in UNITS if n_bytes >= s), ("B", 1.0))
    return f"{n_bytes / scale:.{0 if scale == 1 or n_bytes >= 100 * scale else 1}f} {unit}"


def bar(part: float, whole: float) -> str:
    n = round(BAR * min(1.0, part / whole)) if whole > 0 else 0
    return "#" * n + "." * (BAR - n)


def drawn(seen: Seen, now_s: float, width: int) -> RenderableType:
    """One frame."""
    state = seen.state
    parts: list[RenderableType] = [_head(seen, now_s)]
    if state is not None:
        parts += [_rates(seen, state), _devices(seen, state, width)]
        if state.slots:
            parts.append(_slots(state.slots, width))
    return Group(*parts)


def _head(seen: Seen, now_s: float) -> Text:
    out = Text(f"ggmq top  {safe_line(seen.where)}", style="bold")
    state = seen.state
    if state is not None and state.uptime_s:
        out.append(f"  up {_duration(state.uptime_s)}", style="not bold")
    if seen.error:
        since = f" for {now_s - seen.heard_s:.0f} s" if seen.heard_s else ""
        out.append(f"\nno answer{since}, trying on: {safe_line(seen.error)}", style="bold red")
    if state is not None and state.error:
        out.append(f"\n{safe_line(state.error)}", style="bold red")
    for model in state.models if state is not None else ():
        n = f"{model.n_params / 1e9:.2f} G" if model.n_params >= 1e9 else f"{model.n_params / 1e6:.1f} M"
        about = f"{model.n_layers} layers, {n} parameters, {size(model.bytes)}, context {model.n_ctx}"
        out.append(f"\n{safe_line(model.name)}: {about}", style="not bold")
    return out


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}"


def _rates(seen: Seen, state: ClusterState) -> Text:
    devices = [(w.name, d.index) for _, w in _workers(state) for d in w.devices]
    wire = sum(seen.wire_per_second(*d) for d in devices)
    if not seen.counts_tokens:
        n = max((seen.per_second(*d, "n_computes") for d in devices), default=0.0)
        each = f", {size(wire / n)} each" if n else ""
        return Text(f"{n:.1f} computes/s, {size(wire)}/s on the wire{each}")
    r, busy = state.tokens_per_s, sum(s.state != "idle" for s in state.slots)
    n = r.prompt + r.decode
    each = f"{size(wire / n)} a token" if n else "- a token"
    return Text(f"made {r.decode:.1f} tokens/s, read {r.prompt:.1f} tokens/s, on the wire {each}, slots {busy} of "
                f"{len(state.slots)}, waiting {state.queue.waiting} of {state.queue.limit}")  # fmt: skip


def _table(*columns: tuple[str, str]) -> Table:
    """Columns by name and side; names in the first are cut where there is no room, figures never."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
    for i, (name, side) in enumerate(columns):
        table.add_column(name, justify="right" if side == "right" else "left", no_wrap=True, overflow="ellipsis",
                         ratio=None, min_width=6 if not i else len(name))  # fmt: skip
    return table


def _devices(seen: Seen, state: ClusterState, width: int) -> Table:
    wide = width >= 110
    columns = [("worker", "left"), ("state", "left"), ("ping", "right"), ("device", "left")]
    columns += [("host", "left")] if wide else []
    columns += [("memory", "left"), ("runs/s", "right"), ("wire/s", "right"), ("layers", "left")]
    table = _table(*columns)
    for host, w in _workers(state):
        for d in w.devices:
            alive = w.state == "ready"
            used = d.total_bytes - d.free_bytes
            cells = [safe_line(w.name), w.state, f"{w.ping_ms:.1f} ms" if alive else "-", safe_line(d.name)]
            cells += [safe_line(host.name)] if wide else []
            cells += [f"{bar(used, d.total_bytes)} {size(used)}/{size(d.total_bytes)}" if wide else
                      f"{size(used)}/{size(d.total_bytes)}"]  # fmt: skip
            cells += [f"{seen.per_second(w.name, d.index, 'n_computes'):.0f}", size(seen.wire_per_second(w.name, d.index))]
            cells.append(_layers(d, len(state.models) > 1))
            table.add_row(*cells, style=None if alive else COLOURS[w.state])
    return table


def _layers(d: DeviceState, named: bool) -> str:
    out = []
    for held in d.layers:
        ends = [f"{held.first}-{held.last}"] if held.last >= held.first else []
        ends += [name for name, there in (("emb", held.embedding), ("out", held.output)) if there]
        out.append(f"{safe_line(held.model) + ' ' if named else ''}{'+'.join(ends)}")
    return ", ".join(out) or "-"


def _slots(slots: list[SlotView], width: int) -> Table:
    """The slots that do something; of those that are idle how many there are."""
    table = _table(("slot", "left"), ("does", "left"), ("prompt", "right"), ("made", "right"), ("context", "left"),
                   ("s", "right"), *([("model", "left")] if width >= 110 else []))  # fmt: skip
    busy = [s for s in slots if s.state != "idle"]
    for s in busy:
        read = f"{s.n_read}/{s.n_prompt}" if s.state == "prompt" else str(s.n_prompt)
        table.add_row(str(s.id), s.state, read, str(s.n_made), bar(s.n_read + s.n_made, s.n_ctx), f"{s.seconds:.1f}",
                      *([safe_line(s.model)] if width >= 110 else []))  # fmt: skip
    if len(busy) < len(slots):
        table.add_row("", f"{len(slots) - len(busy)} idle", style="dim")
    return table
