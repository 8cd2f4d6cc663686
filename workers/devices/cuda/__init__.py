"""CUDA devices: which there are, and how one is opened. CuPy is imported only where a device is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.errors import DeviceError
from workers.devices.cuda.finding import ask_cupy, ask_driver, device_names, reason

if TYPE_CHECKING:
    from workers.devices.cuda.device import CUDADevice

__all__ = ["device_names", "open_cuda"]


def open_cuda(name: str, memory_bytes: int = 0) -> CUDADevice:
    """The GPU `name`, as CUDA0. Errors: DeviceError, which says what is missing and how it comes."""
    driver = ask_driver()
    why = reason(name, ask_cupy(), driver)
    if why:
        raise DeviceError(why)
    from workers.devices.cuda.device import CUDADevice
    from workers.devices.cuda.runtime import CupyDriver

    return CUDADevice(name, CupyDriver(name), memory_bytes)
