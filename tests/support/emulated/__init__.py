"""Runs the source of the CUDA kernels on the host: the same text, compiled by the host's compiler over other primitives.

What a device does not say is said here: reads and writes outside of memory, threads that do not meet where they should,
results that depend on which thread comes first, shared memory that is read before it is written, misaligned addresses.
"""

from __future__ import annotations

from tests.support.emulated.compiling import compiler
from tests.support.emulated.driver import EmulatedDriver, EmulationError

__all__ = ["EmulatedDriver", "EmulationError", "compiler"]
