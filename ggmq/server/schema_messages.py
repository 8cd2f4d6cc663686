"""Bodies of Anthropic's requests, as msgspec types them. Fields that are not named here are passed over."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from ggmq.conversation import Text
from ggmq.server.schema import Count, Effort, Sampling, Stops


class TextBlock(Struct, tag_field="type", tag="text", kw_only=True):
    text: Text


class ThinkingBlock(Struct, tag_field="type", tag="thinking", kw_only=True):
    thinking: Text
    signature: str = ""


class RedactedBlock(Struct, tag_field="type", tag="redacted_thinking", kw_only=True):
    data: Text = ""


class ToolUseBlock(Struct, tag_field="type", tag="tool_use", kw_only=True):
    id: str
    name: str
    input: dict[str, Any]


class ImageBlock(Struct, tag_field="type", tag="image", kw_only=True):
    pass


class DocumentBlock(Struct, tag_field="type", tag="document", kw_only=True):
    pass


class ToolResultBlock(Struct, tag_field="type", tag="tool_result", kw_only=True):
    tool_use_id: str
    content: Text | list[TextBlock | ImageBlock | DocumentBlock] | None = None
    is_error: bool | None = None


Block = TextBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock | ImageBlock | DocumentBlock


class InMessage(Struct, kw_only=True):
    role: Literal["user", "assistant"]
    content: Text | list[Block]


class InTool(Struct, kw_only=True):
    """`type`: custom, or nothing; what Anthropic's own servers run has another."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    type: str | None = None
    description: Text | None = None
    input_schema: dict[str, Any] | None = None


class InToolChoice(Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputFormat(Struct, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, kw_only=True):
    effort: Effort | None = None
    format: OutputFormat | None = None


class CountRequest(Sampling, kw_only=True):
    messages: Annotated[list[InMessage], Meta(min_length=1)]
    system: Text | list[TextBlock] | None = None
    tools: Annotated[list[InTool], Meta(max_length=256)] | None = None
    tool_choice: InToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: Count
    stop_sequences: Stops | None = None
