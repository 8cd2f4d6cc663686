"""From a conversation, in whichever API, to what is asked of a model: prompt, reader, form of the answer."""

from __future__ import annotations

import dataclasses

from ggmq.server.asking import Wanted
from ggmq.server.context import Context
from ggmq.server.errors import bad
from ggmq.server.forms import Form
from ggmq.server.models import ServedModel
from ggmq.server.sampling import params_of, stops_of
from ggmq.server.schema import Sampling
from ggmq.texts import Talk


async def prompt_of(model: ServedModel, talk: Talk) -> tuple[list[int], str]:
    """Tokens of the prompt that a conversation makes, and its text. Errors: ApiError 400, InvalidValue."""
    talk.check()
    return await model.encode_chat(
        talk.messages, add_generation_prompt=not talk.continues, tools=talk.offered, enable_thinking=talk.thinking,
        extra=talk.extra, continue_final=talk.continues,
    )  # fmt: skip


async def wanted_of(
    context: Context, model: ServedModel, talk: Talk, body: Sampling, form: Form, n_predict: int, n_probs: int = -1,
    stop_path: str = "stop",
) -> Wanted:  # fmt: skip
    """Errors: ApiError 400 for what is wrong in the body."""
    params = params_of(body, context.options, model.texts)
    stop = stops_of(body.stop, stop_path)
    grammar = await form.compiled(model)
    if grammar is not None:  # it is of the whole answer: there is no place for thoughts, nor for calls
        if talk.offered and talk.choice != "auto":
            raise bad("tool_choice", f"a call is wanted, and {form.path} wants another answer; leave one of them out")
        tokens, _ = await prompt_of(model, dataclasses.replace(talk, thinking=False))
        return Wanted(model, tokens, params, n_predict, stop, n_probs, body.n or 1, grammar=grammar)
    tokens, prompt = await prompt_of(model, talk)
    said = model.texts.spoken(talk, prompt)
    if (lark := said.lark) is not None:
        grammar = await model.aside(lambda: model.texts.grammars.lark(lark, said.path))
    return Wanted(model, tokens, params, n_predict, stop, n_probs, body.n or 1, said.preserved, grammar, said.reader)
