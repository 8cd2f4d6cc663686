"""`python -m bench.cuda`: what ggmq does on a GPU, and which share of what the card can it is. One run of some minutes.

Models of 1 and 9 G parameters with random weights are put into the GPU's memory and run in this process, then two worker
processes share the card. A scenario that fails says why, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from bench.models import LARGE, Q4_K_M, Shape, write_model
from bench.resident import Computed, Resident
from protocol.errors import GgmqError
from workers.devices import open_device
from workers.devices.base import Device
from workers.devices.cuda.device import CUDADevice
from workers.devices.cuda.plan import CUDAPlan
from workers.devices.reference import ReferenceDevice
from workers.ticks import nothing

MIXES = ("Q4_0", Q4_K_M, "Q8_0", "F16")
SMALL = Shape(n_embd=256, n_layer=8, n_head=4, n_head_kv=2, n_ff=512, n_vocab=1024, n_ctx=256)
SIZES = {"1 G": Shape(n_layer=20), "9 G": Shape(n_embd=4096, n_layer=36, n_ff=14336, n_vocab=128_000)}
STREAMS = (1, 8, 32)
DEPTH, PROMPT, N_CTX = 512, 512, 1024
NMSE = 1e-3
"""Of logits against `reference`, which multiplies in float64 what a device multiplies in float16."""
MEASURE_S = 1.0
MODEL = "llama-0.85b-q4_0.gguf"
"""What worker processes are measured with."""
COPY_BYTES = 1 << 30
MATRIX = 8192
AHEAD = 24
"""Copies of COPY_BYTES that the GPU does while the host puts a whole plan behind them on the stream."""


@dataclass(frozen=True)
class Row:
    """A figure. `share`: of what the card does in the same run, from 0 to 1; below 0: there is none."""

    scenario: str
    what: str
    value: float
    unit: str
    share: float = -1.0

    def __str__(self) -> str:
        share = f"{100 * self.share:.0f} %" if self.share >= 0 else ""
        return f"| {self.scenario} | {self.what} | {self.value:.4g} | {self.unit} | {share} |"


class Clock(Protocol):
    """Marks between what is on a stream."""

    def mark(self) -> Any: ...

    def between(self, begun: Any, ended: Any) -> float:
        """Seconds; all that is on the stream has been done."""


class HostClock:
    """For a device whose work takes place on the host."""

    def __init__(self, device: CUDADevice) -> None:
        self._driver = device.driver

    def mark(self) -> float:
        self._driver.synchronize()
        return time.perf_counter()

    def between(self, begun: float, ended: float) -> float:
        return ended - begun


class EventClock:
    """The GPU's own."""

    def __init__(self, device: CUDADevice) -> None:
        import cupy

        self._cuda, self._stream = cupy.cuda, device.driver.stream  # type: ignore[attr-defined]

    def mark(self) -> Any:
        event = self._cuda.Event()
        event.record(self._stream)
        return event

    def between(self, begun: Any, ended: Any) -> float:
        return float(self._cuda.get_elapsed_time(begun, ended)) / 1e3


class Peaks(NamedTuple):
    """What the card does here. 0: not known. Units: bytes and operations a second."""

    copied: float = 0.0
    multiplied: float = 0.0


def share(rate: float, peak: float) -> float:
    return rate / peak if peak else -1.0


# -- the card ----------------------------------------------------------------------------------------------------------


def copy_rate(device: CUDADevice, clock: Clock) -> float:
    """Bytes a second that a copy from the device's memory to the device's memory reads and writes together."""
    a, b = device.alloc(COPY_BYTES), device.alloc(COPY_BYTES)
    try:
        device.driver.copy(b.address, a.address, COPY_BYTES)
        begun = clock.mark()
        for _ in range(16):
            device.driver.copy(b.address, a.address, COPY_BYTES)
        ended = clock.mark()
        device.driver.synchronize()
        return 16 * 2 * COPY_BYTES / clock.between(begun, ended)
    finally:
        device.free(a)
        device.free(b)


def matmul_rate() -> float:
    """Operations a second of cuBLAS's product of float16 matrices."""
    import cupy

    a = cupy.ones((MATRIX, MATRIX), cupy.float16)
    for _ in range(3):
        cupy.matmul(a, a)
    begun, ended = cupy.cuda.Event(), cupy.cuda.Event()
    begun.record()
    for _ in range(20):
        cupy.matmul(a, a)
    ended.record()
    ended.synchronize()
    del a
    cupy.get_default_memory_pool().free_all_blocks()
    return 20 * 2 * MATRIX**3 / (cupy.cuda.get_elapsed_time(begun, ended) / 1e3)


# -- a model -----------------------------------------------------------------------------------------------------------


def agreement(device: Device[Any], mix: str, folder: Path, shape: Shape = SMALL) -> float:
    """NMSE of a small model's logits on a device against `reference`."""
    found = []
    for d in (ReferenceDevice(), device):
        model = Resident(d, shape, mix, folder, 128, 2)
        found.append(model.logits(40))
        model.free()
    want, got = found
    return float(np.sum((got - want) ** 2) / np.sum(want**2))


