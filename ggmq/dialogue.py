"""A conversation as text: its turns, the prompt that they make, and which of them fit a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ggmq.chat import ChatTemplate, Message
from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(slots=True)
class Dialogue:
    """The turns so far. Without a template they are one text, a line each.

    Attributes:
        system: the system message, empty for none. It is part of every prompt, if there is a template.
        turns: all of them, oldest first.
        n_dropped: the first so many are no longer part of the prompt.
    """

    vocabulary: Vocabulary
    template: ChatTemplate | None
    system: str = ""
    enable_thinking: bool = True
    turns: list[Turn] = field(default_factory=list)
    n_dropped: int = 0

    def messages(self, n_dropped: int = 0) -> list[Message]:
        """The conversation without its first turns."""
        out: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for t in self.turns[n_dropped:]:
            out += [{"role": "user", "content": t.question}, {"role": "assistant", "content": t.answer}]
        return out

    def fit(self, question: str, n_ctx: int, n_room: int) -> tuple[list[int], int]:
        """The prompt's tokens for the next question, and how many turns it goes without.

        As few as can be, so that an answer of `n_room` tokens fits too; the question alone may take more of that room.
        Errors: FormatError when it does not fit even alone, and what the template says.
        """
        for n_dropped in range(self.n_dropped, len(self.turns) + 1):
            tokens = self._tokens(question, n_dropped)
            if len(tokens) + n_room <= n_ctx:
                return tokens, n_dropped
        if len(tokens) >= n_ctx:
            what = "with the system message" if self.system and self.template else "alone"
            raise FormatError(f"prompt: {len(tokens)} tokens {what} do not fit a context of {n_ctx}; make it shorter, "
                              "or use a larger -c")  # fmt: skip
        return tokens, n_dropped

    def keep(self, turn: Turn, n_dropped: int) -> None:
        """Add a turn that was answered without the first `n_dropped`."""
        self.turns.append(turn)
        self.n_dropped = n_dropped

    def clear(self) -> None:
        """Forget all turns. The system message stays."""
        self.turns.clear()
        self.n_dropped = 0

    def n_tokens(self) -> int:
        """Tokens that the turns which are still part of the prompt take, with the system message."""
        if self.template is None:
            return len(self.vocabulary.encode(self._text(self.turns[self.n_dropped :]))) if self.turns else 0
        messages = self.messages(self.n_dropped)
        if not messages:
            return 0
        try:
            return len(self.vocabulary.encode(self._rendered(messages, False)))
        except FormatError:  # many templates refuse what has no question yet
            return len(self.vocabulary.encode("\n".join(str(m["content"]) for m in messages)))

    def _tokens(self, question: str, n_dropped: int) -> list[int]:
        if self.template is None:
            return self.vocabulary.encode(self._text([*self.turns[n_dropped:], Turn(question, "")]))
        asked = [*self.messages(n_dropped), {"role": "user", "content": question}]
        return self.vocabulary.encode(self._rendered(asked, True))

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        assert self.template is not None  # whoever calls has looked
        return self.template.render(messages, add_generation_prompt, self.enable_thinking)

    @staticmethod
    def _text(turns: Sequence[Turn]) -> str:
        return "\n".join(t.question + t.answer for t in turns)
