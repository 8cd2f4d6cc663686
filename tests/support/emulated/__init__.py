"""Runs the source of the CUDA kernels on the host: the same text, compiled by the host's compiler over other primitives.

What a device does not say is said here: a read or write outside of memory, threads that do not meet where they should, a result
that depends on which thread comes first, shared memory that is read before it is written, an address that is not aligned.
"""

from __future__ import annotations

from tests.support.emulated.compiling import compiler
from tests.support.emulated.driver import EmulatedDriver, EmulationError

__all__ = ["EmulatedDriver", "EmulationError", "compiler"]
