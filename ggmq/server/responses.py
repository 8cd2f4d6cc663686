"""OpenAI's `/v1/responses`: what is asked there, and the responses that are kept."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ggmq.chat import Message
from ggmq.conversation import text_of, thinking_of
from ggmq.server.asking import Alive, Answers, Piece
from ggmq.server.bodies import convert
from ggmq.server.context import Context, key_of, new_id
from ggmq.server.errors import ApiError, bad
from ggmq.server.forms import Form, form_of
from ggmq.server.output import Output
from ggmq.server.replies import json_of
from ggmq.server.sampling import limit_of
from ggmq.server.schema_responses import (
    ChosenFunction,
    FunctionCallItem,
    FunctionOutputItem,
    FunctionTool,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
)
from ggmq.server.streaming import ALIVE, EventStream, unless_gone
from ggmq.server.talks import wanted_of
from ggmq.texts import Talk
from ggmq.tokenizer import well_formed

LOGPROBS = "message.output_text.logprobs"


async def responses(context: Context, request: Request) -> Response:
    body = await context.bodies.decoded(request, ResponsesRequest)
    if body.background:
        raise bad("background", "expected false: responses are made while one waits")
    model, key = context.models.find(body.model), key_of(request)
    body.n = 1
    before = context.kept.find(key, body.previous_response_id, "previous_response_id").messages \
        if body.previous_response_id else []  # fmt: skip
    conversation = [*before, *messages_of(body.input)]
    if not conversation:
        raise bad("input", "expected something that is said")
    n_predict = limit_of(body.max_output_tokens, body.max_tokens, context.options.n_predict)
    n_probs = (body.top_logprobs or 0) if LOGPROBS in (body.include or ()) else -1
    wanted = await wanted_of(context, model, _talk(context, body, conversation), body, _form(body), n_predict, n_probs)
    output = Output(_head(body, model.name, wanted.params.temperature, wanted.params.top_p), model.vocabulary, n_probs)
    answers = Answers(context.answers, key, [wanted], bool(body.stream))

    def keep() -> None:
        if body.store is not False:
            context.kept.keep(key, output.response, [*conversation, *messages_of(output.items, "output")])

    if body.stream:
        return await EventStream.begun(_stream(answers, output, keep))
    return json_of(await unless_gone(request.receive, _whole(answers, output, keep)))


async def retrieve(context: Context, request: Request) -> Response:
    return json_of(context.kept.find(key_of(request), request.path_params["id"]).response)


async def delete(context: Context, request: Request) -> Response:
    id = request.path_params["id"]
    context.kept.forget(key_of(request), id)
    return json_of({"id": id, "object": "response", "deleted": True})


def _head(body: ResponsesRequest, model: str, temperature: float, top_p: float) -> dict[str, Any]:
    reasoning = body.reasoning
    chosen = body.tool_choice
    return {
        "id": new_id("resp_"), "object": "response", "created_at": int(time.time()), "status": "in_progress",
        "background": False, "error": None, "incomplete_details": None, "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens, "model": model, "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None}, "store": body.store is not False,
        "temperature": temperature, "text": {"format": _shown(body)},
        "tool_choice": msgspec.to_builtins(chosen) if isinstance(chosen, ChosenFunction) else chosen or "auto",
        "tools": body.tools or [], "top_p": top_p, "truncation": body.truncation or "disabled", "usage": None,
        "metadata": body.metadata or {},
    }  # fmt: skip


def _shown(body: ResponsesRequest) -> dict[str, Any]:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return {k: v for k, v in msgspec.to_builtins(body.text.format).items() if v not in (None, "")}


def _form(body: ResponsesRequest) -> Form:
    f = body.text.format if body.text else None
    if f is None or f.type == "text":
        return form_of(body)
    path = "text.format"
    if f.type == "json_object":
        return Form("json_object", None, path)
    name = {"json_schema": "schema"}.get(f.type, f.type)
    if (source := getattr(f, name)) is None:
        raise bad(f"{path}.{name}", "expected one, as type says")
    return Form(f.type, source, f"{path}.{name}")


def _talk(context: Context, body: ResponsesRequest, conversation: Sequence[Message]) -> Talk:
    messages = list(conversation)
    if body.instructions:
        messages.insert(0, {"role": "system", "content": well_formed(body.instructions)})
    tools = []
    for i, given in enumerate(body.tools or ()):
        if given.get("type") != "function":
            raise bad(f"tools[{i}].type", f"expected function, got {str(given.get('type'))[:64]}: this server runs no tools")
        t = convert(given, FunctionTool, f"tools[{i}]")
        function = {"name": t.name, "description": t.description or "",
                    "parameters": t.parameters or {"type": "object", "properties": {}}}  # fmt: skip
        tools.append({"type": "function", "function": function})
    chosen = body.tool_choice
    effort = body.reasoning.effort if body.reasoning else None
    thinking, extra = thinking_of(body.chat_template_kwargs, effort, None, context.options.enable_thinking)
    return Talk(messages, tools, chosen.name if isinstance(chosen, ChosenFunction) else chosen or "auto",
                body.parallel_tool_calls is not False, thinking, extra,
                paths=("input", "tools"))  # fmt: skip


def messages_of(items: str | Sequence[dict[str, Any]], path: str = "input") -> list[Message]:
    """Items as messages: thoughts and calls that follow each other belong to one answer. Errors: ApiError 400."""
    if isinstance(items, str):
        return [{"role": "user", "content": well_formed(items)}]
    out: list[Message] = []
    thoughts = ""
    for i, item in enumerate(items):
        here, kind = f"{path}[{i}]", item.get("type", "message")
        if kind == "reasoning":
            r = convert(item, ReasoningItem, here)
            thoughts = "\n".join(p.text or "" for p in r.content or r.summary or ())
        elif kind == "message":
            m = convert(item, MessageItem, here)
            out.append({"role": m.role, "content": text_of(m.content, f"{here}.content")})
            if m.role == "assistant" and thoughts:
                out[-1]["reasoning_content"], thoughts = well_formed(thoughts), ""
        elif kind == "function_call":
            c = convert(item, FunctionCallItem, here)
            if not out or out[-1]["role"] != "assistant":
                out.append({"role": "assistant", "content": ""})
                if thoughts:
                    out[-1]["reasoning_content"], thoughts = well_formed(thoughts), ""
            function = {"name": c.name, "arguments": c.arguments}
            out[-1].setdefault("tool_calls", []).append({"id": c.call_id, "type": "function", "function": function})
        elif kind == "function_call_output":
            o = convert(item, FunctionOutputItem, here)
            out.append({"role": "tool", "tool_call_id": o.call_id, "content": text_of(o.output, f"{here}.output")})
        else:
            raise bad(f"{here}.type", "expected message, function_call, function_call_output or reasoning, got "
                      f"{str(kind)[:64]}", "unsupported_content")  # fmt: skip
    if thoughts:
        out.append({"role": "assistant", "content": "", "reasoning_content": well_formed(thoughts)})
    return out


async def _whole(answers: Answers, output: Output, keep: Any) -> dict[str, Any]:
    async with answers:
        async for _, event in answers.pieces():
            if isinstance(event, Piece):
                output.add(event)
            elif not isinstance(event, Alive):
                output.end(event, answers.usage, answers.n_reasoning)
    keep()
    return output.response


async def _stream(answers: Answers, output: Output, keep: Any) -> AsyncGenerator[bytes]:
    async with answers:
        yield output.begin()
        try:
            async for _, event in answers.pieces():
                if isinstance(event, Alive):
                    yield ALIVE
                elif isinstance(event, Piece):
                    if events := output.add(event):
                        yield events
                else:
                    last = output.end(event, answers.usage, answers.n_reasoning)
                    keep()
                    yield last
        except ApiError as e:
            yield output.fail(e)
