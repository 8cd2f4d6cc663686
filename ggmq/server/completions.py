"""`/v1/completions`: texts that the model goes on with, as OpenAI has it, with llama-server's fields besides."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ggmq.answers import Content
from ggmq.answers import Piece as Part
from ggmq.server.asking import Alive, Answers, Piece, Wanted, openai_usage, timings_of
from ggmq.server.context import Context, key_of, new_id
from ggmq.server.errors import ApiError, bad
from ggmq.server.forms import form_of
from ggmq.server.models import ServedModel
from ggmq.server.replies import json_of
from ggmq.server.sampling import limit_of, params_of, stops_of
from ggmq.server.schema import CompletionRequest
from ggmq.server.streaming import ALIVE, DONE, EventStream, data, unless_gone
from ggmq.service import Token
from ggmq.tokenizer import Vocabulary


async def completions(context: Context, request: Request) -> Response:
    body = await context.bodies.decoded(request, CompletionRequest)
    model = context.models.find(body.model)
    if body.suffix:
        raise bad("suffix", "expected none: models here go on with a text and fill no gaps")
    if (body.best_of or 0) > (body.n or 1):
        raise bad("best_of", "expected no more than n: every answer that is made is given")
    n_probs = -1 if body.logprobs is None or body.logprobs is False else int(body.logprobs)
    if body.echo and n_probs >= 0:
        raise bad("echo", "expected no logprobs with it: those of a prompt are not computed")
    params, stop = params_of(body, context.options, model.texts), stops_of(body.stop)
    grammar = await form_of(body, body.response_format).compiled(model)
    prompts = await tokens_of(model, body.prompt, "prompt")
    n_predict = limit_of(body.max_tokens, body.n_predict, context.options.n_predict)
    wanted = [Wanted(model, tokens, params, n_predict, stop, n_probs, body.n or 1, grammar=grammar)
              for tokens in prompts]
    shown = [await _shown(model, body.prompt, i, tokens) if body.echo else "" for i, tokens in enumerate(prompts)]
    answers = Answers(context.answers, key_of(request), wanted, bool(body.stream))
    head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": model.name}
    told = _Told(head, model.vocabulary, n_probs, [text for text in shown for _ in range(body.n or 1)])
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return await EventStream.begun(_stream(answers, told, with_usage))
    return json_of(await unless_gone(request.receive, _whole(answers, told)))


async def tokens_of(model: ServedModel, prompts: str | Sequence[str | int | list[int]], path: str) -> list[list[int]]:
    """The tokens of each prompt: a text, several, one's tokens or several's. Errors: ApiError 400."""
    if isinstance(prompts, str):
        return [await model.encode(prompts, path=path)]
    ids = [p for p in prompts if isinstance(p, int)]
    if len(ids) == len(prompts):
        return [ids]
    if ids:
        raise bad(path, "expected texts, or tokens, and not both in one list")
    return [p if isinstance(p, list) else await model.encode(p, path=path) for p in prompts if not isinstance(p, int)]


async def _shown(model: ServedModel, prompts: str | Sequence[str | int | list[int]], i: int, tokens: list[int]) -> str:
    """A prompt as it is shown before its answer."""
    if isinstance(prompts, str):
        return prompts
    prompt = prompts[i]
    return prompt if isinstance(prompt, str) else await model.aside(lambda: model.vocabulary.decode(tokens, special=True))


class _Told:
    """How choices are written. Attributes: shown: what stands before the text of each."""

    def __init__(self, head: dict[str, Any], vocabulary: Vocabulary, n_probs: int, shown: Sequence[str]) -> None:
        self.head, self.shown = head, shown
        self._vocabulary, self._n_probs = vocabulary, n_probs
        self._offsets = [0] * len(shown)

    def choice(self, i: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        probs = self._logprobs(i, tokens) if self._n_probs >= 0 else None
        return {"index": i, "text": text, "logprobs": probs, "finish_reason": reason}

    def _logprobs(self, i: int, tokens: Sequence[Token]) -> dict[str, Any]:
        texts, offsets = [t.raw.decode("utf-8", "replace") for t in tokens], []
        for text in texts:
            offsets.append(self._offsets[i])
            self._offsets[i] += len(text)
        tops = [{self._vocabulary.piece(k, True).decode("utf-8", "replace"): p for k, p in t.top} for t in tokens]
        return {"tokens": texts, "token_logprobs": [t.logprob for t in tokens], "top_logprobs": tops, "text_offset": offsets}


async def _whole(answers: Answers, told: _Told) -> dict[str, Any]:
    async with answers:
        choices = await answers.whole()
    made = [told.choice(i, told.shown[i] + c.said.content, c.tokens, c.reason) for i, c in enumerate(choices)]
    return {**told.head, "choices": made, "usage": openai_usage(answers), "timings": timings_of(answers.usage)}


async def _stream(answers: Answers, told: _Told, with_usage: bool) -> AsyncGenerator[bytes]:
    more = {"usage": None} if with_usage else {}
    async with answers:
        if any(told.shown):
            yield b"".join(data({**told.head, "choices": [told.choice(i, s, (), None)], **more})
                           for i, s in enumerate(told.shown))  # fmt: skip
        else:
            yield b""
        try:
            async for i, event in answers.pieces():
                if isinstance(event, Alive):
                    yield ALIVE
                elif isinstance(event, Piece):
                    choice = told.choice(i, text_in(event.parts), event.tokens, None)
                    yield data({**told.head, "choices": [choice], **more})
                else:
                    yield data({**told.head, "choices": [told.choice(i, "", (), event.reason)], **more})
        except ApiError as e:
            yield data(e.openai())
            return
    if with_usage:
        usage = {"usage": openai_usage(answers), "timings": timings_of(answers.usage)}
        yield data({**told.head, "choices": [], **usage})
    yield DONE


def text_in(parts: Sequence[Part]) -> str:
    """The content of some parts."""
    return "".join(p.text for p in parts if isinstance(p, Content))
