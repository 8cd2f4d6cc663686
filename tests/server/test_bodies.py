"""Bodies with one thing wrong, wherever in them: an answer or a refusal in the API's shape, never an error of the server."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.serving import Running

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SAID = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"}], "name": "n"},
        {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "x"}, {"role": "user", "content": "Once"}]  # fmt: skip
SAMPLING = {"model": "m", "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.1,
            "repeat_last_n": 8, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"5": 1.0}, "seed": 1,
            "stop": ["zz"], "ignore_eos": False, "n": 1, "stream": False,
            "stream_options": {"include_usage": True}}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 3}}, "required": ["a"]}
BLOCKS = [{"role": "user", "content": [{"type": "text", "text": "t"}]},
          {"role": "assistant", "content": [{"type": "thinking", "thinking": "h", "signature": ""},
                                            {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
          {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [
              {"type": "text", "text": "r"}]}]}]  # fmt: skip
ITEMS = [{"role": "user", "content": [{"type": "input_text", "text": "t"}]},
         {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "h"}]},
         {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
         {"type": "function_call_output", "call_id": "c", "output": "r"}]  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**SAMPLING, "messages": SAID, "max_tokens": 2, "tools": [TOOL], "tool_choice": "none",
                             "logprobs": True, "top_logprobs": 2, "response_format": {"type": "json_schema", "json_schema": {
                                 "name": "x", "schema": SCHEMA}}, "chat_template_kwargs": {"enable_thinking": False},
                             "reasoning_effort": "low", "parallel_tool_calls": True},
    "/v1/completions": {**SAMPLING, "prompt": ["a", [5, 6]], "max_tokens": 2, "echo": False, "logprobs": 1,
                        "grammar": 'root ::= "a"+'},
    "/v1/responses": {**SAMPLING, "input": ITEMS, "max_output_tokens": 2, "instructions": "i", "tools": [
        {"type": "function", "name": "f", "parameters": {"type": "object"}}], "tool_choice": "auto", "text": {"format": {
            "type": "json_schema", "name": "x", "schema": SCHEMA}}, "reasoning": {"effort": "low"}, "metadata": {"a": "b"}},
    "/v1/messages": {**SAMPLING, "messages": BLOCKS, "max_tokens": 2, "system": [{"type": "text", "text": "s"}], "tools": [
        {"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "auto"}, "thinking": {"type": "enabled",
        "budget_tokens": 1024}, "stop_sequences": ["zz"]},
    "/v1/messages/count_tokens": {"model": "m", "messages": BLOCKS},
    "/v1/embeddings": {"model": "m", "input": ["a"], "encoding_format": "float"},
    "/tokenize": {"content": "a", "add_special": True, "with_pieces": True},
    "/detokenize": {"tokens": [5, 6]},
    "/apply-template": {"messages": SAID, "tools": [TOOL]},
}  # fmt: skip
ODD: tuple[Any, ...] = (None, True, -1, 0, 1.5, 1e300, 10**30, "", "x", "\0", [], {}, [[]], [None], {"type": "x"},
                        [[1, "a"]], "\ufffd\u202e" * 50, {"a": {"a": {}}}, [0] * 300, {"$ref": "#"})  # fmt: skip
N_TRIES = 60


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a body."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, v in inner:
        yield from places(v, (*path, key))


def changed(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    body = copy.deepcopy(body)
    at = body
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return body


@pytest.mark.parametrize("path", BODIES)
def test_one_thing_is_wrong(server: Running, path: str) -> None:
    rng = random.Random(path)
    body = BODIES[path]
    all_places = list(places(body))
    with httpx.Client(base_url=server.url, timeout=60) as client:
        good = client.post(path, json=body)
        assert good.status_code in (200, 501), good.text
        for _ in range(N_TRIES):
            odd = changed(body, rng.choice(all_places), rng.choice(ODD))
            r = client.post(path, json=odd)
            assert r.status_code in (200, 400, 404, 501), (odd, r.text)
            if r.status_code != 200 and "text/event-stream" not in r.headers["content-type"]:
                error = r.json()["error"]
                assert error["message"] and error["type"], odd
        assert client.get("/health").status_code == 200
    assert all(s["state"] == "idle" for s in server.get("/slots").json())
