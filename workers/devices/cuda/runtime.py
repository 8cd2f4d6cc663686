"""What a CUDA device asks of the machine, through CuPy: memory, one stream, kernels, graphs.

Source: the CUDA runtime API (error handling, streams, graphs) and driver API (modules, launches).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import cupy
import numpy as np
from cupy.cuda import driver, runtime

from protocol.errors import DeviceError, OutOfMemory
from workers.devices.cuda.compiling import Compiler
from workers.devices.cuda.driver import Facts, Function, Grid
from workers.devices.cuda.launching import launcher
from workers.kernels.cuda.launches import Launch
from workers.kernels.cuda.sources import Kernel
from workers.ticks import Job, Tick, nothing

COMPILE_S = 60.0
"""A compiler is waited for in pieces of so long."""
NOT_READY = 600
"""cudaErrorNotReady: what was asked after is still on the stream."""
MEMORY = 2
"""cudaErrorMemoryAllocation, and CUDA_ERROR_OUT_OF_MEMORY."""
SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
FREE_SHARED_BYTES = 32 << 10
"""What a kernel may have besides its own without being asked for more: of 48 KiB in all."""
LASTING = frozenset((201, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 911, 999))
"""Errors after which the process must end before the GPU works for it again: a context that is gone, bits that flipped, a
link that failed, addresses and instructions that are none, launches that failed or took too long. Both APIs have these."""


@dataclass(frozen=True, slots=True)
class CupyFunction:
    """A kernel in a loaded module: its handle, and what it is called."""

    handle: int
    name: str


class CupyGraph:
    """A CUDA graph; it is launched on its driver's stream."""

    def __init__(self, owner: CupyDriver, graph: Any) -> None:
        self._owner, self._graph = owner, graph

    def launch(self) -> None:
        with self._owner.asking("a graph"):
            self._graph.launch(self._owner.stream)


