"""What every route works with: the served models, the options, and what is under way."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping

from starlette.requests import Request

from ggmq.log import Log
from ggmq.server.asking import Registry
from ggmq.server.bodies import Bodies
from ggmq.server.counts import Metrics
from ggmq.server.kept import Responses
from ggmq.server.models import Models
from ggmq.server.options import ServerOptions
from ggmq.service import Service
from ggmq.watching import Picture

ROUTE, ERROR = "ggmq.route", "ggmq.error"
"""Where a request's scope has the route that it took, and the code of the error that answered it."""


class Context:
    """Attributes:
    picture: what the bus does now.
    """

    def __init__(
        self, services: Mapping[str, Service], options: ServerOptions, picture: Callable[[], Picture], log: Log,
        metrics: Metrics,
    ) -> None:
        self.options, self.picture, self.log, self.metrics = options, picture, log, metrics
        self.models = Models(services)
        self.bodies = Bodies(options.max_body_bytes, options.timeout_s)
        self.answers, self.kept = Registry(), Responses()
        self.started_s = time.monotonic()


def key_of(request: Request) -> str:
    """Whose turn it takes."""
    return str(request.scope.get("ggmq.key", ""))


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)
