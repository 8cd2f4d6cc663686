"""Conversations as a chat template takes them, from what OpenAI's messages say; and how a model is to think."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ggmq.chat import Message
from ggmq.tokenizer import well_formed
from protocol.errors import InvalidValue

TEXTS = ("text", "input_text", "output_text")
Text = Annotated[str, Meta(max_length=1 << 24)]


class Part(Struct, kw_only=True):
    type: str
    text: Text | None = None
    refusal: Text | None = None


class CalledFunction(Struct, kw_only=True):
    name: str
    arguments: Text | dict[str, Any] | None = None


class ToolCall(Struct, kw_only=True):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None


class Function(Struct, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True):
    type: Literal["function"]
    function: Function


def wrong(param: str, message: str, code: str = "invalid_value") -> InvalidValue:
    """A value that is not what it should be. The message says what was expected."""
    error = InvalidValue(f"{param}: {message}" if param else message, param)
    error.code = code
    return error


def text_of(content: str | list[Part] | None, path: str) -> str:
    """Content as one text. Errors: InvalidValue for parts that are no text."""
    if content is None or isinstance(content, str):
        return well_formed(content or "")
    texts = []
    for i, part in enumerate(content):
        if part.type == "refusal":
            texts.append(part.refusal or "")
        elif part.type not in TEXTS:
            raise wrong(f"{path}[{i}].type", f"expected text, got {part.type[:64]}: models here read text only",
                      "unsupported_content")  # fmt: skip
        elif part.text is None:
            raise wrong(f"{path}[{i}].text", "expected a text")
        else:
            texts.append(part.text)
    return well_formed("\n".join(texts))


def messages_of(messages: Sequence[ChatMessage], path: str = "messages") -> list[Message]:
    """Errors: InvalidValue."""
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
                raise wrong(f"{here}.content", "expected a text where there are no tool_calls")
            if thought := m.reasoning_content or m.reasoning:
                message["reasoning_content"] = well_formed(thought)
        elif m.content is None:
            raise wrong(f"{here}.content", "expected a text, got null")
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


def continues(messages: Sequence[Message], said: bool | None, prompted: bool | None) -> bool:
    """Whether an answer that has been begun goes on: the last message is one, and a prompt for another is not wanted.

    said: continue_final_message; prompted: add_generation_prompt.

    As with llama-server an answer at the end goes on, unless it has calls or the request says otherwise.
    """
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls") or said is False:
        return False
    return said is True or prompted is not False


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
