"""A conversation as a chat template takes it: content as text or parts, calls with arguments as text or objects, tools.

What a template takes is found by trial, from which values it looks at. Used by the process of `ggmq.rendering`, and so
imports nothing of ours.

Source: llama.cpp's common/jinja/caps.cpp for the trials, its chat.cpp and parsers/ for what is changed for which template.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

Message = dict[str, Any]
SPACES = " \t\n\v\f\r"
"""Python takes Unicode's spaces off too; llama.cpp leaves them."""


class WatchedText(str):
    """A message's text in a trial: whether it was asked if it is a text, and whether it was taken for a list."""

    tested = listed = False

    def __iter__(self) -> NoReturn:
        self.listed = True
        raise TypeError("a text is no list")

    def __getitem__(self, at: Any) -> str:
        self.listed = self.listed or isinstance(at, int)
        return super().__getitem__(at)


class WatchedParts(list[Any]):
    """A message's parts in a trial: as `WatchedText`."""

    tested = listed = False

    def __iter__(self) -> Any:
        self.listed = True
        return super().__iter__()

    def __getitem__(self, at: Any) -> Any:
        self.listed = self.listed or isinstance(at, int)
        return super().__getitem__(at)


class Watched(dict[str, Any]):
    """A mapping in a trial: which of its values were looked at."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        self.seen |= self.keys()
        return super().items()

    def values(self) -> Any:
        self.seen |= self.keys()
        return super().values()


_ASKED = {"role": "user", "content": "User message"}
_TOOL = {"name": "tool", "type": "function", "function": {
    "name": "tool1", "description": "Tool description", "parameters": {
        "type": "object", "properties": {"arg": {"type": "string", "description": "Arg description"}}, "required": ["arg"]},
}}  # fmt: skip

Trial = Callable[[list[Message], list[Any]], "str | None"]
"""Renders messages with tools; None when the template refuses them."""


class Forms:
    """What a template takes, and conversations in that form.

    Attributes:
        text, parts: content as a text, as a list of parts. system: a system message is shown.
        tools: it describes tools. calls: it shows calls. objects: a call's arguments are a mapping and not JSON's text.
        channels: its answers have several channels, as gpt-oss's.
    """

    def __init__(self, source: str, trial: Trial) -> None:
        # families of models for which llama.cpp prepares messages in a way of their own
        self.channels = "<|channel|>" in source
        self._strips = "You have access to the following functions in JSONSchema format" in source
        self._blocks = all(x in source for x in ("[SYSTEM_PROMPT]", "[TOOL_CALLS]", "[ARGS]")) and "[CALL_ID]" not in source
        lists = "<|tool_list_start|>" in source and "<|tool_list_end|>" in source
        self._thinking = self.channels or lists or "List of tools: [" in source
        self._sorts = "dsml_token" in source and "DSML" in source and "function_calls" not in source
        self._responses = "'<|tool_call>call:'" in source and "{#- OpenAI Chat Completions:" not in source
        self._try_content(trial)
        self.calls, self.objects = True, False
        self._try_calls(trial, {"arg": "value"})
        if not self.objects:
            self._try_calls(trial, None)
        shown = [trial([_ASKED], tools) for tools in ([], [_TOOL])]
        self.tools = "tool1" in (shown[1] or "") and shown[0] != shown[1]

    def _try_content(self, trial: Trial) -> None:
        text, parts = WatchedText("STRING_MARKER"), WatchedParts()
        system = Watched(role="system", content="System message")
        shown = trial([{"role": "user", "content": text}], [])
        self.parts = text.listed
        if text.tested and trial([{"role": "user", "content": parts}], []) is not None:
            self.parts = self.parts or parts.listed
        trial([system, {"role": "user", "content": "User message"}], [])
        self.text = shown is not None and (not text.listed or text in shown)
        self.system = "content" in system.seen

    def _try_calls(self, trial: Trial, arguments: dict[str, str] | None) -> None:
        """A call with arguments as a mapping, or as a text for None."""
        given: Any = '{"arg": "value"}' if arguments is None else Watched(**arguments)
        call = {"id": "call00001", "type": "function", "function": {"name": "tool1", "arguments": given}}
        said = Watched(role="assistant", content="", tool_calls=[call])
        result = {"role": "tool", "content": "Tool response", "tool_call_id": "call00001"}
        answer = {"role": "assistant", "content": "The tool response was 'tool response'"}
        if trial([_ASKED, said, result, answer, _ASKED], [_TOOL]) is None:
            self.calls = self.calls and arguments is not None
            return
        self.calls = self.calls and "tool_calls" in said.seen
        self.objects = self.calls and arguments is not None and "arg" in given.seen

    # -- a conversation ------------------------------------------------------------------------------------------------

    def prepared(self, messages: list[Message], tools: list[Any]) -> list[Message]:
        """The messages as the template takes them; `tools` are written into them where it has no place for any."""
        out = [self._message(m) for m in messages]
        if not self.calls and not self.tools:
            out = [_without_calls(m) for m in out]
        if tools and not self.tools:
            _describe(out, tools)
        if out and out[0]["role"] == "system" and not self.system:
            first = out.pop(0)
            if out:
                out[0]["content"] = as_text(first["content"]) + "\n" + as_text(out[0]["content"])
        for message in out:
            needed = not self.text and self.parts
            if isinstance(message["content"], str) and (needed or (self._blocks and message["role"] in _BLOCK_ROLES)):
                message["content"] = [{"type": "text", "text": message["content"]}]
            if message.get("reasoning_content"):
                self._place_thoughts(message)
        if self._sorts:
            _sort_results(out)
        return _with_responses(out) if self._responses else out

    def _message(self, message: Message) -> Message:
        """The fields that a template may ask for."""
        role, content = message["role"], message.get("content") or ""
        thoughts = message.get("reasoning_content")
        if role == "developer" and not self.channels:
            role = "system"
        if self._strips:
            content, thoughts = _stripped(content), thoughts and thoughts.strip(SPACES)
        out = {"role": role, "content": content if self.parts else as_text(content)}
        out |= {key: value for key, value in (("reasoning_content", thoughts), ("name", message.get("name")),
                                              ("tool_call_id", message.get("tool_call_id"))) if value}  # fmt: skip
        if message.get("tool_calls"):
            out["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return out

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        name, arguments = call["function"]["name"], call["function"].get("arguments") or "{}"
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
        if self.objects or not (self.calls or self.tools):
            try:
                arguments = json.loads(arguments)
            except ValueError as e:
                raise ValueError(f"the arguments of a call of {name}: expected JSON: {e}") from None
        out = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return out | ({"id": call["id"]} if call.get("id") else {})

    def _place_thoughts(self, message: Message) -> None:
        """Thoughts of an earlier answer where the template looks for them."""
        thoughts = message["reasoning_content"]
        if self._blocks and message["role"] in _BLOCK_ROLES:
            message["content"] = [{"type": "thinking", "thinking": thoughts}, *message["content"]]
            del message["reasoning_content"]
        elif self._thinking:
            message["thinking"] = thoughts
            if self.channels and message.get("tool_calls"):
                del message["content"]


_BLOCK_ROLES = ("system", "assistant")


def tools_as_given(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fields of tools that a template is shown."""
    return [{"type": "function", "function": {"name": f["name"], "description": f.get("description") or "",
                                              "parameters": f.get("parameters") or {}}}
            for f in (tool["function"] for tool in tools)]  # fmt: skip


