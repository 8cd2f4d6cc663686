"""llama-server's own routes: tokens and templates, what is served, and how it is."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ggmq.conversation import continues, messages_of, thinking_of, tools_of
from ggmq.server.context import Context
from ggmq.server.errors import ApiError, bad
from ggmq.server.models import ServedModel
from ggmq.server.replies import json_of
from ggmq.server.schema import DetokenizeRequest, TemplateRequest, TokenizeRequest
from ggmq.version import __version__


async def models(context: Context, request: Request) -> Response:
    listed = [_model(m) for m in context.models.by_name.values()]
    return json_of({"object": "list", "data": listed, "has_more": False, "first_id": listed[0]["id"],
                    "last_id": listed[-1]["id"]})  # fmt: skip


async def model(context: Context, request: Request) -> Response:
    name = request.path_params["id"]
    found = context.models.by_name.get(name)
    if found is None:
        raise ApiError(404, f"there is no model {name[:256]!r}; expected one of {', '.join(context.models.by_name)}",
                       "model_not_found", "model")  # fmt: skip
    return json_of(_model(found))


def _model(m: ServedModel) -> dict[str, Any]:
    """OpenAI's fields, Anthropic's, and llama-server's `meta`."""
    hp = m.service.model.arch.hp
    meta = {"n_ctx": m.n_ctx, "n_ctx_train": hp.n_ctx_train, "n_embd": hp.n_embd, "n_vocab": hp.n_vocab,
            "n_layer": hp.n_layer}  # fmt: skip
    return {"id": m.name, "object": "model", "created": m.created, "owned_by": "ggmq", "type": "model",
            "display_name": m.name, "created_at": _rfc3339(m.created), "meta": meta}  # fmt: skip


def _rfc3339(seconds: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


async def tokenize(context: Context, request: Request) -> Response:
    body = await context.bodies.decoded(request, TokenizeRequest)
    m = context.models.find(body.model)
    tokens = await m.encode(body.content, body.add_special, body.parse_special)
    if not body.with_pieces:
        return json_of({"tokens": tokens})
    return json_of({"tokens": [{"id": t, "piece": _piece(m.vocabulary.piece(t, True))} for t in tokens]})


def _piece(raw: bytes) -> str | list[int]:
    """A text, or where it is none its bytes."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


async def detokenize(context: Context, request: Request) -> Response:
    body = await context.bodies.decoded(request, DetokenizeRequest)
    m = context.models.find(body.model)
    n_vocab = len(m.vocabulary.tokens)
    for i, t in enumerate(body.tokens):
        if not 0 <= t < n_vocab:
            raise bad(f"tokens[{i}]", f"expected a token of 0 to {n_vocab - 1}, got {t}")
    return json_of({"content": await m.aside(lambda: m.vocabulary.decode(body.tokens, special=True))})


async def apply_template(context: Context, request: Request) -> Response:
    body = await context.bodies.decoded(request, TemplateRequest)
    m = context.models.find(body.model)
    thinking, extra = thinking_of(body.chat_template_kwargs, body.reasoning_effort, body.enable_thinking,
                                  context.options.enable_thinking)  # fmt: skip
    messages = messages_of(body.messages)
    goes_on = continues(messages, body.continue_final_message, body.add_generation_prompt)
    prompt = await m.render(messages, add_generation_prompt=body.add_generation_prompt and not goes_on,
                            enable_thinking=thinking, tools=tools_of(body.tools), extra=extra, continue_final=goes_on)
    return json_of({"prompt": prompt})


async def props(context: Context, request: Request) -> Response:
    m = context.models.find(request.query_params.get("model", next(iter(context.models.by_name))))
    p, state = context.options.params, m.service.state()
    params = {"temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p, "min_p": p.min_p,
              "repeat_penalty": p.repeat_penalty, "repeat_last_n": p.repeat_last_n, "seed": -1 if p.seed is None else p.seed,
              "n_predict": context.options.n_predict, "max_tokens": context.options.n_predict}  # fmt: skip
    v = m.vocabulary
    return json_of({
        "default_generation_settings": {"n_ctx": m.n_ctx, "params": params}, "total_slots": len(state.slots),
        "model_alias": m.name, "model_path": v.name, "models": list(context.models.by_name),
        "chat_template": v.chat_template, "bos_token": _token(m, v.bos), "eos_token": _token(m, v.eos),
        "enable_thinking": context.options.enable_thinking, "modalities": {"vision": False, "audio": False},
        "build_info": f"ggmq {__version__}",
    })  # fmt: skip


def _token(m: ServedModel, token: int | None) -> str:
    return "" if token is None else m.vocabulary.piece(token, True).decode("utf-8", "replace")


async def slots(context: Context, request: Request) -> Response:
    return json_of([{"model": m.name, **msgspec.to_builtins(s), "is_processing": s.state != "idle"}
                    for m in context.models.by_name.values() for s in m.service.state().slots])  # fmt: skip


async def health(context: Context, request: Request) -> Response:
    errors = [m.service.error for m in context.models.by_name.values()]
    if all(errors):
        raise ApiError(503, errors[0], "unavailable", retry_s=2)
    return json_of({"status": "ok"})
