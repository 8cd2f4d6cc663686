"""`python -m bench.cuda` over a device whose kernels run on the host: that its figures come, not what they are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench import cuda
from bench.models import Shape
from bench.resident import Computed
from tests.support import emulated
from tests.support.fixtures import ROOT
from tests.workers.test_cuda_plans import N, Observed, chain, compiled
from workers.devices.cuda.device import CUDADevice

pytestmark = pytest.mark.skipif(not emulated.compiler()[0], reason="no C++ compiler, which the emulated device needs")
TINY = Shape(n_embd=64, n_layer=2, n_head=2, n_head_kv=1, n_ff=96, n_vocab=320, n_ctx=128)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[CUDADevice]:
    for name, value in {"SIZES": {"tiny": TINY}, "STREAMS": (1, 3), "DEPTH": 20, "PROMPT": 24, "N_CTX": 64, "MEASURE_S": 0.0,
                        "COPY_BYTES": 1 << 16, "AHEAD": 1}.items():  # fmt: skip
        monkeypatch.setattr(cuda, name, value)
    yield CUDADevice("CUDA0", emulated.EmulatedDriver(compares=False))


def test_a_small_model_agrees_with_the_reference(device: CUDADevice, tmp_path: Path) -> None:
    assert cuda.agreement(device, "Q4_0", tmp_path, TINY) < cuda.NMSE
    assert device.used_bytes == 0


def test_a_model_gives_its_figures(device: CUDADevice, tmp_path: Path) -> None:
    clock = cuda.HostClock(device)
    peaks = cuda.Peaks(cuda.copy_rate(device, clock), 1e12)
    rows = list(cuda.model(device, clock, peaks, "tiny", "Q4_0", tmp_path))
    assert {"decode at 20", "decode, 3 streams at 20", "prefill of 24", "loading"} <= {row.what for row in rows}
    assert all(row.value >= 0 for row in rows if row.unit in ("tokens/s", "GB/s", "TFLOP/s"))
    assert device.used_bytes == 0


def test_time_by_kernel(device: CUDADevice) -> None:
    device = CUDADevice("CUDA0", Observed())
    plan = compiled(device, chain("SCALE", "SCALE", "SCALE"))
    computed = Computed(plan, [np.ones(N, np.float32).tobytes()])
    rows = list(cuda.by_kernel("three", device, cuda.HostClock(device), computed))
    assert rows[0].what == "square, 3 times" and rows[0].share == 1
    assert rows[1].what == "all kernels, each by itself" and rows[1].value == rows[0].value > 0 < rows[2].value


def test_a_scenario_that_fails_is_told_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def half() -> Iterator[cuda.Row]:
        yield cuda.Row("half", "a figure", 1.5, "GB/s", 0.25)
        raise ValueError("no more")

    table = cuda.Table(quiet=False)
    table.add("half", half)
    table.add("whole", lambda: iter([cuda.Row("whole", "another", 2, "us")]))
    said = capsys.readouterr().out
    assert "| half | a figure | 1.5 | GB/s | 25 % |\n| half | failed: ValueError: no more | | | |\n| whole | another" in said
    assert len(table.rows) == 2 and table.failed == {"half": "ValueError: no more"}


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.cuda", "-d", "CUDA99", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("bench.cuda: CUDA99: ") and "Traceback" not in done.stderr
