"""Fixtures of the whole suite: folders of their own, buses with bounded teardown, Hypothesis profiles."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ggmq.cluster import Client, local_bus
from tests.support import cuda_emulated, elsewhere, emulated, gpu, processes
from tests.support.fixtures import SHARED
from workers.devices.system import cpu_model
from workers.kernels import native

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("dev", max_examples=50, **COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **COMMON)
settings.register_profile("fuzz", max_examples=5000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; processes of tests are sent it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need a GPU are skipped where there is none, before their workers are started."""
    if item.get_closest_marker("cuda") is not None and gpu.missing():
        pytest.skip(gpu.missing())


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State and keys of a test are its own; compiled kernels are shared, since they take a minute to make."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("GGMQ_KEYS", raising=False)


@pytest.fixture(scope="session", params=["CPU", "reference", elsewhere.NAME, cuda_emulated.NAME,
                                       pytest.param(gpu.NAME, marks=pytest.mark.cuda)])  # fmt: skip
def device(request: pytest.FixtureRequest) -> str:
    if request.param == cuda_emulated.NAME and not emulated.compiler()[0]:
        pytest.skip(emulated.compiler()[1])
    return str(request.param)


PROGRAMS = {m.NAME: m.__name__ for m in (elsewhere, cuda_emulated)}
"""Workers that have a device of the tests."""


@pytest.fixture(scope="session")
def bus(device: str) -> Iterator[Client]:
    """A session with one real worker process of the device."""
    with contextlib.ExitStack() as ended, local_bus() as started:
        if device in PROGRAMS:
            started.names.append("local0")
            command = [sys.executable, "-m", PROGRAMS[device], "-d", device, "--quiet", "--insecure",
                       "--broker", started.local_endpoint, "--name", started.names[0]]  # fmt: skip
            ended.enter_context(processes.started(command))
        else:
            started.spawn(device, 2)
        yield started.start()


@pytest.fixture(scope="session")
def kernels() -> None:
    """Compiled for this CPU: a worker that others connect to computes at once."""
    native.Kernels(cpu_model()).get()


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the fixtures of {SHARED.name}/ are not beside this checkout")
    return SHARED