def seconds(computed: Computed) -> float:
    """A run, as a worker does it: inputs in, outputs out. The median."""
    for _ in range(3):
        computed.plan.run(computed.inputs, nothing)
    took: list[float] = []
    while len(took) < 5 or (sum(took) < MEASURE_S and len(took) < 1000):
        begun = time.perf_counter()
        computed.plan.run(computed.inputs, nothing)
        took.append(time.perf_counter() - begun)
    return statistics.median(took)


def graph_seconds(device: CUDADevice, clock: Clock, computed: Computed) -> float:
    """A run on the GPU alone: graphs one behind the other."""
    assert isinstance(computed.plan, CUDAPlan)  # a CUDA device's
    bound = computed.plan.bind(nothing)
    for _ in range(3):  # it is put together as one graph by the second
        computed.plan.run(computed.inputs, nothing)
    graph = bound.captured[0]
    begun = clock.mark()
    for _ in range(20):
        graph.launch()
    ended = clock.mark()
    device.driver.synchronize()
    return clock.between(begun, ended) / 20


def kernel_seconds(device: CUDADevice, clock: Clock, computed: Computed) -> dict[str, tuple[float, int]]:
    """Time of a run by kernel, and how often each is launched. The GPU is kept busy until all of it is on the stream, so
    that no kernel waits for the host."""
    assert isinstance(computed.plan, CUDAPlan)  # a CUDA device's
    bound = computed.plan.bind(nothing)
    computed.plan.run(computed.inputs, nothing)
    computed.plan._begin(bound)  # the inputs, which others may have written over since
    steps = bound.launches
    room = device.alloc(2 * COPY_BYTES)
    try:
        for _ in range(AHEAD):
            device.driver.copy(room.address, room.address + COPY_BYTES, COPY_BYTES)
        marks = [clock.mark()]
        for step in steps:
            device.driver.launch(step.function, step.grid, step.argument)
            marks.append(clock.mark())
        device.driver.synchronize()
    finally:
        device.free(room)
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for step, (begun, ended) in zip(steps, pairwise(marks), strict=True):
        title = step.argument.title()
        so_far, n = found[title]
        found[title] = so_far + clock.between(begun, ended), n + 1
    return dict(found)


def by_kernel(name: str, device: CUDADevice, clock: Clock, computed: Computed) -> Iterator[Row]:
    """The kernels that take most, and what passes between them."""
    if computed.plan.fallbacks:
        yield Row(name, "nodes that the host computes, so it is no graph", len(computed.plan.fallbacks), "")
        return
    whole, kernels = graph_seconds(device, clock, computed), kernel_seconds(device, clock, computed)
    inside = sum(s for s, _ in kernels.values())
    for title, (s, n) in sorted(kernels.items(), key=lambda item: -item[1][0])[:12]:
        yield Row(name, f"{title}, {n} times", 1e6 * s, "us", s / inside)
    yield Row(name, "all kernels, each by itself", 1e6 * inside, "us")
    yield Row(name, "the same as one graph", 1e6 * whole, "us")
    n_steps = sum(n for _, n in kernels.values())
    yield Row(name, "between two kernels of the graph (below 0: they overlap)", 1e6 * (whole - inside) / n_steps, "us")


def model(device: CUDADevice, clock: Clock, peaks: Peaks, size: str, mix: str, folder: Path) -> Iterator[Row]:
    name = f"{size} {mix}"
    resident = Resident(device, SIZES[size], mix, folder, N_CTX, max(STREAMS))
    try:
        yield Row(name, "weights", resident.weight_bytes / 1e9, "GB")
        yield Row(name, "loading", resident.weight_bytes / 1e9 / resident.load_s, "GB/s")
        for n in STREAMS:
            computed = resident.decoding(n, DEPTH)
            s = seconds(computed)
            yield Row(name, f"decode, {n} streams at {DEPTH}" if n > 1 else f"decode at {DEPTH}", n / s, "tokens/s")
            read = resident.multiplied_bytes + n * DEPTH * resident.kv_bytes
            yield Row(name, "  weights, keys and values read", read / s / 1e9, "GB/s", share(read / s, peaks.copied))
            if not computed.plan.fallbacks:
                on_gpu = graph_seconds(device, clock, computed)
                yield Row(name, "  the GPU alone", read / on_gpu / 1e9, "GB/s", share(read / on_gpu, peaks.copied))
        computed = resident.reading(PROMPT)
        s = seconds(computed)
        rate = 2 * resident.multiplied * PROMPT / s
        yield Row(name, f"prefill of {PROMPT}", PROMPT / s, "tokens/s")
        yield Row(name, "  products", rate / 1e12, "TFLOP/s", share(rate, peaks.multiplied))
        yield from by_kernel(f"{name} decode", device, clock, resident.decoding(1, DEPTH))
        yield from by_kernel(f"{name} prefill", device, clock, resident.reading(PROMPT))
    finally:
        resident.free()


# -- workers -----------------------------------------------------------------------------------------------------------


