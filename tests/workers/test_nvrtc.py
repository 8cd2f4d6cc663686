"""Kernels compile for the architectures that we name, and take no more of a GPU than they may. Needs no GPU.

The tests compile sources with the smallest tiles for one of them each, and those without a format for all. `python -m
tests.workers.test_nvrtc` compiles every source for every architecture, and prints the registers, shared memory and stack
of each kernel.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import pytest

from config.cores import n_cores
from tests.support.recording import kernels, sources
from workers.devices.cuda.compiling import Nvrtc
from workers.kernels.cuda.sources import OPTIONS, Kernel

ARCHITECTURES = ("sm_90", "sm_80", "sm_86", "sm_89", "sm_100")
SHARED_BYTES = 48 << 10
"""Static shared memory that a block may have."""
SPILL_LITTLE, SPILLED_BYTES = ("products",), 128
"""Sources whose kernels of the smallest tiles keep all but some words in registers: what is spilled goes through memory."""
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


def some(architecture: str) -> list[Kernel]:
    """The sources that are compiled for an architecture here: its share of those with the smallest tiles, and all without a
    format."""
    of = [k for k in sources() if dict(k.macros).get("MT", "1") == "1"]
    share = ARCHITECTURES.index(architecture)
    return [k for i, k in enumerate(of) if i % len(ARCHITECTURES) == share or "FORMAT" not in dict(k.macros)]


def outcomes(of: Sequence[Kernel], architecture: str, pool: ProcessPoolExecutor) -> Iterator[tuple[str, bool]]:
    """What each kernel takes, in words, and whether it may."""
    for kernel, log in zip(of, pool.map(compiled, [(k.text(), title(k), architecture) for k in of]), strict=True):
        told = {m[1]: [int(n or 0) for n in m.groups()[1:]] for m in TOLD.finditer(log)}
        assert {k.function for k in kernels() if (k.file, k.macros) == (kernel.file, kernel.macros)} <= told.keys(), log
        macros = dict(kernel.macros)
        for function, (stack, stores, loads, registers, shared) in told.items():
            spilled = stack + stores + loads if kernel.file in SPILL_LITTLE and macros.get("MT") == "1" else 0
            words = (f"{architecture} {title(kernel)} {function}: {registers} registers, {shared} bytes of shared memory, "
                     f"{stack} of stack, {stores} and {loads} spilled")  # fmt: skip
            yield words, shared <= SHARED_BYTES and spilled <= SPILLED_BYTES


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(n_cores(), get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile(architecture: str, pool: ProcessPoolExecutor) -> None:
    of = some(architecture)
    assert of
    assert [words for words, good in outcomes(of, architecture, pool) if not good] == []


def main() -> int:
    """Returns: how many kernels take more than they may."""
    n_bad = 0
    with ProcessPoolExecutor(n_cores(), get_context("spawn")) as pool:
        for architecture in ARCHITECTURES:
            for words, good in outcomes(list(sources()), architecture, pool):
                print(words + ("" if good else "  TOO MUCH"), flush=True)
                n_bad += not good
    return n_bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
