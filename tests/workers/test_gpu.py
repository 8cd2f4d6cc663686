"""A real GPU against the CPU and the reference: `pytest -m cuda` runs these and the suite of ops over it, and nothing else.

Everything about the device that needs no GPU is tested elsewhere, over kernels that run on the host.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench import cuda
from ggmq.cluster import Client, LocalBus
from ggmq.gguf import GGUF
from tests.support import gpu
from tests.support.fixtures import BUNDLED, ROOT
from tests.support.loaded import loaded
from tests.support.processes import GGMQ

pytestmark = pytest.mark.cuda
PROMPT = [1, 403, 407, 261, 378]
N_TOKENS = 60


@contextlib.contextmanager
def bus_of(*devices: str) -> Iterator[Client]:
    """A client of a bus of its own, with a worker for each of these devices, in order."""
    bus = LocalBus()
    try:
        for device in devices:
            bus.spawn(device, 1)
        yield bus.start()
    finally:
        bus.close()


def greedy(client: Client, order: list[str], split: list[float] | None = None) -> list[int]:
    """What the bundled model makes of PROMPT."""
    model = loaded(client, GGUF(BUNDLED), 256, split, order)
    made = [model.greedy(PROMPT, 0)]
    while len(made) < N_TOKENS:
        made.append(model.greedy(made[-1:], len(PROMPT) + len(made) - 1))
    model.free()
    return made


@pytest.fixture(scope="module")
def alone() -> list[int]:
    with bus_of("CPU") as client:
        return greedy(client, ["local0"])


def test_the_bundled_model_says_the_same_on_both() -> None:
    texts = []
    for device in ("CPU", gpu.NAME):
        command = [*GGMQ, "run", "-p", "Once upon a time", "-n", "100", "--temp", "0", "-dev", device]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1] and len(texts[0]) > 100


def test_layers_on_the_cpu_and_the_gpu(alone: list[int]) -> None:
    with bus_of("CPU", gpu.NAME) as client:
        assert greedy(client, ["local0", "local1"], [1, 1]) == alone
    with bus_of(gpu.NAME, "CPU") as client:
        assert greedy(client, ["local0", "local1"], [1, 1]) == alone


def test_two_workers_share_a_gpu(alone: list[int]) -> None:
    with bus_of(gpu.NAME, gpu.NAME) as client:
        assert greedy(client, ["local0", "local1"], [1, 1]) == alone


@pytest.fixture(scope="module")
def device() -> Iterator[object]:
    """The GPU, in this process."""
    from workers.devices.cuda import open_cuda

    opened = open_cuda(gpu.NAME)
    yield opened
    gc.collect()


@pytest.mark.parametrize("mix", cuda.MIXES)
def test_a_small_model_agrees_with_the_reference(device: object, mix: str, tmp_path: Path) -> None:
    assert cuda.agreement(device, mix, tmp_path) < cuda.NMSE  # type: ignore[arg-type]


def test_memory_comes_back(device: object) -> None:
    driver = device.driver  # type: ignore[attr-defined]
    before = driver.memory()[0]
    buffer = device.alloc(64 << 20)  # type: ignore[attr-defined]
    assert np.frombuffer(device.read(buffer, (64 << 20) - 8, 8), np.uint8).sum() == 0  # type: ignore[attr-defined]
    assert driver.memory()[0] <= before - (64 << 20)
    device.free(buffer)  # type: ignore[attr-defined]
    assert driver.memory()[0] >= before - (8 << 20)


BREAKS = """
from workers.devices.cuda import open_cuda
from protocol.errors import DeviceError
from workers.devices.cuda.driver import Grid
from workers.kernels.cuda.product_launches import Pack
from workers.kernels.cuda.sources import Kernel
d = open_cuda("CUDA0")
pack = d.driver.function(Kernel("packing", "pack", (("FORMAT", "0"),)))
d.driver.launch(pack, Grid(1, 1, 128), Pack(raw=4096, packed=8192, n_rows=16, k=32, first=0, n=16))
try:
    d.driver.synchronize()
except DeviceError as e:
    print(d.broken, e)
"""


def test_an_address_that_is_none_breaks_the_device() -> None:
    done = subprocess.run([sys.executable, "-c", BREAKS], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("True the GPU does not work for this process any more"), done.stderr
