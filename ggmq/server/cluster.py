"""`/cluster` and `/cluster/events`: models, hosts, workers, devices, layers, slots and rates, for whoever watches."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from ggmq.overview import ClusterState, HeldLayers, ModelState, Queue, Rates, SlotView, hosts_of
from ggmq.server.context import Context
from ggmq.server.replies import json_of
from ggmq.server.streaming import EventStream, data
from ggmq.service import Service
from ggmq.service_state import ServiceState

EVERY_S = 0.5
LOOK_S = 0.05
"""How often a stream looks for news: a worker that is lost is told as soon as it is known."""


def cluster_state(context: Context) -> ClusterState:
    """What there is now. Threads: any."""
    services = {name: m.service for name, m in context.models.by_name.items()}
    states = {name: service.state() for name, service in services.items()}
    picture = context.picture()
    errors = [picture.error, *(f"{name}: {s.error}" for name, s in states.items() if s.error)]
    return ClusterState(
        models=[_model(name, service) for name, service in services.items()],
        hosts=hosts_of(picture.devices, _held(services)),
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
