"""What of CUDA devices needs no GPU: what is found and said, how kernels are kept, CuPy's errors, how a worker ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ggmq.cluster import local_bus
from protocol import messages as m
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import DeviceError, InternalError, OutOfMemory
from protocol.graph import Graph
from tests.support import breaking
from tests.support.fixtures import ROOT
from tests.support.processes import WORKER, started
from tests.support.strategies import leaf
from workers.devices.cuda import compiling
from workers.devices.cuda.compiling import Compiler, Nvrtc
from workers.devices.cuda.driver import Grid
from workers.devices.cuda.finding import CuPy, Driver, ask_driver, device_names, reason
from workers.devices.cuda.launching import Attribute, Launcher, launcher
from workers.kernels.cuda.product_launches import Pack
from workers.kernels.cuda.sources import FOLDER, Kernel

GOOD_CUPY, GOOD_DRIVER = CuPy("14.2.0", 12090), Driver(12080, ((9, 0), (7, 5)))
NVRTC = pytest.mark.skipif(find_spec("nvidia.cuda_nvrtc") is None if find_spec("nvidia") else True,
                           reason="no NVRTC (pip install nvidia-cuda-nvrtc-cu12)")  # fmt: skip

# -- what is there -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cupy", "driver", "words"), [
    ("CUDA0", CuPy(""), GOOD_DRIVER, ["CuPy is not installed", "ggmq[cuda12]", "ggmq[cuda13]", "nvidia-smi"]),
    ("CUDA0", CuPy("", 0, "libcudart.so.13: no such file"), GOOD_DRIVER, ["cannot be imported: libcudart.so.13", "pip"]),
    ("CUDA0", CuPy("12.3.0", 12020), GOOD_DRIVER, ["expected CuPy 13 or newer, got 12.3.0"]),
    ("CUDA0", CuPy("13.4.0", 0), GOOD_DRIVER, ["got one for ROCm"]),
    ("CUDA0", GOOD_CUPY, Driver(0, (), "libcuda.so.1: no such file"), ["no NVIDIA driver answers: libcuda", "--gpus all"]),
    ("CUDA0", GOOD_CUPY, Driver(11080, ((9, 0),)), ["the driver runs CUDA 11.8 at most; install a newer driver"]),
    ("CUDA0", CuPy("14.2.0", 13000), Driver(12080, ((9, 0),)),
     ["made for CUDA 13", "CUDA 12.8 at most", "pip uninstall cupy-cuda13x", "ggmq[cuda12]"]),
    ("CUDA0", GOOD_CUPY, Driver(12080, (), "unknown error (cuInit: 999)"), ["does not start: unknown error"]),
    ("CUDA0", GOOD_CUPY, Driver(12080), ["the driver shows no GPU"]),
    ("CUDA2", GOOD_CUPY, GOOD_DRIVER, ["this host shows CUDA0 to CUDA1"]),
    ("CUDA1", GOOD_CUPY, GOOD_DRIVER, ["compute capability 8.0 or newer (Ampere), got 7.5"]),
])  # fmt: skip
def test_what_is_missing_is_said(name: str, cupy: CuPy, driver: Driver, words: list[str]) -> None:
    why = reason(name, cupy, driver)
    assert why.startswith(f"{name}: ")
    for word in words:
        assert word in why


def test_nothing_is_said_of_a_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason("CUDA0", GOOD_CUPY, GOOD_DRIVER) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert "CUDA_VISIBLE_DEVICES is '3'" in reason("CUDA5", GOOD_CUPY, GOOD_DRIVER)


def worker(*args: str, path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([*WORKER, *args], capture_output=True, text=True, cwd=ROOT, env=env)


def package(folder: Path, text: str) -> Path:
    """A folder whose package stands for CuPy."""
    (folder / "cupy").mkdir()
    (folder / "cupy" / "__init__.py").write_text(text)
    return folder


def test_a_worker_without_cupy_says_how_it_comes(tmp_path: Path) -> None:
    hidden = package(tmp_path, 'raise ModuleNotFoundError("No module named \'cupy\'", name="cupy")')
    r = worker("-d", "CUDA0", path=hidden)
    assert r.returncode == 1 and r.stderr.startswith("worker: CUDA0: CuPy is not installed; ") and r.stderr.count("\n") == 1


def test_a_worker_with_a_cupy_that_cannot_be_imported(tmp_path: Path) -> None:
    r = worker("-d", "cuda0", path=package(tmp_path, 'raise ImportError("libcublas.so.12: cannot open\\nand more")'))
    assert r.returncode == 1
    assert "worker: CUDA0: CuPy is installed and cannot be imported: libcublas.so.12: cannot open; " in r.stderr


@pytest.mark.skipif(ask_driver().cuda > 0, reason="an NVIDIA driver is there")
def test_a_worker_without_a_driver(tmp_path: Path) -> None:
    text = "from types import SimpleNamespace as S\n__version__ = '14.2.0'\n" \
           "cuda = S(runtime=S(is_hip=False, runtimeGetVersion=lambda: 12090))\n"  # fmt: skip
    r = worker("-d", "CUDA0", path=package(tmp_path, text))
    assert r.returncode == 1 and r.stderr.startswith("worker: CUDA0: no NVIDIA driver answers: libcuda.so.1")
    assert device_names() == []


# -- compiled kernels --------------------------------------------------------------------------------------------------

SOURCE = 'extern "C" __global__ void f(float* a) { a[threadIdx.x] = 1.0f; }'


class Text(Kernel):
    """A kernel whose whole source is its function's name."""

    def text(self, primitives: str | None = None) -> str:
        return self.function


