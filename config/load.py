"""Reads a cluster file: YAML, then types; an error names file:line and the path of the key that is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import yaml

from config.schema import ClusterFile
from protocol.errors import ConfigError

MAX_FILE_BYTES = 1 << 20


def load_cluster(path: Path) -> ClusterFile:
    """Errors: ConfigError, `file:line: $.path: expected ..., got ...`."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror or e}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: a cluster file has at most {MAX_FILE_BYTES} bytes, got {len(raw)}")
    try:
        text = raw.decode("utf-8")
        root = yaml.compose(text, yaml.SafeLoader)
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: expected UTF-8: {e}") from None
    except (yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{where}: not YAML: {getattr(e, 'problem', None) or type(e).__name__}") from None
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
    """The value of a node, and the line of each path in it. Anchors and tags beyond YAML's own are not taken."""
    line = node.start_mark.line + 1
    lines.setdefault(at, line)
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in out:
                raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: {at}.{key}: the key comes twice")
            lines[f"{at}.{key}"] = key_node.start_mark.line + 1
            out[key] = _plain(value_node, f"{at}.{key}", lines, path)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{at}[{i}]", lines, path) for i, item in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{path}:{line}: {at}: {e}") from None


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
    port = int(cluster.broker.listen.rsplit(":", 1)[1])
    if not 0 < port < 65536:
        raise ConfigError(f"{path}:{lines.get('$.broker.listen', 1)}: $.broker.listen: expected a port of 1 to 65535")
    split = cluster.split.tensor_split
    n = sum(len(w.devices) for w in cluster.workers)
    if split and (len(split) > n or sum(split) <= 0):
        raise ConfigError(f"{path}:{lines.get('$.split.tensor_split', 1)}: $.split.tensor_split: expected up to {n} "
                          "shares, not all 0")  # fmt: skip
