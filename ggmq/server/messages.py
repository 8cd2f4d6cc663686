"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ggmq.answers import Content, Reasoning
from ggmq.answers import Piece as Part
from ggmq.chat import Message
from ggmq.server.asking import Alive, Answers, End, Piece, Wanted, Whole
from ggmq.server.context import Context, key_of, new_id
from ggmq.server.errors import ApiError, bad
from ggmq.server.forms import Form, form_of
from ggmq.server.replies import json_of
from ggmq.server.schema_messages import (
    CountRequest,
    DocumentBlock,
    ImageBlock,
    InMessage,
    MessagesRequest,
    RedactedBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from ggmq.server.streaming import EventStream, named, unless_gone
from ggmq.server.talks import prompt_of, wanted_of
from ggmq.service import Usage
from ggmq.texts import Talk
from ggmq.tokenizer import well_formed

_PING = named({"type": "ping"})


async def messages(context: Context, request: Request) -> Response:
    body = await context.bodies.decoded(request, MessagesRequest)
    model = context.models.find(body.model)
    body.stop, body.n = body.stop_sequences, 1
    wanted = await wanted_of(context, model, _talk(context, body), body, _form(body), body.max_tokens,
                             stop_path="stop_sequences")  # fmt: skip
    answers = Answers(context.answers, key_of(request), [wanted], bool(body.stream))
    head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model.name}
    if body.stream:
        return await EventStream.begun(_stream(answers, head, wanted))
    return json_of(await unless_gone(request.receive, _whole(answers, head)))


async def count_tokens(context: Context, request: Request) -> Response:
    body = await context.bodies.decoded(request, CountRequest)
    tokens, _ = await prompt_of(context.models.find(body.model), _talk(context, body))
    return json_of({"input_tokens": len(tokens)})


# -- what is asked -----------------------------------------------------------------------------------------------------


def _form(body: CountRequest) -> Form:
    said = body.output_config.format if body.output_config and body.output_config.format else body.output_format
    if said is None:
        return form_of(body)
    path = "output_config.format.schema" if said is not body.output_format else "output_format.schema"
    return Form("json_schema", said.schema, path)


def _talk(context: Context, body: CountRequest) -> Talk:
    conversation: list[Message] = []
    if body.system:
        text = body.system if isinstance(body.system, str) else "\n".join(b.text for b in body.system)
        conversation.append({"role": "system", "content": well_formed(text)})
    for i, m in enumerate(body.messages):
        conversation += _said(m, f"messages[{i}].content")
    tools = []
    for i, t in enumerate(body.tools or ()):
        if t.type not in (None, "custom") or t.input_schema is None:
            raise bad(f"tools[{i}]", "expected a tool with an input_schema; those that a server runs itself are not here")
        function = {"name": t.name, "description": t.description or "", "parameters": t.input_schema}
        tools.append({"type": "function", "function": function})
    choice = body.tool_choice
    chosen = "auto" if choice is None else {"any": "required", "tool": choice.name}.get(choice.type, choice.type)
    thinking = context.options.enable_thinking if body.thinking is None else body.thinking.type != "disabled"
    effort = body.output_config.effort if body.output_config else None
    last = conversation[-1]
    return Talk(conversation, tools, chosen, not (choice and choice.disable_parallel_tool_use), thinking,
                {} if effort is None else {"reasoning_effort": effort},
                last["role"] == "assistant" and not last.get("tool_calls"))  # fmt: skip


def _said(m: InMessage, path: str) -> list[Message]:
    """A message in OpenAI's terms; results of tools are messages of their own there, before what is said with them."""
    if isinstance(m.content, str):
        return [{"role": m.role, "content": well_formed(m.content)}]
    out: list[Message] = []
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for i, block in enumerate(m.content):
        here = f"{path}[{i}]"
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock() if m.role == "assistant":
                thoughts.append(block.thinking)
            case RedactedBlock() if m.role == "assistant":
                pass
            case ToolUseBlock() if m.role == "assistant":
                arguments = msgspec.json.encode(block.input).decode()
                calls.append({"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}})
            case ToolResultBlock() if m.role == "user":
                out.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block, here)})
            case ImageBlock() | DocumentBlock():
                raise bad(f"{here}.type", "expected text: models here read text only", "unsupported_content")
            case _:
                raise bad(f"{here}.type", f"a message of role {m.role} has no such block")
    if texts or calls or thoughts or not out:
        message: Message = {"role": m.role, "content": well_formed("\n".join(texts))}
        if calls:
            message["tool_calls"] = calls
        if thoughts:
            message["reasoning_content"] = well_formed("\n".join(thoughts))
        out.append(message)
    return out


