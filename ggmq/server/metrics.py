"""`/metrics`: what Prometheus asks for. Names are ggmq_*; counts end in _total, times are in seconds."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from ggmq.server.context import Context

_GAUGES = (
    ("waiting", "Requests that wait for a slot.", lambda s: s.n_waiting),
    ("waiting_limit", "Requests that may wait.", lambda s: s.n_queue),
    ("slots", "Slots.", lambda s: len(s.slots)),
    ("slots_busy", "Slots that read a prompt or make tokens.", lambda s: sum(x.state != "idle" for x in s.slots)),
    ("pages", "Pages of the KV cache.", lambda s: s.n_pages),
    ("pages_free", "Pages that nobody holds.", lambda s: s.n_free_pages),
    ("prompt_tokens_per_second", "Tokens of prompts read, lately.", lambda s: s.prompt_tokens_per_s),
    ("made_tokens_per_second", "Tokens made, lately.", lambda s: s.decode_tokens_per_s),
    ("up", "1 while requests can be answered.", lambda s: not s.error),
)
_COUNTS = (
    ("answers", "Answers that were completed.", lambda s: s.n_done),
    ("answers_failed", "Answers that failed.", lambda s: s.n_failed),
    ("answers_left", "Answers that nobody waited for any more.", lambda s: s.n_left),
    ("prompt_tokens", "Tokens of prompts, cached ones too.", lambda s: s.n_prompt_tokens),
    ("cached_tokens", "Tokens of prompts that were not read again.", lambda s: s.n_cached_tokens),
    ("made_tokens", "Tokens made.", lambda s: s.n_made_tokens),
    ("drafted_tokens", "Tokens that were proposed by speculation.", lambda s: s.n_drafted_tokens),
    ("accepted_tokens", "Of those, tokens that were right.", lambda s: s.n_accepted_tokens),
)


class StateCollector(Collector):
    """What services and devices are when they are asked."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterator[Metric]:
        states = [m.service.state() for m in self._context.models.by_name.values()]
        for name, about, value in _GAUGES:
            gauge = GaugeMetricFamily(f"ggmq_{name}", about, labels=["model"])
            for s in states:
                gauge.add_metric([s.name], float(value(s)))
            yield gauge
        for name, about, value in _COUNTS:
            counter = CounterMetricFamily(f"ggmq_{name}", about, labels=["model"])
            for s in states:
                counter.add_metric([s.name], float(value(s)))
            yield counter
        ready = GaugeMetricFamily("ggmq_device_ready", "1 for a device that answers.", labels=["worker", "device"])
        free = GaugeMetricFamily("ggmq_device_free_bytes", "Memory that is free.", labels=["worker", "device"])
        ping = GaugeMetricFamily("ggmq_device_round_trip_seconds", "To the worker and back.", labels=["worker", "device"])
        for d in self._context.picture().devices.values():
            where = [d.info.worker, d.info.name]
            ready.add_metric(where, float(d.info.state == "ready"))
            ping.add_metric(where, d.round_trip_s)
            if d.stats is not None:
                free.add_metric(where, float(d.stats.free_bytes))
        yield from (ready, free, ping)


async def show_metrics(context: Context, request: Request) -> Response:
    text = generate_latest(context.metrics.registry)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
