"""Every kernel compiles for every architecture that we name, and takes no more of a GPU than it may. Needs no GPU."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import pytest

from config.cores import n_cores
from tests.support.recording import kernels, sources
from workers.devices.cuda.compiling import Nvrtc
from workers.kernels.cuda.launches import LAUNCHES
from workers.kernels.cuda.sources import OPTIONS, Kernel

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
SHARED_BYTES = 48 << 10
"""Static shared memory that a block may have."""
SPILL_NOTHING = ("products",)
"""Sources whose kernels keep all that they work on in registers: what is spilled goes through the memory they wait for."""
TOLD = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
                  r"loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?", re.DOTALL)  # fmt: skip

pytestmark = pytest.mark.skipif(not find_spec("nvidia") or not find_spec("nvidia.cuda_nvrtc"),
                                reason="no NVRTC (pip install nvidia-cuda-nvrtc-cu12)")  # fmt: skip


def compiled(job: tuple[str, str, str]) -> str:
    """What the compiler says of a source. Runs in a process of its own: NVRTC compiles one at a time in each."""
    text, name, architecture = job
    return Nvrtc(12).compile(text, name, architecture, (*OPTIONS, "--ptxas-options=-v")).log


def title(kernel: Kernel) -> str:
    return " ".join((kernel.file, *(f"{k}={v}" for k, v in kernel.macros)))


@pytest.fixture(scope="module")
def pool() -> ProcessPoolExecutor:
    with ProcessPoolExecutor(n_cores(), get_context("spawn")) as pool:
        yield pool


def test_every_kernel_is_asked_for_by_some_graph() -> None:
    asked = {(k.file, k.function) for k in kernels()}
    ours = [r for r in LAUNCHES if r.__module__.startswith("workers.")]  # other tests declare their own
    missing = {f"{r.file}.{r.function}" for r in ours if (r.file, r.function) not in asked}
    assert not missing
    assert all((k.file, k.function) == (record.file, record.function) for k, record in kernels().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(architecture: str, pool: ProcessPoolExecutor) -> None:
    of = list(sources())
    assert of
    wrong = []
    for kernel, log in zip(of, pool.map(compiled, [(k.text(), title(k), architecture) for k in of]), strict=True):
        told = {m[1]: [int(n or 0) for n in m.groups()[1:]] for m in TOLD.finditer(log)}
        assert {k.function for k in kernels() if (k.file, k.macros) == (kernel.file, kernel.macros)} <= told.keys(), log
        for function, (stack, stores, loads, registers, shared) in told.items():
            what = f"{title(kernel)}: {function}: {registers} registers, {shared} bytes of shared memory, {stack} of stack"
            if shared > SHARED_BYTES or (kernel.file in SPILL_NOTHING and stack + stores + loads):
                wrong.append(f"{what}, {stores} and {loads} spilled")
    assert wrong == []
