"""The format of a model's answers, found from its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ggmq.answers.layout import find_layout
from ggmq.answers.reader import AnswerReader, NewId
from ggmq.special import CONTROL
from ggmq.tokenizer import Vocabulary


class AnswerFormat:
    """Attributes:
    name: of the family of formats.
    preserved: ids of control tokens that a reader has to see.
    """

    def __init__(self, template_source: str, vocabulary: Vocabulary) -> None:
        self._layout = find_layout(template_source)
        self.name = self._layout.name
        ids = (vocabulary.ids.get(text.strip()) for text in self._layout.markers)
        self.preserved = frozenset(i for i in ids if i is not None and vocabulary.types[i] == CONTROL) - vocabulary.end_ids

    @classmethod
    def of(cls, template_source: str, vocabulary: Vocabulary) -> AnswerFormat:
        """The format of a model with this template; an empty one stands for ChatML."""
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
        new_id: NewId | None = None,
    ) -> AnswerReader:
        """A reader of one answer.

        `tools`: as OpenAI has them; without any there are no calls. `reasoning`: thoughts are kept apart; if not, they stay
        in the content with their markers. `prompt_tail`: the end of the prompt, where thoughts may begin already.
        `new_id`: makes the id of a call by its number, where the format has none.
        """
        return AnswerReader(self._layout, parameters_of(tools or ()), reasoning, prompt_tail, new_id)


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parameters' schemas of tools by name."""
    return {t["function"]["name"]: t["function"].get("parameters") or {} for t in tools}
