"""`/v1/chat/completions`, as OpenAI has it, with llama-server's fields besides."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ggmq.answers import Content, Reasoning, ToolCall
from ggmq.conversation import continues, messages_of, thinking_of, tools_of
from ggmq.server.asking import Alive, Answers, Piece, Wanted, Whole, openai_usage, timings_of
from ggmq.server.context import Context, key_of, new_id
from ggmq.server.errors import ApiError, bad
from ggmq.server.forms import form_of
from ggmq.server.replies import json_of
from ggmq.server.sampling import limit_of
from ggmq.server.schema import ChatRequest, ChosenTool
from ggmq.server.streaming import ALIVE, DONE, EventStream, data, unless_gone
from ggmq.server.talks import wanted_of
from ggmq.service import Token
from ggmq.texts import Talk
from ggmq.tokenizer import Vocabulary


async def chat_completions(context: Context, request: Request) -> Response:
    body = await context.bodies.decoded(request, ChatRequest)
    wanted = await _wanted(context, body)
    answers = Answers(context.answers, key_of(request), [wanted], bool(body.stream))
    head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": wanted.model.name}
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return await EventStream.begun(_stream(answers, head, wanted, usage))
    return json_of(await unless_gone(request.receive, _whole(answers, head, wanted)))


async def _wanted(context: Context, body: ChatRequest) -> Wanted:
    model, options = context.models.find(body.model), context.options
    messages = messages_of(body.messages)
    thinking, extra = thinking_of(body.chat_template_kwargs, body.reasoning_effort, body.enable_thinking,
                                  options.enable_thinking)  # fmt: skip
    if body.top_logprobs and not body.logprobs:
        raise bad("top_logprobs", "expected logprobs to be true with it")
    chosen = body.tool_choice
    goes_on = continues(messages, body.continue_final_message, body.add_generation_prompt)
    talk = Talk(messages, tools_of(body.tools), chosen.function.name if isinstance(chosen, ChosenTool) else chosen or "auto",
                body.parallel_tool_calls is not False, thinking, extra, goes_on)  # fmt: skip
    n_predict = limit_of(body.max_completion_tokens, body.max_tokens, body.n_predict, options.n_predict)
    n_probs = (body.top_logprobs or 0) if body.logprobs else -1
    return await wanted_of(context, model, talk, body, form_of(body, body.response_format), n_predict, n_probs)


async def _whole(answers: Answers, head: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    async with answers:
        choices = await answers.whole()
    vocabulary = wanted.model.vocabulary
    return {**head, "object": "chat.completion", "system_fingerprint": FINGERPRINT,
            "choices": [_choice(i, c, vocabulary, wanted.n_probs) for i, c in enumerate(choices)],
            "usage": openai_usage(answers), "timings": timings_of(answers.usage)}  # fmt: skip


def _choice(i: int, whole: Whole, vocabulary: Vocabulary, n_probs: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": whole.said.content, "refusal": None}
    if whole.said.reasoning:
        message["reasoning_content"] = whole.said.reasoning
    if whole.said.calls:
        message["content"] = whole.said.content or None
        message["tool_calls"] = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                                 for c in whole.said.calls]  # fmt: skip
    probs = {"content": logprobs_of(whole.tokens, vocabulary), "refusal": None} if n_probs >= 0 else None
    return {"index": i, "message": message, "logprobs": probs, "finish_reason": whole.reason}


async def _stream(answers: Answers, head: dict[str, Any], wanted: Wanted, with_usage: bool) -> AsyncGenerator[bytes]:
    chunk = {**head, "object": "chat.completion.chunk", "system_fingerprint": FINGERPRINT}
    more = {"usage": None} if with_usage else {}
    vocabulary, n_left = wanted.model.vocabulary, wanted.n

    def choice(i: int, delta: dict[str, Any], reason: str | None = None, probs: dict[str, Any] | None = None,
               **rest: Any) -> bytes:  # fmt: skip
        choices = [{"index": i, "delta": delta, "logprobs": probs, "finish_reason": reason}]
        return data({**chunk, "choices": choices, **more, **rest})

    async with answers:
        yield b"".join(choice(i, {"role": "assistant", "content": ""}) for i in range(wanted.n))
        try:
            async for i, event in answers.pieces():
                if isinstance(event, Alive):
                    yield ALIVE
                elif isinstance(event, Piece):
                    probs = None
                    if wanted.n_probs >= 0:
                        probs = {"content": logprobs_of(event.tokens, vocabulary), "refusal": None}
                    if deltas := [delta_of(part) for part in event.parts] or ([{}] if probs and event.tokens else []):
                        yield b"".join(choice(i, d, probs=probs if not at else None) for at, d in enumerate(deltas))
                else:
                    n_left -= 1
                    rest = {} if n_left else {"timings": timings_of(answers.usage)}
                    yield choice(i, {}, event.reason, **rest)
        except ApiError as e:
            yield data(e.openai())
            return
    if with_usage:
        yield data({**chunk, "choices": [], "usage": openai_usage(answers), "timings": timings_of(answers.usage)})
    yield DONE


def delta_of(part: Content | Reasoning | ToolCall) -> dict[str, Any]:
    """A piece as the change of a message."""
    match part:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case ToolCall():
            begin = {"id": part.id, "type": "function"} if part.id else {}
            function = {"name": part.name, "arguments": part.arguments} if part.name else {"arguments": part.arguments}
            return {"tool_calls": [{"index": part.index, **begin, "function": function}]}


def logprobs_of(tokens: Sequence[Token], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities, as chat completions have them."""

    def one(raw: bytes, logprob: float | None) -> dict[str, Any]:
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": -9999.0 if logprob is None else logprob, "bytes": list(raw)}

    return [{**one(t.raw, t.logprob), "top_logprobs": [one(vocabulary.piece(i, True), p) for i, p in t.top]} for t in tokens]


FINGERPRINT = "ggmq"
