"""What an answer is made of, as it comes."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct, field


class Content(Struct, frozen=True):
    """More of what is said."""

    text: str


class Reasoning(Struct, frozen=True):
    """More of what is thought."""

    text: str


class ToolCall(Struct, frozen=True):
    """A call, or more of it: `id` and `name` come once, with the first piece, `arguments` in pieces that make up JSON."""

    index: int
    id: str
    name: str
    arguments: str


Piece = Content | Reasoning | ToolCall


class Call(Struct):
    """A call with all that came of its arguments."""

    id: str
    name: str
    arguments: str = ""


class Answer(Struct):
    """Pieces put together."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, pieces: Iterable[Piece]) -> Answer:
        """Add pieces in the order in which they came."""
        for piece in pieces:
            if isinstance(piece, Content):
                self.content += piece.text
            elif isinstance(piece, Reasoning):
                self.reasoning += piece.text
            elif piece.index == len(self.calls):
                self.calls.append(Call(piece.id, piece.name, piece.arguments))
            else:
                self.calls[piece.index].arguments += piece.arguments
        return self
