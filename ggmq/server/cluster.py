"""`/cluster` and `/cluster/events`: models, hosts, workers, devices, layers, slots and rates, for whoever watches."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from typing import Literal

from msgspec import Struct, field
from starlette.requests import Request
from starlette.responses import Response

from ggmq.server.context import Context
from ggmq.server.replies import json_of
from ggmq.server.streaming import EventStream, data
from ggmq.service import Service, ServiceState
from ggmq.watching import Watched

EVERY_S = 0.5
LOOK_S = 0.05
"""How often a stream looks for news: a worker that is lost is told as soon as it is known."""


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
    """Units: bytes. `buffer_bytes`: what sessions hold there."""

    index: int
    name: str
    kind: str
    description: str
    total_bytes: int
    free_bytes: int
    buffer_bytes: int
    n_computes: int
    layers: list[HeldLayers]


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


def cluster_state(context: Context) -> ClusterState:
    """What there is now. Threads: any."""
    services = {name: m.service for name, m in context.models.by_name.items()}
    states = {name: service.state() for name, service in services.items()}
    picture = context.picture()
    errors = [picture.error, *(f"{name}: {s.error}" for name, s in states.items() if s.error)]
    return ClusterState(
        models=[_model(name, service) for name, service in services.items()],
        hosts=_hosts(picture.devices, services),
        tokens_per_s=Rates(
            round(sum(s.prompt_tokens_per_s for s in states.values()), 1),
            round(sum(s.decode_tokens_per_s for s in states.values()), 1),
        ),
        queue=Queue(sum(s.n_waiting for s in states.values()), sum(s.n_queue for s in states.values())),
        slots=[slot for name, s in states.items() for slot in _slots(name, s)],
        uptime_s=round(time.monotonic() - context.started_s, 1),
        error="; ".join(filter(None, errors)),
    )


def _model(name: str, service: Service) -> ModelState:
    model = service.model
    gguf = model.arch.gguf
    n_params = sum(math.prod(t.ne) for t in gguf.tensors.values())
    return ModelState(name, gguf.path.name, model.arch.hp.n_layer, model.n_ctx, n_params, gguf.n_bytes)


def _slots(name: str, state: ServiceState) -> list[SlotView]:
    return [
        SlotView(name, s.id, s.state, s.n_prompt, s.n_read, s.n_made, s.n_ctx, round(s.seconds, 2),
                 round(s.n_accepted / s.n_drafted, 3) if s.n_drafted else 0.0)
        for s in state.slots
    ]  # fmt: skip


def _hosts(devices: dict[int, Watched], services: dict[str, Service]) -> list[HostState]:
    held = _held(services)
    hosts: dict[str, HostState] = {}
    workers: dict[str, WorkerState] = {}
    for i, d in sorted(devices.items()):
        info, stats = d.info, d.stats
        worker = workers.get(info.worker)
        if worker is None:
            state: Literal["ready", "silent", "lost"] = "lost"
            if info.state in ("ready", "silent"):
                state = "ready" if info.state == "ready" else "silent"
            worker = workers[info.worker] = WorkerState(info.worker, info.address, state, round(d.round_trip_s * 1e3, 3))
            hosts.setdefault(info.host, HostState(info.host)).workers.append(worker)
        worker.devices.append(
            DeviceState(
                i, info.name, info.kind, info.description, info.total_bytes,
                stats.free_bytes if stats else info.free_bytes, stats.buffer_bytes if stats else 0,
                stats.n_computes if stats else 0, held.get(i, []),
            )
        )  # fmt: skip
    for host in hosts.values():
        host.workers.sort(key=lambda w: w.name)
    return list(hosts.values())


def _held(services: dict[str, Service]) -> dict[int, list[HeldLayers]]:
    """By a device's number."""
    held: dict[int, list[HeldLayers]] = {}
    for name, service in services.items():
        for stage in service.model.stages:
            a = stage.assignment
            layers = HeldLayers(name, a.layers.start, a.layers.stop - 1, a.first, a.last, a.weight_bytes, a.kv_bytes)
            held.setdefault(a.device, []).append(layers)
    return held


async def cluster(context: Context, request: Request) -> Response:
    return json_of(cluster_state(context))


async def cluster_events(context: Context, request: Request) -> Response:
    """The same about twice a second, sooner when the watch of the bus has news, until the client goes or the server ends."""

    async def told() -> AsyncGenerator[bytes]:
        closing = context.answers.closing
        while not closing.is_set():
            seen, due = context.picture(), time.monotonic() + EVERY_S
            yield data(cluster_state(context))
            while not closing.is_set() and context.picture() is seen and time.monotonic() < due:
                await asyncio.sleep(LOOK_S)

    return await EventStream.begun(told())