@NVRTC
def test_a_kernel_is_compiled_once_and_a_damaged_one_anew(tmp_path: Path) -> None:
    first = Compiler(12, "sm_90", tmp_path)
    code = first.get(Text("a", SOURCE))
    assert code[:4] == b"\x7fELF" and first.n_compiles == 1
    second = Compiler(12, "sm_90", tmp_path)
    assert second.get(Text("a", SOURCE)) == code and second.n_compiles == 0
    (path,) = tmp_path.iterdir()
    for damaged in (path.read_bytes()[:-1], b"", b"x" * 32, path.read_bytes()[:40] + b"?" + path.read_bytes()[41:]):
        path.write_bytes(damaged)
        again = Compiler(12, "sm_90", tmp_path)
        assert again.get(Text("a", SOURCE)) == code and again.n_compiles == 1
    assert Compiler(12, "sm_80", tmp_path).get(Text("a", SOURCE)) != code
    assert len(list(tmp_path.iterdir())) == 2


@NVRTC
def test_a_folder_that_takes_nothing_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    compiler = Compiler(12, "sm_90", tmp_path / "file" / "folder")
    assert compiler.get(Text("a", SOURCE)) and compiler.get(Text("a", SOURCE)) and compiler.n_compiles == 2


@NVRTC
def test_a_kernel_that_does_not_compile_is_told_with_the_compilers_words(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"a\.cu: NVRTC 12\.\d+ does not compile it for sm_90:\na\.cu\(1\): error"):
        Compiler(12, "sm_90", tmp_path).get(Text("a", "extern int x = y;"))


@NVRTC
def test_what_is_compiled_for(tmp_path: Path) -> None:
    nvrtc = Nvrtc(12)
    assert [nvrtc.target(f"sm_{n}") for n in (80, 86, 89, 90, 100)] == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100"]
    newest = nvrtc.architectures[-1]
    assert nvrtc.target("sm_990") == f"compute_{newest}"
    assert b".target" in nvrtc.compile(SOURCE, "a.cu", f"compute_{newest}").code
    with pytest.raises(DeviceError, match="compute capability"):
        nvrtc.target("sm_30")


def test_without_the_library_it_is_said_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_places", lambda major: [])
    with pytest.raises(DeviceError, match=r"libnvrtc\.so\.13: .*the wheel nvidia-cuda-nvrtc or .*'ggmq\[cuda13\]'"):
        compiling.library(13)


# -- the driver --------------------------------------------------------------------------------------------------------


