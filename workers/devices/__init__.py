"""Devices by name: `CPU`, `reference`, `CUDA0`. A device is one file or folder here plus its kernels.

A device's module is imported only when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from protocol.errors import ConfigError
from workers.devices.base import Device


def accelerators() -> list[str]:
    """Names of the accelerators of this host; respects CUDA_VISIBLE_DEVICES through the driver."""
    from workers.devices.cuda import device_names

    return device_names()


def _cpu(n_threads: int, memory_bytes: int, cpus: Sequence[int]) -> Device[Any]:
    from workers.devices.cpu.device import CPUDevice

    return CPUDevice(n_threads, memory_bytes, cpus)


def _reference(n_threads: int, memory_bytes: int, cpus: Sequence[int]) -> Device[Any]:
    from workers.devices.reference import ReferenceDevice

    return ReferenceDevice(memory_bytes)


DEVICES: dict[str, Callable[[int, int, Sequence[int]], Device[Any]]] = {"cpu": _cpu, "reference": _reference}
"""By the name in lower case, what opens it: with so many threads, at most so many bytes, on these CPUs."""


def open_device(name: str, n_threads: int, memory_bytes: int = 0, cpus: Sequence[int] = ()) -> Device[Any]:
    """The device of this name. `cpus`: where its threads stay, one each; it has no more threads than these.

    Units: `memory_bytes` caps what it hands out; 0 leaves it to the host.
    Errors: ConfigError for a name that no device has, DeviceError when what it needs is missing, naming it.
    """
    opener = DEVICES.get(name.lower())
    if opener is not None:
        return opener(n_threads, memory_bytes, cpus)
    if re.fullmatch(r"CUDA\d+", name.upper()):
        from workers.devices.cuda import open_cuda

        return open_cuda(name.upper(), memory_bytes)
    raise ConfigError(f"--device {name}: expected CPU, reference or CUDA0, CUDA1, ...; run `worker --device` to list")
