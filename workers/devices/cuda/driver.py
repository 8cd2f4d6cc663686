"""What a CUDA device asks of the machine. `runtime.py` asks CuPy for it; tests have one that runs kernels on the host.

Addresses are numbers of device memory. Work is put on one stream, in order, and done later; `synchronize` waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from workers.kernels.cuda.launches import Launch
from workers.kernels.cuda.sources import Kernel
from workers.ticks import Tick, nothing


@dataclass(frozen=True, slots=True)
class Facts:
    """Of a device.

    Attributes:
        description: what its maker calls it.
        architecture: what kernels are compiled for, as `sm_90`.
        n_processors: streaming multiprocessors.
    """

    description: str
    architecture: str
    n_processors: int


class Grid(NamedTuple):
    """Blocks in x and y, threads of each, and bytes of shared memory beyond what a kernel declares."""

    x: int
    y: int
    threads: int
    shared: int = 0


class Function(Protocol):
    """A compiled kernel."""


class Captured(Protocol):
    """Work that was put together once and is put on the stream as one."""

    def launch(self) -> None: ...


class Driver(Protocol):
    """Threads: use from one.

    Errors: OutOfMemory with both figures; DeviceError when the device does not answer any more (`broken` is True then).
    """

    facts: Facts
    n_compiles: int
    broken: bool

    def memory(self) -> tuple[int, int]:
        """Free and total bytes; what is kept for the next `alloc` is free."""

    def alloc(self, n_bytes: int) -> int:
        """Memory of whatever content, at a multiple of 256."""

    def free(self, address: int) -> None:
        """Give memory back; what is on the stream may still use it."""

    def trim(self) -> None:
        """Give back to the machine what is kept for the next `alloc`."""

    def staging(self, n_bytes: int) -> memoryview:
        """Host memory that copies on the stream come from and go to; it is given back with the view."""

    def upload(self, address: int, data: memoryview) -> None:
        """Put a copy from staging memory on the stream."""

    def download(self, data: memoryview, address: int) -> None:
        """Put a copy to staging memory on the stream."""

    def copy(self, to: int, source: int, n_bytes: int) -> None:
        """Put a copy between places that do not overlap on the stream."""

    def fill(self, address: int, value: int, n_bytes: int) -> None:
        """Put bytes of one value on the stream."""

    def function(self, kernel: Kernel, tick: Tick = nothing) -> Function:
        """Compiled for this device, and kept. Errors: InternalError with the compiler's words."""

    def launch(self, function: Function, grid: Grid, argument: Launch) -> None:
        """Put a kernel on the stream."""

    def capture(self, do: Callable[[], None]) -> Captured:
        """What `do` puts on the stream, as one piece of work; it is not done now."""

    def record(self) -> Callable[[], bool]:
        """Tells, when called later, whether all that is on the stream now has been done."""

    def synchronize(self) -> None:
        """Wait for all that is on the stream."""