class FakeCUDA:
    """Stands for CuPy: host memory, work that is done at once, and errors that a test asks for.

    Attributes:
        fails: what the next call of a function raises, by its name; `lasting`: what every call raises from then on.
    """

    def __init__(self) -> None:
        self.fails: dict[str, int] = {}
        self.lasting = 0
        self.launched: list[tuple[Any, ...]] = []
        self.capturing: list[tuple[Any, ...]] | None = None
        self.events = 0
        self.waits: dict[int, int] = {}

    def call(self, name: str) -> None:
        status = self.lasting or self.fails.pop(name, 0)
        if status in (700, 719):
            self.lasting = status
        if status:
            raise self.CUDARuntimeError(status)

    class CUDARuntimeError(RuntimeError):
        def __init__(self, status: int) -> None:
            super().__init__(f"cudaError{status}: said by the fake")
            self.status = status

    class CUDADriverError(CUDARuntimeError):
        pass

    class OutOfMemoryError(MemoryError):
        pass

    # -- memory and copies

    def malloc(self, n_bytes: int) -> Any:
        self.call("malloc")
        if n_bytes > 1 << 20:
            raise self.OutOfMemoryError
        memory = ctypes.create_string_buffer(n_bytes)
        return SimpleNamespace(ptr=ctypes.addressof(memory), memory=memory)

    def info(self) -> tuple[int, int]:
        self.call("memGetInfo")
        return 1000, 4000

    def copy(self, to: int, source: int, n_bytes: int, kind: int, stream: int) -> None:
        self.call("memcpyAsync")
        ctypes.memmove(to, source, n_bytes)

    def set(self, at: int, value: int, n_bytes: int, stream: int) -> None:
        self.call("memsetAsync")
        ctypes.memset(at, value, n_bytes)

    # -- the stream

    def query(self, event: int) -> int:
        if self.lasting:
            return self.lasting
        self.waits[event] = self.waits.get(event, 0) - 1
        return 600 if self.waits[event] >= 0 else 0

    def launch(self, handle: int, *args: Any) -> None:
        self.call("launchKernel")
        parameters, size = ctypes.cast(args[8], ctypes.POINTER(ctypes.c_void_p)), Pack.form.size
        record = (handle, *args[:8], ctypes.string_at(parameters[0], size))
        (self.launched if self.capturing is None else self.capturing).append(record)

    def begin_capture(self) -> None:
        self.capturing = []

    def end_capture(self) -> Any:
        self.call("end_capture")
        captured, self.capturing = self.capturing, None
        assert captured is not None
        return SimpleNamespace(launch=lambda stream: self.launched.extend(captured))

    def event(self, disable_timing: bool) -> Any:
        assert disable_timing
        self.events += 1
        return SimpleNamespace(ptr=self.events, record=lambda stream: self.call("eventRecord"))

    def modules(self) -> dict[str, ModuleType]:
        runtime, driver, cuda, cupy = (ModuleType(n) for n in ("cupy.cuda.runtime", "cupy.cuda.driver", "cupy.cuda", "cupy"))
        vars(runtime).update(
            CUDARuntimeError=self.CUDARuntimeError, memGetInfo=self.info, runtimeGetVersion=lambda: 12090,
            driverGetVersion=lambda: 12020, memcpyAsync=self.copy, memcpyHostToDevice=1, memcpyDeviceToHost=2,
            memcpyDeviceToDevice=3, memsetAsync=self.set,
            eventQuery=self.query, getDeviceProperties=lambda index: {"name": b"Fake GPU"},
        )  # fmt: skip
        vars(driver).update(CUDADriverError=self.CUDADriverError, moduleLoadData=len, launchKernel=self.launch,
                            moduleGetFunction=lambda module, name: module * 100 + len(name))  # fmt: skip
        pool = SimpleNamespace(malloc=self.malloc, free_bytes=lambda: 24, free_all_blocks=lambda: self.call("trim"))
        stream = SimpleNamespace(ptr=7, begin_capture=self.begin_capture, end_capture=self.end_capture,
                                 synchronize=lambda: self.call("synchronize"))  # fmt: skip
        device = SimpleNamespace(use=lambda: None, compute_capability="90", attributes={"MultiProcessorCount": 132})
        vars(cuda).update(
            runtime=runtime, driver=driver, Device=lambda index: device, Stream=lambda non_blocking: stream,
            Event=self.event, MemoryPool=lambda: pool, memory=SimpleNamespace(OutOfMemoryError=self.OutOfMemoryError),
            alloc_pinned_memory=lambda n: memoryview(bytearray(n + 5)).cast("b"),
        )  # fmt: skip
        vars(cupy).update(cuda=cuda)
        return {m.__name__: m for m in (runtime, driver, cuda, cupy)}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeCUDA, Any]]:
    """A fake, and a driver over it."""
    fake = FakeCUDA()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "workers.devices.cuda.runtime", raising=False)
    from workers.devices.cuda.runtime import CupyDriver

    compiler = SimpleNamespace(n_compiles=0, get=lambda kernel: b"code")
    yield fake, CupyDriver("CUDA0", compiler)  # type: ignore[arg-type]
    sys.modules.pop("workers.devices.cuda.runtime")


