"""Conversations as a chat template takes them, from what OpenAI's messages say; and how a model is to think."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ggmq.chat import Message
from ggmq.server.errors import bad
from ggmq.server.schema import ChatMessage, ChatRequest, Part, TemplateRequest, Tool
from ggmq.tokenizer import well_formed

TEXTS = ("text", "input_text", "output_text")


def text_of(content: str | list[Part] | None, path: str) -> str:
    """Content as one text. Errors: ApiError 400 for parts that are no text."""
    if content is None or isinstance(content, str):
        return well_formed(content or "")
    texts = []
    for i, part in enumerate(content):
        if part.type == "refusal":
            texts.append(part.refusal or "")
        elif part.type not in TEXTS:
            raise bad(f"{path}[{i}].type", f"expected text, got {part.type[:64]}: models here read text only",
                      "unsupported_content")  # fmt: skip
        elif part.text is None:
            raise bad(f"{path}[{i}].text", "expected a text")
        else:
            texts.append(part.text)
    return well_formed("\n".join(texts))


def messages_of(messages: Sequence[ChatMessage], path: str = "messages") -> list[Message]:
    """Errors: ApiError 400."""
    out: list[Message] = []
    for i, m in enumerate(messages):
        here = f"{path}[{i}]"
        role = "tool" if m.role == "function" else m.role
        message: Message = {"role": role, "content": text_of(m.content, f"{here}.content")}
        if m.role == "assistant":
            if m.tool_calls:
                message["tool_calls"] = [
                    {"id": c.id or f"call_{j}", "type": "function", "function": {"name": c.function.name,
                     "arguments": _arguments(c.function.arguments)}} for j, c in enumerate(m.tool_calls)]  # fmt: skip
            elif m.content is None:
                raise bad(f"{here}.content", "expected a text where there are no tool_calls")
            if thought := m.reasoning_content or m.reasoning:
                message["reasoning_content"] = well_formed(thought)
        elif m.content is None:
            raise bad(f"{here}.content", "expected a text, got null")
        if m.name:
            message["name"] = m.name
        if m.tool_call_id:
            message["tool_call_id"] = m.tool_call_id
        out.append(message)
    return out


def tools_of(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Tools as a template takes them; what was not said is not there."""
    out = []
    for t in tools or ():
        function = {k: v for k, v in msgspec.to_builtins(t.function).items() if v is not None}
        out.append({"type": "function", "function": {"parameters": {"type": "object", "properties": {}}} | function})
    return out


def continues(body: ChatRequest | TemplateRequest, messages: Sequence[Message]) -> bool:
    """Whether an answer that the client has begun goes on: the last message is one, and a prompt for another is not wanted.

    As with llama-server an answer at the end goes on, unless it has calls or the request says otherwise.
    """
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls") or body.continue_final_message is False:
        return False
    return body.continue_final_message is True or body.add_generation_prompt is not False


def _arguments(arguments: str | dict[str, Any] | None) -> str:
    if isinstance(arguments, str):
        return arguments
    return msgspec.json.encode(arguments or {}).decode()


def thinking_of(
    kwargs: dict[str, Any] | None, effort: str | None, said: bool | None, default: bool
) -> tuple[bool, dict[str, Any]]:
    """Whether a model is to think first, and what else the template is told."""
    extra = dict(kwargs or {})
    if effort is not None:
        extra.setdefault("reasoning_effort", effort)
    thinking = extra.pop("enable_thinking", None)
    if thinking is None:
        thinking = said
    if thinking is None and effort is not None:
        thinking = effort != "none"
    return (default if thinking is None else bool(thinking)), extra