def _result(block: ToolResultBlock, path: str) -> str:
    if block.content is None or isinstance(block.content, str):
        return well_formed(block.content or "")
    for j, part in enumerate(block.content):
        if not isinstance(part, TextBlock):
            raise bad(f"{path}.content[{j}].type", "expected text: models here read text only", "unsupported_content")
    return well_formed("\n".join(part.text for part in block.content if isinstance(part, TextBlock)))


# -- what is answered --------------------------------------------------------------------------------------------------


async def _whole(answers: Answers, head: dict[str, Any]) -> dict[str, Any]:
    async with answers:
        whole = (await answers.whole())[0]
    assert whole.end is not None  # it has ended
    return {**head, "content": _blocks(whole), **_stopped(whole.end), "usage": _usage(answers.usage)}


def _blocks(whole: Whole) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    if whole.said.reasoning:
        out.append({"type": "thinking", "thinking": whole.said.reasoning, "signature": ""})
    if whole.said.content:
        out.append({"type": "text", "text": whole.said.content})
    for c in whole.said.calls:
        try:
            given = msgspec.json.decode(c.arguments or "{}")
        except (msgspec.DecodeError, RecursionError):  # it was cut off
            given = {}
        out.append({"type": "tool_use", "id": c.id, "name": c.name, "input": given})
    return out


def _stopped(end: End) -> dict[str, Any]:
    reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(end.reason, "end_turn")
    if end.done.stop:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": end.done.stop or None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {"input_tokens": usage.n_prompt - usage.n_cached, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.n_cached, "output_tokens": usage.n_made}  # fmt: skip


async def _stream(answers: Answers, head: dict[str, Any], wanted: Wanted) -> AsyncGenerator[bytes]:
    blocks = _Blocks()
    async with answers:
        usage = _usage(Usage(len(wanted.tokens)))
        start = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield named({"type": "message_start", "message": start}) + _PING
        try:
            async for _, event in answers.pieces():
                if isinstance(event, Alive):
                    yield _PING
                elif isinstance(event, Piece):
                    if events := blocks.events(event.parts):
                        yield events
                else:
                    delta = {"type": "message_delta", "delta": _stopped(event), "usage": _usage(answers.usage)}
                    yield blocks.stop() + named(delta) + named({"type": "message_stop"})
        except ApiError as e:
            yield named(e.anthropic())


class _Blocks:
    """Content blocks as they are begun, go on and end: a block for each run of parts of one kind."""

    def __init__(self) -> None:
        self._n = 0
        self._open: str | int | None = None

    def events(self, parts: Sequence[Part]) -> bytes:
        return b"".join(self._event(part) for part in parts)

    def _event(self, part: Part) -> bytes:
        match part:
            case Content(text):
                begun = self._begin("text", {"type": "text", "text": ""})
                return begun + self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                begun = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                return begun + self._delta({"type": "thinking_delta", "thinking": text})
            case _:
                begun = self._begin(part.index, {"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
                if not part.arguments:
                    return begun
                return begun + self._delta({"type": "input_json_delta", "partial_json": part.arguments})

    def _begin(self, kind: str | int, block: dict[str, Any]) -> bytes:
        if self._open == kind:
            return b""
        stopped = self.stop()
        self._open = kind
        return stopped + named({"type": "content_block_start", "index": self._n, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return named({"type": "content_block_delta", "index": self._n, "delta": delta})

    def stop(self) -> bytes:
        """The end of the block that is open."""
        if self._open is None:
            return b""
        signed = self._delta({"type": "signature_delta", "signature": ""}) if self._open == "thinking" else b""
        self._open, n = None, self._n
        self._n += 1
        return signed + named({"type": "content_block_stop", "index": n})