def as_text(content: Any, between: str = "\n") -> str:
    return content if isinstance(content, str) else between.join(p["text"] for p in content if p["type"] == "text")


def _stripped(content: Any) -> Any:
    if isinstance(content, str):
        return content.strip(SPACES)
    return [part | {"text": part["text"].strip(SPACES)} for part in content]


# -- templates that know of no tools -----------------------------------------------------------------------------------

_TOOLS = """You can call these tools, described by JSON schemas, one a line:
{}

To call tools, answer with nothing but this JSON, with as many calls as you need:
{{"tool_calls": [{{"name": "the tool's name", "arguments": {{"parameter": "value"}}}}]}}
Their results come in the next message. Where no tool is needed, answer in plain text."""


def _describe(messages: list[Message], tools: list[Any]) -> None:
    """Tell the model of its tools in the system message."""
    text = _TOOLS.format("\n".join(json.dumps(t["function"], ensure_ascii=False) for t in tools))
    if messages and messages[0]["role"] == "system":
        text = f"{as_text(messages[0]['content'])}\n\n{text}".lstrip()
        messages[0] = messages[0] | {"content": text}
    else:
        messages.insert(0, {"role": "system", "content": text})


def _without_calls(message: Message) -> Message:
    """A call, or a result, in the words of `_TOOLS`."""
    if message["role"] == "tool":
        result = {"tool": message.get("name"), "id": message.get("tool_call_id"), "content": as_text(message["content"])}
        text = json.dumps({"tool_response": {k: v for k, v in result.items() if v is not None}}, ensure_ascii=False)
        return {"role": "user", "content": text}
    if "tool_calls" not in message:
        return message
    calls = [call["function"] | ({"id": call["id"]} if "id" in call else {}) for call in message["tool_calls"]]
    said = [as_text(message["content"]), json.dumps({"tool_calls": calls}, ensure_ascii=False)]
    return {k: v for k, v in message.items() if k != "tool_calls"} | {"content": "\n".join(s for s in said if s)}


# -- templates that want results in another form -----------------------------------------------------------------------


def _sort_results(messages: list[Message]) -> None:
    """DeepSeek V4: the results between two answers in the order of their calls."""
    order: dict[str, int] = {}
    at = 0
    while at < len(messages):
        if messages[at]["role"] == "assistant" and messages[at].get("tool_calls"):
            order = {call.get("id", ""): i for i, call in enumerate(messages[at]["tool_calls"]) if call.get("id")}
        end = at
        while end < len(messages) and messages[end]["role"] in ("user", "tool"):
            end += 1
        places = [i for i in range(at, end) if messages[i]["role"] == "tool"]
        if order:
            results = sorted((messages[i] for i in places), key=lambda m: order.get(m.get("tool_call_id", ""), 0))
            for i, result in zip(places, results, strict=True):
                messages[i] = result
        at = max(end, at + 1)


def _with_responses(messages: list[Message]) -> list[Message]:
    """Gemma 4's first templates: results, and the answer that follows them, are part of the message with the calls."""
    out: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        if message["role"] == "assistant" and message.get("tool_calls"):
            calls, turn = message["tool_calls"], {"role": "assistant", "tool_calls": message["tool_calls"]}
            responses: list[dict[str, Any]] = []
            while at < len(messages) and messages[at]["role"] == "tool":
                responses.append(_response(messages[at], calls, len(responses)))
                at += 1
            if responses:
                turn["tool_responses"] = responses
            after = messages[at] if at < len(messages) else {"role": ""}
            if after["role"] == "assistant" and not after.get("tool_calls") and after["content"]:
                turn["content"] = after["content"]
                at += 1
            message = turn | {k: message[k] for k in ("reasoning_content",) if k in message}
        out.append(message)
    return out


def _response(message: Message, calls: list[dict[str, Any]], at: int) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except ValueError:
            pass
    name = calls[at]["function"]["name"] if at < len(calls) else message.get("tool_call_id", "")
    return {"name": name, "response": content}
