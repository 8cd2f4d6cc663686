"""Counts and times of requests and answers, as Prometheus keeps them."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from ggmq.service import Job

_FIRST_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_TOKEN_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """Counts and times since the server was started. Threads: any."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("ggmq_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self._waited = self._times("waited", "From request to slot.", _FIRST_S)
        self._first = self._times("first_token", "From request to first token.", _FIRST_S)
        self._token = self._times("token", "Between tokens of an answer, on average.", _TOKEN_S)

    def _times(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"ggmq_{name}_seconds", about, ["model"], buckets=buckets, registry=self.registry)

    def told(self, event: str, *, job: Job | None = None, **figures: Any) -> None:
        """What `Service` and `serving` tell."""
        if event != "done" or job is None:
            return
        u = job.usage()
        self._waited.labels(job.model).observe(u.waited_s)
        if u.n_made:
            self._first.labels(job.model).observe(u.waited_s + u.prompt_s)
        if u.n_made > 1:
            self._token.labels(job.model).observe(u.made_s / (u.n_made - 1))

    def answered(self, route: str, status: int) -> None:
        """A request was answered. route: as it is declared, so that there are few."""
        self._requests.labels(route, str(status)).inc()
