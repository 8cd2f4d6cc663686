"""`/v1/embeddings`: one vector of each text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response

from ggmq.embeddings import Pooling, default_pooling, pooled, to_read
from ggmq.feed import Feed
from ggmq.reading import read
from ggmq.server.completions import tokens_of
from ggmq.server.context import Context, key_of
from ggmq.server.errors import bad, of_ggmq
from ggmq.server.models import ServedModel
from ggmq.server.replies import json_of
from ggmq.server.schema import EmbeddingRequest
from ggmq.server.streaming import unless_gone
from ggmq.service import Failed, Job, Rows
from protocol.errors import FormatError, GgmqError


async def embeddings(context: Context, request: Request) -> Response:
    body = await context.bodies.decoded(request, EmbeddingRequest)
    model = context.models.find(body.model)
    n_embd = model.service.model.arch.hp.n_embd
    if body.dimensions not in (None, n_embd):
        raise bad("dimensions", f"expected {n_embd}, which is what the model has, got {body.dimensions}")
    try:
        pooling = body.pooling or default_pooling(model.service.model.arch)
    except FormatError as e:
        raise bad("pooling", str(e)) from None
    if pooling == "none":
        raise bad("pooling", "expected mean or last: the model's file says none, and vectors of single tokens are not told")
    if body.input == "" or (isinstance(body.input, list) and "" in body.input):
        raise bad("input", "expected texts that are not empty")
    texts = await tokens_of(model, body.input, "input")
    vectors = await unless_gone(request.receive, _vectors(context, model, texts, pooling, key_of(request)))
    n_tokens = sum(map(len, texts))
    return json_of({
        "object": "list", "model": model.name, "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        "data": [{"object": "embedding", "index": i, "embedding": _written(v, body.encoding_format)}
                 for i, v in enumerate(vectors)],
    })  # fmt: skip


async def _vectors(
    context: Context, model: ServedModel, texts: Sequence[list[int]], pooling: Pooling, key: str
) -> list[npt.NDArray[np.float32]]:
    """The vectors of texts. As many as there are slots are asked for at once, so that many texts do not fill the queue."""
    feed, jobs = Feed(eager=False), dict[int, Job]()
    vectors: dict[int, npt.NDArray[np.float32]] = {}
    left = iter(range(len(texts)))

    def ask_next() -> None:
        if (i := next(left, None)) is not None:
            tokens, want = to_read(texts[i], pooling)
            jobs[i] = read(model.service, tokens, want, feed.emit_as(i), key)

    context.answers.add(feed)
    try:
        for _ in range(model.service.n_slots):
            ask_next()
        while jobs:
            for i, event in await feed.take():
                if isinstance(event, Failed):
                    jobs.pop(i, None)
                    raise of_ggmq(event.error)
                if isinstance(event, Rows):
                    del jobs[i]
                    vectors[i] = pooled(event.rows, pooling)
                    ask_next()
    except GgmqError as e:
        raise of_ggmq(e) from e
    finally:
        context.answers.remove(feed)
        for job in jobs.values():
            job.cancel()
    return [vectors[i] for i in range(len(texts))]


def _written(vector: npt.NDArray[np.float32], encoding: str) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
