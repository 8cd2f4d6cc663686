"""Calls that are written as code: they are read when they are whole."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ggmq.answers.calls import Calls, is_name
from ggmq.answers.stream import Reading

MAX_CHARS = 1 << 16
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


@dataclass(frozen=True)
class PythonCalls:
    """f(x="a", y=1), in a list or a line each."""

    openers: tuple[str, ...]
    close: tuple[str, ...]
    noise: tuple[str, ...] = ()

    def read(self, calls: Calls, opener: str) -> Reading[bool]:
        text, _ = yield from calls.stream.until(*self.close, limit=MAX_CHARS)
        found = _parsed(text.strip(), calls.tools)
        for name, arguments in found:
            calls.begin(name)
            calls.argue(arguments)
        return bool(found)


def _parsed(text: str, tools: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and arguments; nothing when any of it is no call."""
    if len(text) > MAX_CHARS:
        return []
    try:
        nodes: list[ast.AST] = []
        for statement in ast.parse(text).body:
            value = getattr(statement, "value", None)
            nodes += value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value or statement]
        return [_call(node, tools) for node in nodes]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _call(node: ast.AST, tools: Mapping[str, Any]) -> tuple[str, str]:
    if not isinstance(node, ast.Call):
        raise ValueError("no call")
    name = ast.unparse(node.func)
    if name == "print" and len(node.args) == 1 and "print" not in tools:
        return _call(node.args[0], tools)
    if not is_name(name):
        raise ValueError("no name")
    schema = tools.get(name)
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    known = list(properties) if isinstance(properties, Mapping) else []
    if len(node.args) > len(known):
        raise ValueError("arguments without names")
    arguments = {key: _value(arg) for key, arg in zip(known, node.args, strict=False)}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("no name")
        arguments[keyword.arg] = _value(keyword.value)
    return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)


def _value(node: ast.AST) -> Any:
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(e) for e in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_value(k)): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    value = ast.literal_eval(node)
    if isinstance(value, (str, int, float)):
        return value
    if value is None:
        return None
    raise ValueError("no JSON")


_QUOTE = '<|"|>'
_BARE_KEY = re.compile(r"([{,]\s*)([\w.$-]+)(\s*:)")


@dataclass(frozen=True)
class GemmaCalls:
    """name{key:<|"|>text<|"|>,other:1}: JSON but for quotes of its own and keys without any."""

    openers: tuple[str, ...]
    close: tuple[str, ...]
    noise: tuple[str, ...] = ()

    def read(self, calls: Calls, opener: str) -> Reading[bool]:
        stream = calls.stream
        name, end = yield from stream.until("{", limit=512)
        if not end or not is_name(name.strip()):
            return False
        text, _ = yield from stream.until(*self.close, limit=MAX_CHARS)
        parts = ("{" + text).split(_QUOTE)
        parts = [json.dumps(p, ensure_ascii=False) if i % 2 else _BARE_KEY.sub(r'\1"\2"\3', p) for i, p in enumerate(parts)]
        try:
            arguments = json.dumps(json.loads("".join(parts)), ensure_ascii=False)
        except (ValueError, RecursionError):
            return False
        calls.begin(name.strip())
        calls.argue(arguments)
        return True
