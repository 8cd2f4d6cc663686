"""Chat templates: the model's own Jinja2 template in a sandbox, ChatML where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError

Message = dict[str, str]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_OUTPUT_CHARS = 4_000_000


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """Errors: FormatError when the model's template cannot be parsed or refuses the messages."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = lambda f: datetime.now().strftime(f)
        self._tokens = {name: vocabulary.tokens[i] if i is not None else ""
                        for name, i in (("bos_token", vocabulary.bos), ("eos_token", vocabulary.eos))}  # fmt: skip
        self._name = vocabulary.name
        try:
            self._template = env.from_string(vocabulary.chat_template or CHATML)
        except jinja2.TemplateError as e:
            raise FormatError(f"{self._name}: tokenizer.chat_template: {e}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation. Messages have `role` and `content`."""
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=add_generation_prompt,
                                         **self._tokens)  # fmt: skip
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
            raise FormatError(f"{self._name}: tokenizer.chat_template refuses the conversation: {e}") from None
        return text[:MAX_OUTPUT_CHARS]
