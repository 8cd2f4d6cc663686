"""Reads a cluster file: YAML, then types; an error names file:line and the path of the key that is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import yaml

from config.schema import ClusterFile
from protocol.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 16
MAX_SCALAR_CHARS = 8192


class _Refused(Exception):
    """A line of the file, and what is wrong with it."""

    def __init__(self, line: int, problem: str) -> None:
        self.line, self.problem = line, problem


class BoundedLoader(yaml.SafeLoader):
    """Composes a document while it is small and flat: what it refuses is refused before anything is made of it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._n_nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._n_nodes += 1
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            self._refuse(event, f"anchors and aliases are not taken, got {sign}{anchor:.40}; write the value out")
        if self._n_nodes > MAX_NODES:
            self._refuse(event, f"a cluster file has at most {MAX_NODES} keys and values")
        if self._depth >= MAX_DEPTH:
            self._refuse(event, f"a cluster file nests at most {MAX_DEPTH} deep")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR_CHARS:
            self._refuse(event, f"a value has at most {MAX_SCALAR_CHARS} characters, got {len(event.value)}")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, event: Any, problem: str) -> NoReturn:
        raise _Refused(event.start_mark.line + 1, problem)


def load_cluster(path: Path) -> ClusterFile:
    """Errors: ConfigError, `file:line: $.path: expected ..., got ...`."""
    try:
        with open(path, "rb") as f:
            raw = f.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: a cluster file has at most {MAX_FILE_BYTES} bytes, this one has more")
    try:
        text = raw.decode("utf-8")
        root = yaml.compose(text, BoundedLoader)
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: expected UTF-8: {e}") from None
    except _Refused as e:
        raise ConfigError(f"{path}:{e.line}: {e.problem}") from None
    except yaml.reader.ReaderError as e:
        line, code = text.count("\n", 0, e.position) + 1, ord(text[e.position])
        raise ConfigError(f"{path}:{line}: not YAML: the character U+{code:04X} may not be in it") from None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{where}: not YAML: {e.problem or e.context}") from None
    if root is None:
        raise ConfigError(f"{path}:1: the file is empty; expected at least the key `workers`")
    lines: dict[str, int] = {}
    value = _plain(root, "$", lines, path)
    try:
        cluster = msgspec.convert(value, ClusterFile)
    except msgspec.ValidationError as e:
        raise ConfigError(_located(str(e), lines, path)) from None
    _check(cluster, lines, path)
    return cluster


def _plain(node: yaml.Node, at: str, lines: dict[str, int], path: Path) -> Any:
    """The value of a node, and the line of each path in it. Tags beyond YAML's own are not taken."""
    line = node.start_mark.line + 1
    lines.setdefault(at, line)
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{path}:{line}: {at}: expected a key that is a word, got a {key_node.id}")
            key = key_node.value
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(f"{path}:{line}: {at}.{key}: merge keys are not taken; write the keys out")
            if key in out:
                raise ConfigError(f"{path}:{line}: {at}.{key}: the key comes twice")
            lines[f"{at}.{key}"] = line
            out[key] = _plain(value_node, f"{at}.{key}", lines, path)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{at}[{i}]", lines, path) for i, item in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except yaml.MarkedYAMLError as e:
        raise ConfigError(f"{path}:{line}: {at}: {e.problem or e.context}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError) as e:  # as the constructors raise
        kind = node.tag.rpartition(":")[2]
        raise ConfigError(f"{path}:{line}: {at}: expected a value of YAML's type {kind}: {e}") from None


def _located(message: str, lines: dict[str, int], path: Path) -> str:
    match = re.search(r" - at `(?:key in )?(\$[^`]*)`$", message)
    at = match[1] if match else "$"
    text = message[: match.start()] if match else message
    unknown = re.search(r"unknown field `([^`]+)`", text)
    if unknown and f"{at}.{unknown[1]}" in lines:
        at = f"{at}.{unknown[1]}"
    # msgspec leaves list indices out as [...]; the first that fits is taken
    pattern = re.compile(re.escape(at).replace(re.escape("[...]"), r"\[\d+\]") + "$")
    line = next((n for p, n in lines.items() if pattern.match(p)), lines.get("$", 1))
    return f"{path}:{line}: {at}: {text}"


def _check(cluster: ClusterFile, lines: dict[str, int], path: Path) -> None:
    seen: dict[str, int] = {}
    for i, w in enumerate(cluster.workers):
        at = f"$.workers[{i}]"
        if w.name in seen:
            line = lines.get(at + ".name", 1)
            raise ConfigError(f"{path}:{line}: {at}.name: {w.name!r} is also $.workers[{seen[w.name]}]")
        seen[w.name] = i
        if w.launcher == "local" and w.host not in ("localhost", "127.0.0.1"):
            raise ConfigError(f"{path}:{lines.get(at + '.host', 1)}: {at}.host: launcher local starts workers on this "
                              f"host, got {w.host!r}; use launcher: ssh")  # fmt: skip
    for key, endpoint in (("listen", cluster.broker.listen), ("advertise", cluster.broker.advertise)):
        if endpoint and int(endpoint.rsplit(":", 1)[1]) > 65535:
            line = lines.get(f"$.broker.{key}", 1)
            raise ConfigError(f"{path}:{line}: $.broker.{key}: expected a port of 1 to 65535, or 0 for any that is free")
    split = cluster.split.tensor_split
    n = sum(len(w.devices) for w in cluster.workers)
    if split and (len(split) > n or sum(split) <= 0):
        raise ConfigError(f"{path}:{lines.get('$.split.tensor_split', 1)}: $.split.tensor_split: expected up to {n} "
                          "shares, not all 0")  # fmt: skip
