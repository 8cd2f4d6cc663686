"""The device `cuda-emulated`: the CUDA device over kernels that run on the host. As a program this is a worker with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests.support.emulated import EmulatedDriver
from workers.devices import DEVICES
from workers.devices.cuda.device import CUDADevice

NAME = "cuda-emulated"


def opened(n_threads: int, memory_bytes: int, cpus: Sequence[int]) -> CUDADevice:
    return CUDADevice(NAME, EmulatedDriver(memory_bytes), memory_bytes)


if __name__ == "__main__":
    from workers.__main__ import main

    DEVICES[NAME] = opened
    sys.exit(main())
