"""Launches whose kernels may begin before the kernel in front of them has ended (programmatic dependent launch).

Each kernel of ours says with `previous_done` from where on it needs what came before; what it does until then, as to fetch
weights, takes place while the kernel in front is still busy. CuPy's launches cannot ask for that.
Source: the CUDA driver API (cuLaunchKernelEx, CUlaunchConfig, CUlaunchAttribute).
"""

from __future__ import annotations

import ctypes
from typing import Any

from workers.devices.cuda.driver import Grid

OLDEST_ARCHITECTURE = 90
"""Compute capability that knows it, times ten."""
OLDEST_DRIVER = 12030
"""The first whose graphs keep it."""
SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class Config(ctypes.Structure):
    _fields_ = [*((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
                ("shared_bytes", ctypes.c_uint), ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)),
                ("n_attributes", ctypes.c_uint)]  # fmt: skip


class Launcher:
    """Threads: the driver's. `call`: cuLaunchKernelEx, instead of the library's own."""

    def __init__(self, call: Any = None) -> None:
        self._call = call or ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        self._attribute = Attribute(SERIALIZATION, 0, 1)

    def launch(self, function: int, grid: Grid, stream: int, parameters: Any) -> int:
        """Returns: 0, or an error of the driver API."""
        config = Config(grid.x, grid.y, 1, grid.threads, 1, 1, grid.shared, stream, ctypes.pointer(self._attribute), 1)
        return int(self._call(ctypes.byref(config), ctypes.c_void_p(function), parameters, None))


def launcher(architecture: str, driver_version: int) -> Launcher | None:
    """None where the GPU or the driver does not know such launches."""
    if int(architecture.removeprefix("sm_")) < OLDEST_ARCHITECTURE or driver_version < OLDEST_DRIVER:
        return None
    return Launcher()
