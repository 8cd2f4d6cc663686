"""What there is of CuPy, of an NVIDIA driver and of GPUs, and why a device cannot be opened."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec
from typing import NamedTuple

OLDEST = (8, 0)
"""Compute capability that the kernels need: matrix instructions of float16 and bfloat16 over 16 values."""
OLDEST_CUPY = 13
NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE of the driver API."""
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


class Driver(NamedTuple):
    """What the driver says.

    Attributes:
        cuda: the newest CUDA that it runs, as 12040; 0: no driver is there.
        capabilities: compute capability of each GPU that this process may use; CUDA_VISIBLE_DEVICES chooses them.
        trouble: why it could not be asked; empty when it answered.
    """

    cuda: int
    capabilities: tuple[tuple[int, int], ...] = ()
    trouble: str = ""


class CuPy(NamedTuple):
    """What CuPy says of itself.

    Attributes:
        version: as 14.2.0; empty: it is not installed.
        cuda: what it was made for, as 12090; 0: for no CUDA.
        trouble: why it could not be imported.
    """

    version: str
    cuda: int = 0
    trouble: str = ""


def ask_driver() -> Driver:
    """Through the driver API: it takes some milliseconds and needs no CuPy."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        return Driver(0, (), str(e))
    version, count, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    code = cuda.cuInit(0)
    if code not in (0, NO_DEVICE):
        said = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(said))
        return Driver(version.value, (), f"{(said.value or b'').decode('utf-8', 'replace')} (cuInit: {code})")
    if code == 0:
        cuda.cuDeviceGetCount(ctypes.byref(count))
    capabilities = []
    for i in range(count.value):
        device, found = ctypes.c_int(), []
        cuda.cuDeviceGet(ctypes.byref(device), i)
        for which in (MAJOR, MINOR):
            cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
            found.append(value.value)
        capabilities.append((found[0], found[1]))
    return Driver(version.value, tuple(capabilities))


def ask_cupy() -> CuPy:
    """Imports it, which takes about a second."""
    try:
        import cupy
    except ModuleNotFoundError as e:
        return CuPy("", 0, "" if e.name == "cupy" else str(e))
    except Exception as e:  # whatever its libraries find missing
        return CuPy("", 0, str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__)
    runtime = cupy.cuda.runtime
    return CuPy(str(cupy.__version__), 0 if runtime.is_hip else int(runtime.runtimeGetVersion()))


def device_names() -> list[str]:
    """GPUs that kernels run on, as `CUDA0`; none where CuPy or the driver is missing."""
    if find_spec("cupy") is None:
        return []
    return [f"CUDA{i}" for i, capability in enumerate(ask_driver().capabilities) if capability >= OLDEST]


def _release(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


INSTALL = ("`nvidia-smi` shows which CUDA the driver runs: for 12.x `pip install 'ggmq[cuda12]'`, "
           "for 13.x `pip install 'ggmq[cuda13]'`")  # fmt: skip
OTHER = "after `pip uninstall` of the one that is there"
NO_GPU = "Without a GPU use --device CPU"


def reason(name: str, cupy: CuPy, driver: Driver) -> str:
    """Why device `name` (as CUDA0) cannot be opened, and what to do; empty when it can be."""
    index = int(name[4:])
    if not cupy.version and not cupy.trouble:
        return f"{name}: CuPy is not installed; {INSTALL}. {NO_GPU}"
    if not cupy.version:
        return f"{name}: CuPy is installed and cannot be imported: {cupy.trouble}; {INSTALL}, {OTHER}"
    if int(cupy.version.split(".")[0]) < OLDEST_CUPY:
        return f"{name}: expected CuPy {OLDEST_CUPY} or newer, got {cupy.version}; {INSTALL}"
    if not cupy.cuda:
        return f"{name}: expected CuPy for CUDA, got one for ROCm; {INSTALL}, {OTHER}"
    if not driver.cuda:
        return (f"{name}: no NVIDIA driver answers: {driver.trouble}; expected one of 525 or newer, and in a container "
                f"the GPU passed on (`docker run --gpus all`). {NO_GPU}")  # fmt: skip
    if driver.cuda // 1000 < cupy.cuda // 1000:
        theirs, ours = cupy.cuda // 1000, driver.cuda // 1000
        other = f"`pip uninstall cupy-cuda{theirs}x` and `pip install 'ggmq[cuda{ours}]'`, or " if ours >= 12 else ""
        return (f"{name}: CuPy {cupy.version} is made for CUDA {theirs}, and the driver runs CUDA {_release(driver.cuda)} "
                f"at most; {other}install a newer driver")  # fmt: skip
    if driver.trouble:
        return f"{name}: the NVIDIA driver does not start: {driver.trouble}; `nvidia-smi` should list the GPU"
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    limits = f"; CUDA_VISIBLE_DEVICES is {chosen!r}" if chosen is not None else ""
    if not driver.capabilities:
        return f"{name}: the driver shows no GPU{limits}; `nvidia-smi` lists those of this host. {NO_GPU}"
    if index >= len(driver.capabilities):
        last = len(driver.capabilities) - 1
        there = "CUDA0 alone" if not last else f"CUDA0 to CUDA{last}"
        return f"{name}: this host shows {there}{limits}"
    capability = driver.capabilities[index]
    if capability < OLDEST:
        return (f"{name}: expected a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer (Ampere), "
                f"got {capability[0]}.{capability[1]}; use another, or --device CPU")  # fmt: skip
    return ""
