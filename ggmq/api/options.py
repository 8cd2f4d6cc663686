"""Options by name: what each may be, declared once for type checkers and for whoever passes something else."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta

from ggmq.conversation import wrong
from protocol.errors import InvalidValue

_PLACE = re.compile(r" - at `\$(?:\[\.\.\.\])?\.?([^`]*)`$")
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Limit = Annotated[int, Meta(ge=-1, le=1 << 24)]
Positive = Annotated[int, Meta(ge=1, le=1 << 24)]


class GenerateOptions(TypedDict, total=False):
    """How tokens are taken and how many; what is not said, or None, is as `ggmq run` has it.

    Attributes:
        max_tokens: tokens to make at most; -1 (the default): until the model ends or its context is full.
        temperature: 0.8; 0 is greedy.
        top_k: 40; 0 for all. top_p: 0.95. min_p: 0.05.
        repeat_penalty: 1 (none); repeat_last_n: 64 tokens that penalties look back at, -1 for all.
        presence_penalty, frequency_penalty: 0.
        seed: the same one gives the same text; -1 (the default) takes a new one.
        stop: a text that ends the answer, or several; they are not shown.
        logit_bias: what is added to logits, by token; False: it is never taken.
        ignore_eos: the model cannot end.
        logprobs: with each token its log-probability (True), and so many of the most likely others.
        grammar: in GBNF or Lark; json_schema: a schema, or True for any object; regex; choices: one of these texts. What
            the answer must be; one of them at a time.
    """

    max_tokens: Limit | None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None
    top_k: Annotated[int, Meta(ge=0, le=1 << 30)] | None
    top_p: Share | None
    min_p: Share | None
    repeat_penalty: Annotated[float, Meta(gt=0, le=100)] | None
    repeat_last_n: Limit | None
    presence_penalty: Penalty | None
    frequency_penalty: Penalty | None
    seed: Annotated[int, Meta(ge=-1, le=(1 << 63) - 1)] | None
    stop: str | Sequence[str] | None
    logit_bias: dict[int, float | bool] | None
    ignore_eos: bool | None
    logprobs: bool | Annotated[int, Meta(ge=0, le=1024)] | None
    grammar: str | None
    json_schema: dict[str, Any] | bool | None
    regex: str | None
    choices: Sequence[str] | None


class ChatOptions(GenerateOptions, total=False):
    """Besides those of `GenerateOptions`:

    Attributes:
        tools: what may be called, as OpenAI's chat completions have it.
        tool_choice: "auto", "none", "required", or the name of a tool.
        parallel_tool_calls: several in one answer; True.
        enable_thinking: the model thinks first, if its template can choose; True.
        chat_template_kwargs: more variables for the template.
        continue_final_message: an answer at the end of the messages goes on; True, unless it has calls.
    """

    tools: Sequence[dict[str, Any]] | None
    tool_choice: str | None
    parallel_tool_calls: bool | None
    enable_thinking: bool | None
    chat_template_kwargs: dict[str, Any] | None
    continue_final_message: bool | None


class BusOptions(TypedDict, total=False):
    """Which devices take part; words and defaults are those of `ggmq run`.

    Attributes:
        workers: of this host; 1, as many as worker_mem names, or none with rpc.
        device: of the local workers, "CPU".
        worker_mem: MiB that each of them lends; what is free.
        threads: of the local workers together; all cores.
        pin: each thread stays on a CPU. cache: they keep weights in a cache.
        rpc: workers that listen on other hosts, "HOST:PORT".
        keys: the cluster's key file; the default one, if it is there. insecure: no encryption, no keys.
    """

    workers: Annotated[int, Meta(ge=0, le=64)] | None
    device: str | None
    worker_mem: Sequence[Positive] | None
    threads: Annotated[int, Meta(ge=0, le=1024)] | None
    pin: bool | None
    cache: bool | None
    rpc: str | Sequence[str] | None
    keys: str | None
    insecure: bool | None


class ModelOptions(TypedDict, total=False):
    """What lies where, and for how many; words and defaults are those of `ggmq run` and `ggmq serve`.

    Attributes:
        ctx_size: context of each answer in tokens; the model's, at most 4096.
        parallel: answers that are made at once, 4; each has memory for its context. Others wait.
        batch_size: prompt tokens that are read at once, 512.
        tensor_split: shares of the layers, a device each; by free memory.
        ngl: layers on the lent devices, the first others stay on this host; all.
        activations: what crosses between devices, "f32" or "f16".
        cache_type_k, cache_type_v: of the KV cache, "f16" or "q8_0".
        prompt_cache: a folder in which what is read of texts stays over a restart; prompt_cache_mib: what it may hold.
        spec: how tokens are guessed, "auto", "ngram", "draft" or "off"; spec_draft_model: a file that guesses.
        progress: bars on a terminal while it is loaded; False.
    """

    ctx_size: Annotated[int, Meta(ge=0, le=1 << 24)] | None
    parallel: Annotated[int, Meta(ge=1, le=256)] | None
    batch_size: Annotated[int, Meta(ge=1, le=4096)] | None
    tensor_split: Sequence[Annotated[float, Meta(ge=0)]] | None
    ngl: Annotated[int, Meta(ge=0)] | None
    activations: Literal["f32", "f16"] | None
    cache_type_k: Literal["f16", "q8_0"] | None
    cache_type_v: Literal["f16", "q8_0"] | None
    prompt_cache: str | None
    prompt_cache_mib: Annotated[int, Meta(ge=1, le=1 << 30)] | None
    spec: Literal["auto", "ngram", "draft", "off"] | None
    spec_draft_model: str | None
    progress: bool | None


class LoadOptions(BusOptions, ModelOptions, total=False):
    """Those of `BusOptions` and of `ModelOptions`, and:

    Attributes:
        hf_repo: USER/REPO[:QUANT], a model of the Hugging Face hub, downloaded once.
    """

    hf_repo: str | None


def checked(kind: type, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options that are said, once they are seen to be what they may be. kind: one of the above.

    Errors: InvalidValue.
    """
    known = kind.__annotations__
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(known))}"
            raise wrong(name, f"{where} has no such option; {hint}")
    said = {name: os.fspath(value) if isinstance(value, os.PathLike) else value
            for name, value in options.items() if value is not None}  # fmt: skip
    return dict(converted(said, kind))


def converted(value: Any, kind: Any, prefix: str = "") -> Any:
    """A value as a type has it. prefix: its path. Errors: InvalidValue, with the path of what is wrong."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise misfit(str(e), value, prefix) from None


def misfit(text: str, value: Any, prefix: str) -> InvalidValue:
    """The error for what msgspec says of a value."""
    place = _PLACE.search(text)
    path = place[1] if place else ""
    what = (text[: place.start()] if place else text).replace("`", "")
    if isinstance(value, Mapping) and path in value and "got" not in what:
        what += f", got {repr(value[path])[:64]}"
    param = f"{prefix}.{path}" if prefix and path and not path.startswith("[") else prefix + path
    return wrong(param, what[:1].lower() + what[1:])
