"""Bodies of OpenAI's requests and of llama-server's, as msgspec types them. Fields that are not named here are passed over.

Names and ranges are those of the APIs; where llama-server or vLLM have a field besides OpenAI's, it has their name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from ggmq.conversation import ChatMessage, Text, Tool

Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=0, le=1 << 24)]
Limit = Annotated[int, Meta(ge=-1, le=1 << 24)]
Stops = Annotated[list[Annotated[str, Meta(max_length=1024)]], Meta(max_length=64)]
Prompts = Text | Annotated[list[Text | int | list[int]], Meta(min_length=1, max_length=2048)]
"""A text, several, the tokens of one, or those of several."""
MAX_CHOICES = 16
MAX_TOP = 20


class StreamOptions(Struct):
    include_usage: bool | None = None


class Sampling(Struct, kw_only=True):
    """What every request that makes tokens may say; None: as the server's options have it."""

    model: str = ""
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 30)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    repeat_last_n: Limit | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, float] | list[tuple[int, float | bool]] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Annotated[str, Meta(max_length=1024)] | Stops | None = None
    ignore_eos: bool | None = None
    max_tokens: Limit | None = None
    n_predict: Limit | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # the form of the answer: llama-server's names, then vLLM's
    grammar: Text | None = None
    json_schema: dict[str, Any] | bool | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Text | None = None
    guided_grammar: Text | None = None
    guided_choice: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None


class StructuredOutputs(Struct, kw_only=True):
    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: Text | None = None
    choice: list[str] | None = None
    grammar: Text | None = None


class JsonSchema(Struct, kw_only=True):
    name: str = ""
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema", "grammar", "regex"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | bool | None = None
    grammar: Text | None = None
    regex: Text | None = None
    pattern: Text | None = None


class Named(Struct, kw_only=True):
    name: str


class ChosenTool(Struct, kw_only=True):
    function: Named
    type: Literal["function"] = "function"


Tools = Annotated[list[Tool], Meta(max_length=256)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(Sampling, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(Sampling, kw_only=True):
    prompt: Prompts
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] | bool | None = None
    suffix: Text | None = None
    response_format: ResponseFormat | None = None


class EmbeddingRequest(Struct, kw_only=True):
    input: Prompts
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    pooling: Literal["mean", "last", "cls"] | None = None


class TokenizeRequest(Struct, kw_only=True):
    content: Text
    model: str = ""
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Struct, kw_only=True):
    tokens: list[int]
    model: str = ""


class TemplateRequest(Struct, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    model: str = ""
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool | None = None
