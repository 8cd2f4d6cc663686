"""What models, hosts, workers and devices are and do now, as `/cluster` tells it and `ggmq top` shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct, field

from ggmq.watching import Watched
from protocol import messages as m


class HeldLayers(Struct):
    """Layers `first` to `last` of a model on a device; `last` below `first` for none but its ends."""

    model: str
    first: int
    last: int
    embedding: bool
    output: bool
    weight_bytes: int
    kv_bytes: int


class DeviceState(Struct):
    """Units: bytes. `buffer_bytes`: what sessions hold there. Counters since the worker began: graphs run, bytes that came
    and went over its sockets, and of those that went what other workers took."""

    index: int
    name: str
    kind: str
    description: str
    total_bytes: int
    free_bytes: int
    buffer_bytes: int
    n_computes: int
    wire_in_bytes: int = 0
    wire_out_bytes: int = 0
    handed_out_bytes: int = 0
    layers: list[HeldLayers] = field(default_factory=list)


class WorkerState(Struct):
    """`ping_ms`: of a message through the broker and back, in milliseconds."""

    name: str
    address: str
    state: Literal["ready", "silent", "lost"]
    ping_ms: float
    devices: list[DeviceState] = field(default_factory=list)


class HostState(Struct):
    name: str
    workers: list[WorkerState] = field(default_factory=list)


class ModelState(Struct):
    """Units: bytes of the file; `n_params`: weights."""

    name: str
    file: str
    n_layers: int
    n_ctx: int
    n_params: int
    bytes: int


class SlotView(Struct):
    """`seconds`: since its request began; `spec_accepted`: the part of drafted tokens that were right."""

    model: str
    id: int
    state: Literal["idle", "prompt", "decode"]
    n_prompt: int
    n_read: int
    n_made: int
    n_ctx: int
    seconds: float
    spec_accepted: float


class Rates(Struct):
    prompt: float
    decode: float


class Queue(Struct):
    waiting: int
    limit: int


class ClusterState(Struct):
    """The whole answer. `error`: what is wrong with the bus or a model; empty for nothing."""

    models: list[ModelState]
    hosts: list[HostState]
    tokens_per_s: Rates
    queue: Queue
    slots: list[SlotView]
    uptime_s: float
    error: str


def hosts_of(devices: Mapping[int, Watched], held: Mapping[int, list[HeldLayers]]) -> list[HostState]:
    """The devices of a bus by host and worker. held: the layers on each, by its number."""
    hosts: dict[str, HostState] = {}
    workers: dict[str, WorkerState] = {}
    for i, d in sorted(devices.items()):
        info, stats = d.info, d.stats or m.Stats(free_bytes=d.info.free_bytes)
        worker = workers.get(info.worker)
        if worker is None:
            state: Literal["ready", "silent", "lost"] = "lost"
            if info.state in ("ready", "silent"):
                state = "ready" if info.state == "ready" else "silent"
            worker = workers[info.worker] = WorkerState(info.worker, info.address, state, round(d.round_trip_s * 1e3, 3))
            hosts.setdefault(info.host, HostState(info.host)).workers.append(worker)
        worker.devices.append(
            DeviceState(
                i, info.name, info.kind, info.description, info.total_bytes, stats.free_bytes, stats.buffer_bytes,
                stats.n_computes, stats.wire_in_bytes, stats.wire_out_bytes, stats.handed_out_bytes, held.get(i, []),
            )
        )  # fmt: skip
    for host in hosts.values():
        host.workers.sort(key=lambda w: w.name)
    return list(hosts.values())
