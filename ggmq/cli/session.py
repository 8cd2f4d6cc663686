"""From options to a model that is loaded and ready: the bus, the devices, the placement, the upload."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from broker.placement import Assignment
from config.cores import n_cores
from config.terminal import print_line
from ggmq.archs import open_arch
from ggmq.archs.base import Arch
from ggmq.cli.options import cpus_of, keys_of, local_threads
from ggmq.cli.progress import progress_bars
from ggmq.cluster import Client, connect, local_bus
from ggmq.gguf import GGUF
from ggmq.runner import Runner, default_n_ctx, n_cells, plan
from protocol import limits
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.errors import ConfigError, GgmqError, OutOfMemory

MIB = 1 << 20
DEFAULT_WORKERS = 1
DRAIN_S = 0.5


@dataclass(slots=True)
class Session:
    """A loaded model and how long that took, in seconds."""

    client: Client
    arch: Arch
    runner: Runner
    infos: list[m.ListedDevice]
    load_s: float


@contextlib.contextmanager
def open_session(args: argparse.Namespace, g: GGUF, n_ctx: int = 0, n_slots: int = 1) -> Iterator[Session]:
    """Bring up the bus that the options describe, place and load the model for `n_slots` sequences.

    Everything ends with the block.
    """
    start = time.perf_counter()
    arch = open_arch(g)
    n_ctx = n_ctx or default_n_ctx(arch, args.ctx_size)
    with open_bus(args, arch.hp.n_layer, g.path.absolute()) as (client, order, host):
        client.note = note
        infos = settled(client)
        placed = partial(plan, arch, n_ctx=n_cells(n_ctx, n_slots), split=args.tensor_split, ngl=args.ngl, host=host,
                         order=order)  # fmt: skip
        try:
            assignments = placed(infos)
        except OutOfMemory:  # workers of one host do not know what the others keep of runs that ended
            if not client.release():
                raise
            infos = [msgspec.structs.replace(d, free_bytes=client.stats(i).free_bytes) if d.state == "ready" else d
                     for i, d in enumerate(infos)]  # fmt: skip
            assignments = placed(infos)
        runner = Runner(client, arch, n_ctx, assignments, n_slots, GGMLType[args.activations.upper()])
        runner.note = note
        try:
            with progress_bars() as show:
                runner.load(show)
            yield Session(client, arch, runner, infos, time.perf_counter() - start)
        finally:
            with contextlib.suppress(GgmqError):  # whoever cannot be told now hears it from the broker
                client.drain(DRAIN_S)


def note(text: str) -> None:
    """Something that a user should know while it lasts."""
    print_line(f"note    {text}", file=sys.stderr)


def settled(client: Client) -> list[m.ListedDevice]:
    """The devices of the bus, once at least one of them is ready or none is likely to be soon."""
    due = time.monotonic() + limits.RETURN_S
    said = False
    while True:
        infos = client.devices()
        states = {d.state for d in infos}
        if "ready" in states or "silent" not in states or time.monotonic() > due:
            return infos
        if not said:
            note(f"no worker answers; waiting for them, {limits.RETURN_S:.0f} s at most")
            said = True
        time.sleep(0.1)


@contextlib.contextmanager
def open_bus(args: argparse.Namespace, n_layers: int, model: Path) -> Iterator[tuple[Client, Sequence[str], str]]:
    """A client of the bus, the order of its workers, and the worker that keeps the layers that -ngl leaves here."""
    keys = keys_of(args)
    if args.broker:
        client = connect(args.broker, keys, note, getattr(args, "cluster_id", b""))
        try:
            yield client, getattr(args, "worker_order", ()), ""
        finally:
            client.close()
        return
    rpc: Sequence[str] = args.rpc or ()
    keep_here = bool(rpc) and args.ngl is not None and args.ngl < n_layers
    unsaid = 0 if rpc else len(args.worker_mem or ()) or DEFAULT_WORKERS
    n_local = args.workers if args.workers is not None else unsaid
    if not rpc and not n_local:
        raise ConfigError("--workers 0: expected at least one worker here, or some with --rpc")
    with local_bus(keys) as bus:
        threads = local_threads(args.threads, n_local + keep_here)
        if sum(threads) > n_cores():
            note(f"{sum(threads)} threads on {n_cores()} cores: they wait for each other; use fewer with -t or --workers")
        # workers of this host read the file themselves, unless they are to keep a cache
        extra = ["--cache"] if args.cache else ["--model-dir", str(model.parent)]
        if n_local + keep_here >= n_cores():  # a worker that looks out for work would take a core from one that has some
            extra += ["--spin-us", "0"]

        def pinned(i: int) -> list[str]:
            return ["--cpus", cpus_of(i, threads)] if args.pin else []

        for i in range(n_local):
            memory = args.worker_mem[i] if args.worker_mem and i < len(args.worker_mem) else 0
            bus.spawn(args.device, threads[i], [*extra, *pinned(i), *(["-m", str(memory)] if memory else [])])
        for endpoint in rpc:
            bus.add_remote(endpoint)
        host = bus.spawn(args.device, threads[n_local], [*extra, *pinned(n_local)]) if keep_here else ""
        yield bus.start(), bus.names, host


def print_summary(s: Session) -> None:
    """One line for the load, one for each stage."""
    r = s.runner.report
    sent, found = f"{r.sent_bytes / MIB:.1f} MiB sent", f"{r.cached_bytes / MIB:.1f} MiB from caches or files"
    kept = f", {r.kept_bytes / MIB:.1f} MiB there from a run before" if r.kept_bytes else ""
    print(f"load    {s.load_s:8.2f} s  {sent}, {found}{kept}", file=sys.stderr)
    if len(s.runner.stages) > 1 and not s.runner.direct:
        print("note    activations pass through the broker: not every worker can reach the next one", file=sys.stderr)
    for stage in s.runner.stages:
        print_line("layers  " + stage_line(s.infos, stage.assignment), file=sys.stderr)


def stage_line(infos: Sequence[m.ListedDevice], a: Assignment) -> str:
    """Where some layers are: `0-7 (+ embedding) on host CPU, 1.6 MiB weights, 0.5 MiB KV`."""
    d = infos[a.device]
    ends = [name for name, there in (("embedding", a.first), ("output", a.last)) if there]
    extra = f" + {' + '.join(ends)}" if ends else ""
    return (f"{a.layers.start}-{a.layers.stop - 1}{extra} on {d.worker} {d.name} (device {a.device}), "
            f"{a.weight_bytes / MIB:.1f} MiB weights, {a.kv_bytes / MIB:.1f} MiB KV cache")  # fmt: skip
