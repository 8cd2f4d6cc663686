"""A response of OpenAI's Responses API as it grows: its items, and the events that tell of each change, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggmq.answers import Content, Reasoning
from ggmq.answers import Piece as Part
from ggmq.server.asking import End, Piece
from ggmq.server.chat import logprobs_of
from ggmq.server.context import new_id
from ggmq.server.errors import ApiError
from ggmq.server.streaming import named
from ggmq.service import Token, Usage
from ggmq.tokenizer import Vocabulary


class Output:
    """Attributes:
    response: as it is now. items: its output.
    """

    def __init__(self, head: dict[str, Any], vocabulary: Vocabulary, n_probs: int) -> None:
        self.response = head
        self.items: list[dict[str, Any]] = head["output"]
        self._vocabulary, self._n_probs = vocabulary, n_probs
        self._number = 0
        self._open: str | int | None = None

    def begin(self) -> bytes:
        return self._told("response.created") + self._told("response.in_progress")

    def add(self, piece: Piece) -> bytes:
        """The events of some more of the answer. Its tokens' log-probabilities go with the first text of it."""
        out, tokens = [], piece.tokens
        for part in piece.parts:
            out.append(self._add(part, tokens))
            if isinstance(part, Content):
                tokens = ()
        return b"".join(out)

    def end(self, end: End, usage: Usage, n_reasoning: int) -> bytes:
        cut = end.reason == "length"
        events = self._close("incomplete" if cut else "completed")
        details = {"reason": "max_output_tokens"} if cut else None
        self.response |= {"status": "incomplete" if cut else "completed", "incomplete_details": details, "usage": {
            "input_tokens": usage.n_prompt, "input_tokens_details": {"cached_tokens": usage.n_cached},
            "output_tokens": usage.n_made, "output_tokens_details": {"reasoning_tokens": n_reasoning},
            "total_tokens": usage.n_prompt + usage.n_made}}  # fmt: skip
        return events + self._told("response.incomplete" if cut else "response.completed")

    def fail(self, e: ApiError) -> bytes:
        events = self._close("incomplete")
        self.response |= {"status": "failed", "error": {"code": e.code or "server_error", "message": e.message}}
        return events + self._told("response.failed")

    # -- items ---------------------------------------------------------------------------------------------------------

    def _add(self, part: Part, tokens: Sequence[Token]) -> bytes:
        match part:
            case Content(text):
                begun = self._open_item("message", {"id": new_id("msg_"), "type": "message", "status": "in_progress",
                                                    "role": "assistant", "content": []}, self._text_part())  # fmt: skip
                content = self.items[-1]["content"][0]
                content["text"] += text
                probs = logprobs_of(tokens, self._vocabulary) if self._n_probs >= 0 else []
                content["logprobs"] += probs
                return begun + self._of_item("output_text.delta", content_index=0, delta=text, logprobs=probs)
            case Reasoning(text):
                begun = self._open_item("reasoning", {"id": new_id("rs_"), "type": "reasoning", "status": "in_progress",
                                                      "summary": [], "content": []},
                                        {"type": "reasoning_text", "text": ""})  # fmt: skip
                self.items[-1]["content"][0]["text"] += text
                return begun + self._of_item("reasoning_text.delta", content_index=0, delta=text)
            case _:
                begun = self._open_item(part.index, {"id": new_id("fc_"), "type": "function_call", "status": "in_progress",
                                                     "call_id": part.id, "name": part.name, "arguments": ""})  # fmt: skip
                if not part.arguments:
                    return begun
                self.items[-1]["arguments"] += part.arguments
                return begun + self._of_item("function_call_arguments.delta", delta=part.arguments)

    @staticmethod
    def _text_part() -> dict[str, Any]:
        return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}

    def _open_item(self, kind: str | int, item: dict[str, Any], content: dict[str, Any] | None = None) -> bytes:
        """Begin an item, and the content in it, unless the last one goes on."""
        if self._open == kind:
            return b""
        events = self._close("completed")
        self._open = kind
        self.items.append(item)
        events += self._event("output_item.added", output_index=len(self.items) - 1, item=item)
        if content is not None:
            events += self._of_item("content_part.added", content_index=0, part=content)
            item["content"].append(content)
        return events

    def _close(self, status: str) -> bytes:
        """End the item that is open."""
        if self._open is None:
            return b""
        item, self._open = self.items[-1], None
        item["status"] = status
        if item["type"] == "function_call":
            events = self._of_item("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        else:
            content = item["content"][0]
            done = {"text": content["text"]} | ({"logprobs": content["logprobs"]} if "logprobs" in content else {})
            events = self._of_item(f"{content['type']}.done", content_index=0, **done)
            events += self._of_item("content_part.done", content_index=0, part=content)
        return events + self._event("output_item.done", output_index=len(self.items) - 1, item=item)

    # -- events --------------------------------------------------------------------------------------------------------

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)

    def _told(self, kind: str) -> bytes:
        return self._event(kind.removeprefix("response."), response=self.response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = named({"type": f"response.{kind}", "sequence_number": self._number, **fields})
        self._number += 1
        return event
