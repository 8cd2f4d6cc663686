"""The format of a model's answers, found from its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ggmq.answers.constraints import grammar
from ggmq.answers.layout import ANALYSIS, find_layout
from ggmq.answers.reader import AnswerReader, NewId
from ggmq.special import CONTROL, Splitter
from ggmq.tokenizer import Vocabulary


class AnswerFormat:
    """Attributes:
    name: of the family of formats.
    preserved: ids of control tokens that a reader has to see.
    """

    def __init__(self, template_source: str, vocabulary: Vocabulary) -> None:
        self._layout = find_layout(template_source)
        self.name = self._layout.name
        markers = "\n".join(self._layout.markers)  # some are a token and more
        control = np.flatnonzero(vocabulary.types == CONTROL).tolist()
        self.preserved = frozenset(i for i in control if vocabulary.tokens[i] in markers) - vocabulary.end_ids
        self._splitter = Splitter([(vocabulary.tokens[i], i) for i in sorted(self.preserved)])

    @classmethod
    def of(cls, template_source: str, vocabulary: Vocabulary) -> AnswerFormat:
        """The format of a model with this template (`Vocabulary.tool_template`, if any, where there are tools); an empty one
        stands for ChatML."""
        return cls(template_source, vocabulary)

    @property
    def thinks(self) -> bool:
        """Answers may have thoughts."""
        return bool(self._layout.thoughts) or self._layout.channels

    def reader(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning: bool = True,
        prompt_tail: str = "",
        thinking: bool = False,
        new_id: NewId | None = None,
    ) -> AnswerReader:
        """A reader of one answer.

        `tools`: as OpenAI has them; without any there are no calls. `reasoning`: thoughts are kept apart; if not, they stay
        in the content with their markers. `prompt_tail`: the end of the prompt, where thoughts may begin already.
        `thinking`: the prompt ends within thoughts, which the answer goes on with. `new_id`: makes the id of a call by its
        number, where the format has none.
        """
        return AnswerReader(self._layout, parameters_of(tools or ()), reasoning, prompt_tail, thinking, new_id)


    def constraint(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str = "auto",
        parallel: bool = True,
        prompt_tail: str = "",
        thinking: bool = False,
    ) -> str | None:
        """A Lark grammar, in llguidance's dialect, for an answer with calls; None where the format has none.

        `choice`: auto: text, in which what begins as a call is a whole one; required: one call at least, and after thoughts
        nothing else; or the name of the tool that is to be called. `parallel`: more calls than one. `prompt_tail`,
        `thinking`: as for a reader. Control tokens are written by their ids, all others as text.
        Errors: KeyError when the tool that is to be called is none of them.
        """
        form, known = self._layout.forced, parameters_of(tools)
        if choice not in ("auto", "required"):
            known, parallel = {choice: known[choice]}, False
        if form is None or not known or (choice == "auto" and not form.trigger and not self._layout.bare):
            return None
        over = any(prompt_tail.rstrip().endswith(end) for _, end in self._layout.thoughts)
        thoughts = ANALYSIS if self._layout.channels else () if over else self._layout.thoughts
        _, opened = self._layout.begun(prompt_tail, thinking) or ("", "")
        return grammar(form, known, choice != "auto", parallel, self._splitter, opened, thoughts, self._layout.noise)


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parameters' schemas of tools by name."""
    given = ((t["function"]["name"], t["function"].get("parameters")) for t in tools)
    return {name: schema if isinstance(schema, Mapping) else {} for name, schema in given}
