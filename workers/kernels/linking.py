"""Machine code into this process: object files that find each other's functions by name."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any

import llvmlite.binding as llvm

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

_engines: list[Any] = []
"""Loaded code lives as long as the process."""


def link(objects: Iterable[bytes], symbols: Mapping[str, str]) -> dict[str, int]:
    """Load object files.

    Arguments: the names of what others may call, each with the symbol that it has in these objects.
    Returns: the address of each. Object files that are linked later, and what is compiled later, find them by name.
    """
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    for code in objects:
        engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    addresses = {name: engine.get_function_address(symbol) for name, symbol in symbols.items()}
    for name, address in addresses.items():
        llvm.add_symbol(name, address)
    return addresses


def never_called(names: Iterable[str]) -> None:
    """Let compiled code mention these names: whoever calls one ends the process."""
    address = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    for name in names:
        llvm.add_symbol(name, address)
