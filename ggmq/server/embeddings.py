"""`/v1/embeddings`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from ggmq.server.context import Context
from ggmq.server.errors import ApiError
from ggmq.server.schema import EmbeddingRequest


async def embeddings(context: Context, request: Request) -> Response:
    body = await context.bodies.decoded(request, EmbeddingRequest)
    context.models.find(body.model)
    raise ApiError(501, "embeddings are not supported", "not_supported")