class CupyDriver:
    """One GPU. Threads: use from one, the one that made it.

    Attributes:
        broken: it does not compute any more in this process.
        stream: of which all work is put; it does not wait for the default stream.
    """

    def __init__(self, name: str, compiler: Compiler | None = None) -> None:
        self.name, self.broken, self.n_compiles = name, False, 0
        index = int(name.upper().removeprefix("CUDA"))
        with self.asking("the device"):
            device = cupy.cuda.Device(index)
            device.use()
            self.stream = cupy.cuda.Stream(non_blocking=True)
            self._pool = cupy.cuda.MemoryPool()
            capability = device.compute_capability
            self.facts = Facts(
                description=runtime.getDeviceProperties(index)["name"].decode("utf-8", "replace"),
                architecture=f"sm_{capability}",
                n_processors=int(device.attributes["MultiProcessorCount"]),
            )
            major = int(runtime.runtimeGetVersion()) // 1000
            self._launcher = launcher(self.facts.architecture, int(runtime.driverGetVersion()))
        self._compiler = compiler or Compiler(major, self.facts.architecture)
        self._held: dict[int, Any] = {}
        self._modules: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {}
        self._functions: dict[Kernel, CupyFunction] = {}
        self._shared: dict[int, int] = {}
        self._events: list[Any] = []

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """What CUDA says in the block becomes an error of ours, and whether the device works any more is noted."""
        try:
            yield
        except (runtime.CUDARuntimeError, driver.CUDADriverError) as e:
            raise self._error(what, e, int(getattr(e, "status", 0))) from None

    def _error(self, what: str, said: Exception, status: int) -> DeviceError:
        if status in LASTING or self._gone():
            self.broken = True
            return DeviceError(f"the GPU does not work for this process any more: {said}, at {what}; the worker ends and is "
                               "to be started again; the system's log has more of it (`dmesg | grep -i xid`)")  # fmt: skip
        if status == MEMORY:
            free, total = self._figures()
            words = f"{what} needs memory of the GPU, and of {total} bytes {free} are free; lend less (-m)"
            return OutOfMemory(words, 0, free)
        return DeviceError(f"{what}: CUDA refused it: {said}")

    @staticmethod
    def _gone() -> bool:
        """Errors that last are said again to whoever asks for anything."""
        try:
            runtime.memGetInfo()
        except runtime.CUDARuntimeError:
            return True
        return False

    # -- memory --------------------------------------------------------------------------------------------------------

    def _figures(self) -> tuple[int, int]:
        free, total = runtime.memGetInfo()
        return int(free) + int(self._pool.free_bytes()), int(total)

    def memory(self) -> tuple[int, int]:
        with self.asking("memory"):
            return self._figures()

    def alloc(self, n_bytes: int) -> int:
        try:
            with self.asking(f"memory of {n_bytes} bytes"):
                pointer = self._pool.malloc(n_bytes)
        except cupy.cuda.memory.OutOfMemoryError:
            free, total = self.memory()
            raise OutOfMemory(f"expected {n_bytes} bytes of the GPU's memory in one piece, of {total} {free} are free; lend "
                              "less of it (-m), or end what else uses the GPU", n_bytes, free) from None  # fmt: skip
        self._held[int(pointer.ptr)] = pointer
        return int(pointer.ptr)

    def free(self, address: int) -> None:
        del self._held[address]  # the pool hands it out again for what comes later on the same stream

    def trim(self) -> None:
        with self.asking("memory that is given back"):
            self._pool.free_all_blocks()

    def staging(self, n_bytes: int) -> memoryview:
        with self.asking(f"staging memory of {n_bytes} bytes"):
            return memoryview(cupy.cuda.alloc_pinned_memory(n_bytes)).cast("B")[:n_bytes]

    # -- copies --------------------------------------------------------------------------------------------------------

    def upload(self, address: int, data: memoryview) -> None:
        with self.asking("a copy to the GPU"):
            runtime.memcpyAsync(address, _address(data), len(data), runtime.memcpyHostToDevice, self.stream.ptr)

    def download(self, data: memoryview, address: int) -> None:
        with self.asking("a copy from the GPU"):
            runtime.memcpyAsync(_address(data), address, len(data), runtime.memcpyDeviceToHost, self.stream.ptr)

    def copy(self, to: int, source: int, n_bytes: int) -> None:
        if n_bytes:
            with self.asking("a copy on the GPU"):
                runtime.memcpyAsync(to, source, n_bytes, runtime.memcpyDeviceToDevice, self.stream.ptr)

    def fill(self, address: int, value: int, n_bytes: int) -> None:
        if n_bytes:
            with self.asking("a fill"):
                runtime.memsetAsync(address, value, n_bytes, self.stream.ptr)

    # -- kernels -------------------------------------------------------------------------------------------------------

    def function(self, kernel: Kernel, tick: Tick = nothing) -> CupyFunction:
        found = self._functions.get(kernel)
        if found is None:
            key = kernel.file, kernel.macros
            name = " ".join((f"{kernel.file}.{kernel.function}", *(f"{k}={v}" for k, v in kernel.macros)))
            code = self._compiled(kernel, tick) if key not in self._modules else b""
            with self.asking(f"kernel {name}"):
                if code:
                    self._modules[key] = driver.moduleLoadData(code)
                found = CupyFunction(driver.moduleGetFunction(self._modules[key], kernel.function), name)
            self._functions[kernel] = found
        return found

    def _compiled(self, kernel: Kernel, tick: Tick) -> bytes:
        """On a thread of its own, since a kernel may take a second: whoever asks for a worker meanwhile is answered."""
        job = Job(partial(self._compiler.get, kernel))
        threading.Thread(target=job.run, daemon=True, name="ggmq-nvrtc").start()
        while not job.wait(tick, COMPILE_S):
            pass
        self.n_compiles = self._compiler.n_compiles
        return job.outcome()

    def launch(self, function: Function, grid: Grid, argument: Launch) -> None:
        assert isinstance(function, CupyFunction)  # this driver's own
        record = ctypes.create_string_buffer(argument.to_bytes())
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(record))  # CUDA copies what it points at before the call returns
        with self.asking(f"kernel {function.name} in {grid.x} x {grid.y} blocks of {grid.threads}"):
            if grid.shared > self._shared.get(function.handle, FREE_SHARED_BYTES):
                driver.funcSetAttribute(function.handle, SHARED, grid.shared)
                self._shared[function.handle] = grid.shared
            if self._launcher is None:
                driver.launchKernel(function.handle, grid.x, grid.y, 1, grid.threads, 1, 1, grid.shared, self.stream.ptr,
                                    ctypes.addressof(parameters), 0)  # fmt: skip
            elif status := self._launcher.launch(function.handle, grid, self.stream.ptr, parameters):
                raise driver.CUDADriverError(status)

    def capture(self, do: Callable[[], None]) -> CupyGraph:
        with self.asking("a graph that is put together"):
            self.stream.begin_capture()
            try:
                do()
            except BaseException:
                with contextlib.suppress(Exception):  # the stream must end its capture, whatever came of it
                    self.stream.end_capture()
                raise
            return CupyGraph(self, self.stream.end_capture())

    # -- waiting -------------------------------------------------------------------------------------------------------

    def record(self) -> Callable[[], bool]:
        with self.asking("an event"):
            event = self._events.pop() if self._events else cupy.cuda.Event(disable_timing=True)
            event.record(self.stream)
        passed = False

        def done() -> bool:
            nonlocal passed
            if not passed:
                with self.asking("what is on the stream"):
                    status = int(runtime.eventQuery(event.ptr))  # CuPy hands an error out as a number here
                    if status not in (0, NOT_READY):
                        raise runtime.CUDARuntimeError(status)
                passed = status == 0
                if passed:
                    self._events.append(event)
            return passed

        return done

    def synchronize(self) -> None:
        with self.asking("what is on the stream"):
            self.stream.synchronize()


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)
