"""From a conversation, in whichever API, to what is asked of a model: prompt, reader, form of the answer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ggmq.answers import AnswerReader
from ggmq.chat import Message
from ggmq.server.asking import Wanted
from ggmq.server.context import Context
from ggmq.server.errors import bad
from ggmq.server.forms import Form
from ggmq.server.models import ServedModel
from ggmq.server.sampling import params_of, stops_of
from ggmq.server.schema import Sampling


@dataclass(slots=True)
class Talk:
    """A conversation that is to go on.

    Attributes:
        messages, tools: as OpenAI's chat completions have them.
        choice: "none", "auto", "required", or the name of the tool that is to be called.
        parallel: several tools may be called at once.
        thinking: the model is to think first, if its template can choose; extra: more variables of the template.
        continues: the last message is an answer that goes on.
        paths: of messages and tools in the body, for errors.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    choice: str = "auto"
    parallel: bool = True
    thinking: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    continues: bool = False
    paths: tuple[str, str] = ("messages", "tools")

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Tools that the model is told of."""
        return self.tools if self.choice != "none" else []

    def check(self) -> None:
        """Errors: ApiError 400 for tools that come twice or are chosen and not there."""
        names = [t["function"]["name"] for t in self.tools]
        if len(set(names)) != len(names):
            raise bad(self.paths[1], "expected a name of its own for each tool")
        if self.choice == "required" and not names:
            raise bad("tool_choice", "expected tools where one is required")
        if self.choice not in ("none", "auto", "required", *names):
            raise bad("tool_choice", f"there is no tool {self.choice[:64]!r}; expected one of {', '.join(names) or 'none'}")


async def prompt_of(model: ServedModel, talk: Talk) -> tuple[list[int], str]:
    """Tokens of the prompt that a conversation makes, and its text. Errors: ApiError 400."""
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
    params = params_of(body, context.options, model.vocabulary)
    stop = stops_of(body.stop, stop_path)
    grammar = await form.compiled(model)
    if grammar is not None:  # it is of the whole answer: there is no place for thoughts, nor for calls
        if talk.offered and talk.choice != "auto":
            raise bad("tool_choice", f"a call is wanted, and {form.path} wants another answer; leave one of them out")
        tokens, _ = await prompt_of(model, dataclasses.replace(talk, thinking=False))
        return Wanted(model, tokens, params, n_predict, stop, n_probs, body.n or 1, grammar=grammar)
    tokens, prompt = await prompt_of(model, talk)
    written, tools = model.format(bool(talk.offered)), talk.offered
    thoughts = talk.continues and "reasoning_content" in talk.messages[-1] and not talk.messages[-1].get("content")
    if tools:
        lark = written.constraint(tools, talk.choice, talk.parallel, prompt, thoughts)
        if lark is not None:
            path = "tool_choice" if talk.choice != "auto" else talk.paths[1]
            grammar = await model.aside(lambda: model.grammars.lark(lark, path))

    def reader() -> AnswerReader:
        return written.reader(tools, True, prompt, thoughts)

    return Wanted(model, tokens, params, n_predict, stop, n_probs, body.n or 1, written.preserved, grammar, reader)
