"""The bus that a config describes: a broker that runs elsewhere, or one of our own with workers here and on other hosts."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from config.cores import n_cores
from config.keys import KeyPair
from ggmq.cluster import Client, LocalBus, connect, local_bus
from protocol import limits
from protocol import messages as m
from protocol.errors import ConfigError

DEFAULT_WORKERS = 1


@dataclass(frozen=True, slots=True)
class BusConfig:
    """Which devices take part.

    Attributes:
        broker: endpoint of one that runs elsewhere; with it the rest below does not count, save keys.
        cluster_id: of the cluster that the broker must belong to; empty: any.
        worker_order: names of the workers in the order in which devices are taken.
        rpc: addresses (HOST:PORT) of workers that listen.
        workers: of this host; None: one, as many as `worker_mem` names, or none with `rpc`.
        device: of the local workers.
        worker_mem: MiB that each of them lends.
        threads: of the local workers together; 0: all cores.
        pin: each thread stays on a CPU.
        cache: local workers keep weights in a cache instead of reading the file.
        keys: of the cluster; None: no encryption.
    """

    broker: str = ""
    cluster_id: bytes = b""
    worker_order: Sequence[str] = ()
    rpc: Sequence[str] = ()
    workers: int | None = None
    device: str = "CPU"
    worker_mem: Sequence[int] = ()
    threads: int = 0
    pin: bool = False
    cache: bool = False
    keys: KeyPair | None = None


@dataclass(slots=True)
class Bus:
    """Attributes:
    client: of the bus.
    order: names of its workers, as devices are to be taken.
    host: the worker that keeps the layers that `ngl` leaves here; empty for none.
    """

    client: Client
    order: Sequence[str] = ()
    host: str = ""
    _local: LocalBus | None = None

    def revive(self) -> bool:
        """Have new workers for those of this host that have ended. Returns: whether any were started; they come by
        themselves, under new names."""
        replaced = self._local.replace_ended() if self._local is not None else {}
        self.host = replaced.get(self.host, self.host)
        return bool(replaced)


@contextlib.contextmanager
def open_bus(
    config: BusConfig, n_layers: int, model: Path | None, ngl: int | None, note: Callable[[str], None]
) -> Iterator[Bus]:
    """The bus, until the block ends. model: the file that workers of this host will read; None: one that is not known yet.

    Errors: ConfigError, Unavailable, WorkerLost.
    """
    if config.broker:
        client = connect(config.broker, config.keys, note, config.cluster_id)
        try:
            yield Bus(client, config.worker_order)
        finally:
            client.close()
        return
    keep_here = bool(config.rpc) and ngl is not None and ngl < n_layers
    unsaid = 0 if config.rpc else len(config.worker_mem) or DEFAULT_WORKERS
    n_local = config.workers if config.workers is not None else unsaid
    if not config.rpc and not n_local:
        raise ConfigError("--workers 0: expected at least one worker here, or some with --rpc")
    with local_bus(config.keys) as bus:
        threads = local_threads(config.threads, n_local + keep_here)
        if sum(threads) > n_cores():
            note(f"{sum(threads)} threads on {n_cores()} cores: they wait for each other; use fewer with -t or --workers")
        # workers of this host read the file themselves, unless they are to keep a cache
        extra = ["--cache"] if config.cache else ["--model-dir", str(model.parent)] if model is not None else []
        if n_local + keep_here >= n_cores():  # a worker that looks out for work would take a core from one that has some
            extra += ["--spin-us", "0"]

        def pinned(i: int) -> list[str]:
            return ["--cpus", cpus_of(i, threads)] if config.pin else []

        for i in range(n_local):
            memory = config.worker_mem[i] if i < len(config.worker_mem) else 0
            bus.spawn(config.device, threads[i], [*extra, *pinned(i), *(["-m", str(memory)] if memory else [])])
        for endpoint in config.rpc:
            bus.add_remote(endpoint)
        host = bus.spawn(config.device, threads[n_local], [*extra, *pinned(n_local)]) if keep_here else ""
        yield Bus(bus.start(), bus.names, host, bus)


def settled(client: Client, note: Callable[[str], None]) -> list[m.ListedDevice]:
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


def with_room(client: Client, infos: Sequence[m.ListedDevice]) -> list[m.ListedDevice]:
    """The devices, those that are ready with what they say that is free now. Errors: Unavailable."""
    asked = {i: client.submit(m.StatsQuery(), device=i) for i, d in enumerate(infos) if d.state == "ready"}
    out = list(infos)
    for i, seq in asked.items():
        stats = client.wait(seq).header
        assert isinstance(stats, m.Stats)  # the decoder gives STATS' reply this type
        out[i] = structs.replace(infos[i], free_bytes=stats.free_bytes)
    return out


def local_threads(wanted: int, n_workers: int) -> list[int]:
    """Threads of each local worker: of `wanted` in all, else of the cores of this host; each has one at least."""
    total = wanted or n_cores()
    return [max(1, total // n_workers + (i < total % n_workers)) for i in range(n_workers)]


def cpus_of(i: int, threads: Sequence[int]) -> str:
    """CPUs for local worker `i`. Errors: ConfigError when there are not enough for every thread, or none can be chosen."""
    if not hasattr(os, "sched_getaffinity"):
        raise ConfigError("--pin: this system cannot keep threads on CPUs")
    cpus, first = sorted(os.sched_getaffinity(0)), sum(threads[:i])
    if sum(threads) > len(cpus):
        raise ConfigError(f"--pin: {sum(threads)} threads need as many CPUs, this host has {len(cpus)}; use fewer with -t")
    return ",".join(map(str, cpus[first : first + threads[i]]))
