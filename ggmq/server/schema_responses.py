"""Bodies of OpenAI's Responses API, as msgspec types them. Fields that are not named here are passed over."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from ggmq.conversation import Part, Text
from ggmq.server.schema import MAX_TOP, Count, Effort, Sampling


class Format(Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema", "grammar", "regex"] = "text"
    name: str = ""
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None
    grammar: Text | None = None
    regex: Text | None = None


class TextConfig(Struct, kw_only=True):
    format: Format | None = None


class ReasoningConfig(Struct, kw_only=True):
    effort: Effort | None = None
    summary: str | None = None


class FunctionTool(Struct, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Struct, kw_only=True):
    type: Literal["function"]
    name: str


class ResponsesRequest(Sampling, kw_only=True):
    """`input`: a text, or items, each decoded by its type."""

    input: Text | Annotated[list[dict[str, Any]], Meta(min_length=1)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=256)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] | None = None
    metadata: dict[str, str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessageItem(Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]


class FunctionCallItem(Struct, kw_only=True):
    call_id: str
    name: str
    arguments: Text


class FunctionOutputItem(Struct, kw_only=True):
    call_id: str
    output: Text | list[Part]


class ReasoningItem(Struct, kw_only=True):
    content: list[Part] | None = None
    summary: list[Part] | None = None
