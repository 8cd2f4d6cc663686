"""Kernels that the team calls by name: each is compiled by itself, several at once, and linked when a worker starts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numba import types


@dataclass(frozen=True, slots=True)
class Export:
    """A function with its signature, as the world outside sees it."""

    dispatcher: Any
    returns: Any
    arguments: tuple[Any, ...]


EXPORTS: dict[str, Export] = {}
"""By the name under which they are linked."""


def exported(dispatcher: Any, floats: Sequence[int] = (), truth: bool = False) -> Any:
    """What to call instead of a compiled function of another module: int64 but for the arguments that are float32.

    `truth`: it returns whether it could be done.
    """
    function = dispatcher.py_func
    n = len(inspect.signature(function).parameters)
    arguments = tuple(types.float32 if i in floats else types.int64 for i in range(n))
    returns = types.int64 if truth else types.void
    name = f"ggmq_{function.__module__.rsplit('.', 1)[-1]}_{function.__name__}"
    EXPORTS[name] = Export(dispatcher, returns, arguments)
    return types.ExternalFunction(name, returns(*arguments))