def test_memory_and_copies(cuda: tuple[FakeCUDA, Any]) -> None:
    _, driver = cuda
    assert (driver.facts.description, driver.facts.architecture, driver.facts.n_processors) == ("Fake GPU", "sm_90", 132)
    assert driver.memory() == (1024, 4000)
    a, b, room = driver.alloc(64), driver.alloc(64), driver.staging(64)
    assert len(room) == 64 and room.format == "B"
    room[:] = bytes(range(64))
    driver.upload(a, room)
    driver.copy(b, a, 64)
    driver.fill(b, 7, 8)
    room[:] = bytes(64)
    driver.download(room[:32], b)
    assert bytes(room) == bytes([7] * 8 + list(range(8, 32))) + bytes(32)
    driver.free(a)
    driver.trim()


def test_a_launch_hands_over_its_record_and_a_graph_all_of_them(cuda: tuple[FakeCUDA, Any]) -> None:
    fake, driver = cuda
    f = driver.function(Kernel("packing", "pack", (("FORMAT", "0"),)))
    assert driver.function(Kernel("packing", "pack", (("FORMAT", "0"),))) is f and f.name == "packing.pack FORMAT=0"
    records = [Pack(raw=i, packed=2, n_rows=3, k=4, first=5, n=6) for i in range(3)]
    driver.launch(f, Grid(9, 2, 128), records[0])
    assert fake.launched == [(404, 9, 2, 1, 128, 1, 1, 0, 7, records[0].to_bytes())]
    graph = driver.capture(lambda: [driver.launch(f, Grid(1, 1, 32), r) for r in records[1:]])
    assert len(fake.launched) == 1
    graph.launch()
    graph.launch()
    assert [r[-1] for r in fake.launched[1:]] == [records[1].to_bytes(), records[2].to_bytes()] * 2


