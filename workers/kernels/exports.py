"""Kernels that the team calls by name: each is compiled by itself, several at once, and linked when a worker starts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from numba import types

from workers.kernels.records import FORMS, TEAM_ARGUMENTS, Step, kinds


@dataclass(frozen=True, slots=True)
class Export:
    """A function with its signature, as the world outside sees it."""

    dispatcher: Any
    returns: Any
    arguments: tuple[Any, ...]

    @property
    def parameters(self) -> list[str]:
        return list(inspect.signature(self.dispatcher.py_func).parameters)


EXPORTS: dict[str, Export] = {}
"""By the name under which they are linked."""


def _add(dispatcher: Any, returns: Any, arguments: tuple[Any, ...]) -> str:
    function = dispatcher.py_func
    name = f"ggmq_{function.__module__.rsplit('.', 1)[-1]}_{function.__name__}"
    EXPORTS[name] = Export(dispatcher, returns, arguments)
    return name


def exported(dispatcher: Any, floats: Sequence[str] = ()) -> Any:
    """What to call instead of a compiled function of another module: of int64, but for the parameters that are float32."""
    names = inspect.signature(dispatcher.py_func).parameters
    arguments = tuple(types.float32 if name in floats else types.int64 for name in names)
    return types.ExternalFunction(_add(dispatcher, types.void, arguments), types.void(*arguments))


def exported_step(step: type[Step]) -> str:
    """The kernel of a step. Returns: its name. Errors: TypeError unless its parameters are the step's fields."""
    module, function = step.kernel.split(".")
    dispatcher = getattr(import_module(f"workers.kernels.{module}"), function)
    fields = kinds(step)
    parameters = list(inspect.signature(dispatcher.py_func).parameters)
    if fields.keys() - {"node"} != set(parameters) - set(TEAM_ARGUMENTS):
        raise TypeError(f"{step.kernel}: expected the parameters {list(fields)}, got {parameters}")
    arguments = tuple(types.float32 if FORMS[fields.get(p, "Count")][0] == "f" else types.int64 for p in parameters)
    return _add(dispatcher, types.int64 if "node" in fields else types.void, arguments)
