"""Models over all the devices you have: `load`, `connect`, `local_cluster`; docs/python.md is their manual.

Names are imported when they are first used, so that `import ggmq` costs nothing. Besides them this package is the main host:
GGUF files, tokenizers, architectures, sampling, the token loop, the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ggmq.version import __version__ as __version__

if TYPE_CHECKING:
    from ggmq.answers import Content, Reasoning
    from ggmq.answers import ToolCall as ToolCallPiece
    from ggmq.api.answers import AsyncStream, ChatResult, Result, Stream, ToolCall
    from ggmq.api.clusters import Cluster, Device, Model, connect, load, local_cluster
    from ggmq.api.graphs import Graph
    from ggmq.api.options import BusOptions, ChatOptions, GenerateOptions, LoadOptions, ModelOptions
    from ggmq.service import Token, Usage
    from protocol.dtypes import GGMLType
    from protocol.errors import (
        Cancelled,
        ConfigError,
        DeviceError,
        FormatError,
        GgmqError,
        GraphError,
        InvalidValue,
        OutOfMemory,
        Overloaded,
        ProtocolError,
        Unavailable,
        WorkerLost,
    )

__all__ = [
    "AsyncStream", "BusOptions", "Cancelled", "ChatOptions", "ChatResult", "Cluster", "ConfigError", "Content", "Device",
    "DeviceError", "FormatError", "GGMLType", "GenerateOptions", "GgmqError", "Graph", "GraphError", "InvalidValue",
    "LoadOptions", "Model", "ModelOptions", "OutOfMemory", "Overloaded", "ProtocolError", "Reasoning", "Result", "Stream",
    "Token", "ToolCall", "ToolCallPiece", "Unavailable", "Usage", "WorkerLost", "connect", "load", "local_cluster",
]  # fmt: skip

_ELSEWHERE = {
    "Content": "ggmq.answers", "Reasoning": "ggmq.answers", "AsyncStream": "ggmq.api.answers",
    "ChatResult": "ggmq.api.answers", "Result": "ggmq.api.answers", "Stream": "ggmq.api.answers",
    "ToolCall": "ggmq.api.answers", "Cluster": "ggmq.api.clusters", "Device": "ggmq.api.clusters",
    "connect": "ggmq.api.clusters", "load": "ggmq.api.clusters", "local_cluster": "ggmq.api.clusters",
    "Graph": "ggmq.api.graphs", "Model": "ggmq.api.clusters", "BusOptions": "ggmq.api.options",
    "ChatOptions": "ggmq.api.options", "GenerateOptions": "ggmq.api.options", "LoadOptions": "ggmq.api.options",
    "ModelOptions": "ggmq.api.options", "Token": "ggmq.service", "Usage": "ggmq.service", "GGMLType": "protocol.dtypes",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: Any
    if name == "ToolCallPiece":
        value = import_module("ggmq.answers").ToolCall
    else:
        value = getattr(import_module(_ELSEWHERE.get(name, "protocol.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