def test_a_capture_that_fails_ends(cuda: tuple[FakeCUDA, Any]) -> None:
    fake, driver = cuda
    with pytest.raises(ZeroDivisionError):
        driver.capture(lambda: 1 // 0)
    assert fake.capturing is None


def test_events_are_used_again(cuda: tuple[FakeCUDA, Any]) -> None:
    fake, driver = cuda
    fake.waits = {1: 2}
    done = driver.record()
    assert [done() for _ in range(4)] == [False, False, True, True]
    for _ in range(3):
        assert driver.record()()
    assert fake.events == 1


def test_memory_that_is_not_there_is_told_with_both_figures(cuda: tuple[FakeCUDA, Any]) -> None:
    fake, driver = cuda
    with pytest.raises(OutOfMemory, match=r"expected 2097152 bytes .* of 4000 1024 are free") as e:
        driver.alloc(2 << 20)
    assert (e.value.need_bytes, e.value.free_bytes, driver.broken) == (2 << 20, 1024, False)
    fake.fails = {"end_capture": 2}
    with pytest.raises(OutOfMemory, match="a graph that is put together needs memory"):
        driver.capture(lambda: None)
    assert not driver.broken


def test_what_cuda_refuses_breaks_nothing(cuda: tuple[FakeCUDA, Any]) -> None:
    fake, driver = cuda
    fake.fails = {"launchKernel": 1}
    f = driver.function(Kernel("packing", "pack"))
    with pytest.raises(DeviceError, match=r"kernel packing\.pack in 1 x 2 blocks of 999: CUDA refused it: cudaError1"):
        driver.launch(f, Grid(1, 2, 999), Pack(raw=1, packed=2, n_rows=3, k=4, first=5, n=6))
    assert not driver.broken and driver.record()()


@pytest.mark.parametrize("what", ["an event that is waited for", "a later call", "an error that nobody knows"])
def test_an_error_that_lasts_breaks_the_device(cuda: tuple[FakeCUDA, Any], what: str) -> None:
    fake, driver = cuda
    done = driver.record()
    with pytest.raises(DeviceError, match=r"the GPU does not work for this process any more: cudaError\d+.*started again"):
        if what == "an event that is waited for":
            fake.lasting = 700
            done()
        elif what == "a later call":
            fake.fails = {"memcpyAsync": 719}
            driver.copy(1, 2, 3)
        else:
            fake.lasting = 12345
            driver.synchronize()
    assert driver.broken


# -- a worker whose device breaks --------------------------------------------------------------------------------------


def test_a_worker_whose_device_breaks_answers_and_ends() -> None:
    tensor = leaf(0, (4, 1, 1, 1))
    graph = Graph((tensor,), (0,), (0,))
    frame = encode_graph(graph)
    with contextlib.ExitStack() as ended, local_bus() as bus:
        bus.names.append("local0")
        command = [sys.executable, "-m", breaking.__name__, "-d", breaking.NAME, "--quiet", "--insecure",
                   "--broker", bus.local_endpoint, "--name", "local0"]  # fmt: skip
        process = ended.enter_context(started(command, stderr=subprocess.PIPE, text=True))
        client = bus.start()
        client.request(m.GraphPut(client.session, graph_digest(frame)), [frame])
        with pytest.raises(DeviceError, match=breaking.WORDS):
            client.request(m.GraphCompute(client.session, graph_digest(frame), 1), [np.ones(4, np.float32).tobytes()])
        assert process.wait(10) == 1
        assert process.stderr is not None and process.stderr.read() == f"worker: {breaking.NAME}: {breaking.WORDS}\n"


# -- kernels that may come before those in front of them are done --------------------------------------------------------


def test_such_a_launch_says_so_to_the_driver() -> None:
    """Over a function that stands for cuLaunchKernelEx: the bytes of its arguments are those of the driver API's structs."""
    seen: list[tuple[object, ...]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    def call(config: int, function: int, parameters: int, extra: int) -> int:
        words = struct.unpack("7I4xQQI", ctypes.string_at(config, 52))
        attribute = struct.unpack("i4xi", ctypes.string_at(words[8], 12))
        seen.append((words[:8], words[9], attribute, function, extra))
        return 0 if function == 77 else 1

    launcher = Launcher(call)
    parameters = (ctypes.c_void_p * 1)(5)
    assert launcher.launch(77, Grid(9, 2, 128, 4096), 7, parameters) == 0
    assert launcher.launch(78, Grid(9, 2, 128), 7, parameters) == 1
    assert seen[0] == ((9, 2, 1, 128, 1, 1, 4096, 7), 1, (6, 1), 77, None) and ctypes.sizeof(Attribute) == 72


@pytest.mark.parametrize(("architecture", "driver_version"), [("sm_80", 13000), ("sm_89", 12080), ("sm_90", 12020)])
def test_others_are_launched_as_ever(architecture: str, driver_version: int) -> None:
    assert launcher(architecture, driver_version) is None


def test_every_kernel_waits_for_those_in_front_of_it() -> None:
    """Itself or in a function that it calls, before it reads what they write: a kernel without it would be right on older
    GPUs, and in all other tests."""
    n_kernels, without = 0, []
    for path in FOLDER.glob("*.cu"):
        text = path.read_text()
        waits = ["begin", "previous_done"]
        for name, body in re.findall(r"^DEVICE \w+ (\w+)\(.*?^    (.*?)^\}", text, re.M | re.S):
            waits += [name] * ("previous_done();" in body)
        calls = re.compile(r"\b(" + "|".join(waits) + r")(<\d+>)?\(")
        bodies = re.findall(r"^KERNEL\([^)]*\) (\w+)\(\w+ a\) \{\n(.*?)^\}", text, re.M | re.S)
        assert len(bodies) == text.count("\nKERNEL(")
        n_kernels += len(bodies)
        without += [name for name, body in bodies if not calls.search(body)]
    assert n_kernels > 30 and without == []