def workers(name: str, n_workers: int, n_streams: int, folder: Path) -> Iterator[Row]:
    """What a user of `ggmq run` sees: processes, a broker, sockets between them."""
    command = [sys.executable, "-m", "ggmq", "bench", "-m", str(folder / MODEL), "-dev", name, "--workers", str(n_workers),
               "-p", str(PROMPT), "-n", "128", "--streams", str(n_streams), "-r", "3", "-o", "json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with code {done.returncode}: {done.stderr.strip()[-400:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    scenario = f"0.85 G Q4_0, {n_workers} worker{'s' * (n_workers > 1)}, {n_streams} stream{'s' * (n_streams > 1)}"
    yield Row(scenario, "decode", found["decode_tok_s"], "tokens/s")
    yield Row(scenario, f"prefill of {PROMPT}", found["prefill_tok_s"], "tokens/s")


# -- the program -------------------------------------------------------------------------------------------------------


class Table:
    """Rows as they come."""

    def __init__(self, quiet: bool) -> None:
        self.rows: list[Row] = []
        self.failed: dict[str, str] = {}
        self._quiet = quiet

    def say(self, line: str) -> None:
        if not self._quiet:
            print(line, flush=True)

    def add(self, title: str, scenario: Callable[[], Iterator[Row]]) -> None:
        """Run a scenario; if it fails that is said, and it has the rows that it had until then."""
        begun = time.perf_counter()
        try:
            for row in scenario():
                self.rows.append(row)
                self.say(str(row))
        except Exception as e:  # whatever it is, the others are to be measured
            self.failed[title] = f"{type(e).__name__}: {e}"
            self.say(f"| {title} | failed: {self.failed[title].splitlines()[0]} | | | |")
        print(f"{title}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)


def checks(device: Device[Any], folder: Path) -> Iterator[Row]:
    """Errors: AssertionError where logits are wrong, behind all figures."""
    wrong = []
    for mix in MIXES:
        nmse = agreement(device, mix, folder)
        yield Row("a small model", f"{mix}: NMSE of logits against reference", nmse, "")
        if not nmse < NMSE:
            wrong.append(mix)
    assert not wrong, f"logits of {', '.join(wrong)}: expected an NMSE below {NMSE}; rates of wrong results mean nothing"


def card(device: CUDADevice, clock: Clock, peaks: list[Peaks]) -> Iterator[Row]:
    """Its `peaks`, which are put in the list as they become known."""
    copied = copy_rate(device, clock)
    peaks.append(Peaks(copied))
    yield Row("the card", "a copy on the device", copied / 1e9, "GB/s")
    multiplied = matmul_rate()
    peaks.append(Peaks(copied, multiplied))
    yield Row("the card", f"cuBLAS, float16, {MATRIX} cubed", multiplied / 1e12, "TFLOP/s")


def measure(device: CUDADevice, clock: Clock, args: argparse.Namespace) -> Table:
    table, peaks = Table(args.output == "json"), [Peaks()]
    table.say("| scenario | | | | of the card |\n|---|---|---|---|---|")
    folder: Path = args.folder
    table.add("the card", partial(card, device, clock, peaks))
    table.add("a small model", partial(checks, device, folder))
    for size in args.sizes:
        for mix in MIXES:
            if device.broken:
                return table
            table.add(f"{size} {mix}", lambda size=size, mix=mix: model(device, clock, peaks[-1], size, mix, folder))  # type: ignore[misc]
    device.trim()
    write_model(folder / MODEL, "Q4_0", LARGE)
    for n_workers in (1, 2):
        for n_streams in STREAMS:
            title = f"{n_workers} workers, {n_streams} streams"
            table.add(title, partial(workers, device.name, n_workers, n_streams, folder))
    return table


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__)
    p.add_argument("-d", "--device", default="CUDA0", help="the GPU (default CUDA0)")
    p.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of the models (default: all)")
    p.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ggmq-bench", help="where models lie")
    p.add_argument("-o", "--output", choices=["md", "json"], default="md", help="table or JSON (default md)")
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        device = open_device(args.device, 1)
    except GgmqError as e:
        print(f"bench.cuda: {e}", file=sys.stderr)
        return 1
    if not isinstance(device, CUDADevice):
        p.error(f"--device {args.device}: expected CUDA0, CUDA1, ...")
    facts = device.driver.facts
    said = f"{facts.description}, {facts.architecture}, {facts.n_processors} processors, {device.total_bytes() >> 20} MiB"
    begun = time.perf_counter()
    if args.output == "md":
        print(said + "\n")
    table = measure(device, EventClock(device), args)
    if args.output == "json":
        print(json.dumps({"card": said, "rows": [asdict(row) for row in table.rows], "failed": table.failed}))
    else:
        print(f"\n{len(table.rows)} figures in {time.perf_counter() - begun:.0f} s, {len(table.failed)} scenarios failed, "
              f"{device.kernel_compiles} kernels compiled")  # fmt: skip
        for title, words in table.failed.items():
            print(f"\n{title}: {words}")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
