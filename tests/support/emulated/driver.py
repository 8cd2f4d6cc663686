"""A driver of a CUDA device that is not there: its memory is the host's, and its kernels run on the host.

Its stream does what is put on it as late as it may: when somebody looks whether it has been done.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import re
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from protocol.errors import OutOfMemory
from tests.support.emulated.compiling import FOLDER, Failure, library, machine
from workers.devices.cuda.driver import Facts, Function, Grid
from workers.kernels.cuda.launches import LAUNCHES, Launch
from workers.kernels.cuda.sources import Kernel
from workers.tensors import Bytes
from workers.ticks import Job, Tick, nothing

PAGE = mmap.PAGESIZE
ALIGN = 16
RESERVED = 1 << 40, 1 << 36, 1 << 32
"""Bytes of address space, of which none is used twice; a process may be allowed less."""
TOTAL_BYTES = 2 << 30
COMPARED_BYTES = 64 << 20
"""A launch among more memory runs once."""
GARBAGE, SLACK = 0xFF, 0xA5
"""What new memory holds, and what lies around it on its pages."""
GARBAGE_BYTES = 4 << 20
COMPILE_S = 60.0
"""The compiler is waited for in pieces of so long."""
MAX_STEPS = 4096
"""What waits on the stream is done when it is more."""
MAX_ARGUMENT_BYTES = 4096
MAX_THREADS = 1024

PRIMITIVES = "".join(f'#line 1 "{f}"\n' + (FOLDER / f).read_text(encoding="utf-8") for f in ("builtins.h", "primitives.h"))
"""Instead of `primitives.cuh`."""

RUNNING = threading.Lock()
"""The machine runs one launch at a time."""

Step = Callable[[], None]


class EmulationError(AssertionError):
    """A kernel or the code around it did what a device must not be asked to."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Attributes: where its pages begin and how many bytes these are; where it begins, and how many bytes were asked for."""

    room: int
    room_bytes: int
    address: int
    n_bytes: int

    @property
    def end(self) -> int:
        return self.room + self.room_bytes

    def edges(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What of its pages is not its own: addresses and sizes."""
        behind = self.address + self.n_bytes
        return (self.room, self.address - self.room), (behind, self.end - behind)


@dataclass(frozen=True, slots=True, eq=False)
class EmulatedFunction:
    """A kernel in this process. `shared`: address and size of its shared memory."""

    title: str
    record: type[Launch]
    entry: int
    shared: tuple[int, int]
    max_threads: int


class Recorded:
    """Work that is done again and again. `steps`: each piece of it."""

    def __init__(self, driver: EmulatedDriver, steps: list[Step]) -> None:
        self._driver, self.steps = driver, steps

    def launch(self) -> None:
        self._driver.put(*self.steps)


class EmulatedDriver:
    """`compares`: every kernel runs twice, with threads in one order and in the other, and must leave the same bytes.

    Attributes:
        n_launches: kernels that were run; n_waits: how often the host looked whether the stream has done something.
    Errors: EmulationError when what is wrong is done, which is not when it is put on the stream.
    """

    def __init__(self, total_bytes: int = 0, compares: bool = True) -> None:
        self.facts = Facts("CUDA kernels on the host", "sm_90", 4)
        self.n_compiles, self.broken = 0, False
        self.n_launches = self.n_waits = 0
        self._total_bytes, self._used_bytes = total_bytes or TOTAL_BYTES, 0
        self._compares = compares
        self._machine = machine()
        self._allocations: dict[int, Allocation] = {}
        self._freed: set[int] = set()
        self._addresses: list[int] = []
        self._at = self._end = 0
        self._functions: dict[Kernel, EmulatedFunction] = {}
        self._waiting: deque[Step] = deque()
        self._n_done = self._n_put = 0
        self._recording: list[Step] | None = None

    # -- memory --------------------------------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        return self._total_bytes - self._used_bytes, self._total_bytes

    def alloc(self, n_bytes: int) -> int:
        self._not_recording("alloc")
        free = self._total_bytes - self._used_bytes
        if n_bytes > free:
            raise OutOfMemory(f"an allocation needs {n_bytes} bytes, {free} are free", n_bytes, free)
        room_bytes = -(-max(1, n_bytes) // PAGE) * PAGE
        if self._at + room_bytes + PAGE > self._end:
            size = next(n for n in RESERVED if n > room_bytes + 2 * PAGE)
            self._at = next(filter(None, map(self._machine.emulated_reserve, [n for n in RESERVED if n <= size])))
            self._at, self._end = self._at + PAGE, self._at + size
        room = self._at
        self._at += room_bytes + PAGE
        assert self._machine.emulated_commit(room, room_bytes)
        a = Allocation(room, room_bytes, room + room_bytes - -(-n_bytes // ALIGN) * ALIGN, n_bytes)
        for at, n in a.edges():
            ctypes.memset(at, SLACK, n)
        ctypes.memset(a.address, GARBAGE, min(n_bytes, GARBAGE_BYTES))
        self._allocations[a.address] = a
        bisect.insort(self._addresses, a.address)
        self._used_bytes += n_bytes
        return a.address

    def free(self, address: int) -> None:
        a = self._allocations.get(address)
        if a is None or address in self._freed:
            raise EmulationError(f"nothing to free at {address:#x}, {self._near(address)}")
        self._used_bytes -= a.n_bytes
        self._freed.add(address)
        self._waiting.append(partial(self._release, a))
        self._n_put += 1

    def _release(self, a: Allocation) -> None:
        del self._allocations[a.address]
        self._freed.remove(a.address)
        self._addresses.remove(a.address)
        self._machine.emulated_release(a.room, a.room_bytes)

    def trim(self) -> None:
        pass

    def _near(self, address: int) -> str:
        """Words about what lies there."""
        i = bisect.bisect_right(self._addresses, address) - 1
        if i < 0:
            return "where no memory is"
        a = self._allocations[self._addresses[i]]
        return f"{address - a.address} bytes behind the beginning of {a.n_bytes} bytes at {a.address:#x}"

    def _check(self, address: int, n_bytes: int, what: str) -> None:
        i = bisect.bisect_right(self._addresses, address) - 1
        a = self._allocations[self._addresses[i]] if i >= 0 else None
        if n_bytes and (a is None or address + n_bytes > a.address + a.n_bytes):
            raise EmulationError(f"{what}: {n_bytes} bytes at {address:#x}, {self._near(address)}")

    def staging(self, n_bytes: int) -> memoryview:
        return np.full(n_bytes, GARBAGE, np.uint8).data

    # -- the stream ----------------------------------------------------------------------------------------------------

    def _not_recording(self, what: str) -> None:
        if self._recording is not None:
            raise EmulationError(f"{what} while work is captured")

    def put(self, *steps: Step) -> None:
        """On the stream, or to what is captured."""
        if self._recording is not None:
            self._recording += steps
            return
        self._waiting += steps
        self._n_put += len(steps)
        if len(self._waiting) > MAX_STEPS:
            self._do(self._n_put)

    def _do(self, until: int) -> None:
        """Do what was put on the stream before."""
        while self._n_done < until:
            self._n_done += 1
            self._waiting.popleft()()

    def upload(self, address: int, data: memoryview) -> None:
        self.put(partial(self._upload, address, data))

    def _upload(self, address: int, data: memoryview) -> None:
        self._check(address, len(data), "a copy to the device")
        self._bytes(address, len(data))[:] = np.frombuffer(data, np.uint8)

    def download(self, data: memoryview, address: int) -> None:
        self.put(partial(self._download, data, address))

    def _download(self, data: memoryview, address: int) -> None:
        self._check(address, len(data), "a copy from the device")
        data[:] = self._bytes(address, len(data)).data

    def copy(self, to: int, source: int, n_bytes: int) -> None:
        self.put(partial(self._copy, to, source, n_bytes))

    def _copy(self, to: int, source: int, n_bytes: int) -> None:
        self._check(to, n_bytes, "a copy on the device, to")
        self._check(source, n_bytes, "a copy on the device, from")
        if to < source + n_bytes and source < to + n_bytes and n_bytes:
            raise EmulationError(f"a copy of {n_bytes} bytes from {source:#x} to {to:#x}, which overlap")
        ctypes.memmove(to, source, n_bytes)

    def fill(self, address: int, value: int, n_bytes: int) -> None:
        self.put(partial(self._fill, address, value, n_bytes))

    def _fill(self, address: int, value: int, n_bytes: int) -> None:
        self._check(address, n_bytes, "bytes of one value")
        ctypes.memset(address, value, n_bytes)

    @staticmethod
    def _bytes(address: int, n_bytes: int) -> Bytes:
        if not n_bytes:
            return np.empty(0, np.uint8)
        return np.frombuffer(memoryview((ctypes.c_uint8 * n_bytes).from_address(address)).cast("B"), np.uint8)

    def capture(self, do: Callable[[], None]) -> Recorded:
        self._not_recording("a capture")
        steps: list[Step] = []
        self._recording = steps
        try:
            do()
        finally:
            self._recording = None
        return Recorded(self, steps)

    def record(self) -> Callable[[], bool]:
        self._not_recording("a mark")
        put, asked = self._n_put, False

        def done() -> bool:
            nonlocal asked
            self._not_recording("a wait")
            self.n_waits += not asked
            asked = True
            self._do(min(put, self._n_done + 1))  # a piece each time that somebody looks
            return self._n_done >= put

        return done

    def synchronize(self) -> None:
        self._not_recording("a wait")
        self.n_waits += 1
        self._do(self._n_put)

    # -- kernels -------------------------------------------------------------------------------------------------------

    def function(self, kernel: Kernel, tick: Tick = nothing) -> EmulatedFunction:
        if kernel not in self._functions:
            self._not_recording("a kernel is compiled")
            self._functions[kernel] = self._load(kernel, tick)
        return self._functions[kernel]

    def _load(self, kernel: Kernel, tick: Tick) -> EmulatedFunction:
        title = f"{kernel.file}.{kernel.function}" + "".join(f" {name}={value}" for name, value in kernel.macros)
        record = next((r for r in LAUNCHES if (r.file, r.function) == (kernel.file, kernel.function)), None)
        if record is None:
            raise EmulationError(f"{title}: no record of its argument is declared")
        return self.compiled(title, kernel.function, record, kernel.text(PRIMITIVES), tick)

    def compiled(self, title: str, name: str, record: type[Launch], text: str, tick: Tick = nothing) -> EmulatedFunction:
        """A kernel of a whole source. The compiler is a process of its own, which is waited for as a GPU's compiler is."""
        entry = f"""
#line 1 "entry"
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED void emulated_entry(const void* a) {{ {name}(*(const {record.__name__}*)a); }}
EXPORTED u64 emulated_shared_bound(int end) {{ return (u64)(end ? __stop_emulated_shared : __start_emulated_shared); }}
"""
        job = Job(partial(library, text + entry))
        threading.Thread(target=job.run, daemon=True, name="emulated-compiler").start()
        while not job.wait(tick, COMPILE_S):
            pass
        made, now = job.outcome()
        self.n_compiles += now
        loaded = ctypes.CDLL(str(made))
        loaded.emulated_shared_bound.restype = ctypes.c_uint64
        address = ctypes.cast(loaded.emulated_entry, ctypes.c_void_p).value
        assert address is not None  # it was compiled with it
        begin = loaded.emulated_shared_bound(0)
        bound = re.search(rf"\bKERNEL\((\w+)[^)]*\)\s*{name}\b", text)
        threads = bound[1] if bound is not None else str(MAX_THREADS)
        told = re.search(rf"#define {threads} (\d+)", text)
        max_threads = int(told[1]) if told is not None else int(threads) if threads.isdigit() else MAX_THREADS
        return EmulatedFunction(title, record, address, (begin, loaded.emulated_shared_bound(1) - begin), max_threads)

    def launch(self, function: Function, grid: Grid, argument: Launch) -> None:
        assert isinstance(function, EmulatedFunction)  # `function` gives no others
        if not isinstance(argument, function.record):
            raise EmulationError(f"{function.title} takes a {function.record.__name__}, got a {type(argument).__name__}")
        if not (1 <= grid.x < 1 << 31 and 1 <= grid.y < 1 << 16 and 1 <= grid.threads <= function.max_threads):
            raise EmulationError(f"{function.title}: {grid}, and the kernel is for at most {function.max_threads} threads")
        data = argument.to_bytes()
        if len(data) > MAX_ARGUMENT_BYTES:
            raise EmulationError(f"{function.title}: an argument of {len(data)} bytes")
        self.put(partial(self._launch, function, grid, data))

    def _launch(self, function: EmulatedFunction, grid: Grid, data: bytes) -> None:
        self.n_launches += 1
        live = list(self._allocations.values())
        compares = self._compares and sum(a.n_bytes for a in live) <= COMPARED_BYTES
        before = [ctypes.string_at(a.address, a.n_bytes) for a in live] if compares else []
        self._run(function, grid, data, False)
        for a in live:
            for at, n in a.edges():
                if ctypes.string_at(at, n) != bytes([SLACK]) * n:
                    ctypes.memset(at, SLACK, n)
                    raise EmulationError(f"{function.title}: wrote just outside of {a.n_bytes} bytes at {a.address:#x}")
        if not compares:
            return
        after = [ctypes.string_at(a.address, a.n_bytes) for a in live]
        for a, data_before in zip(live, before, strict=True):
            ctypes.memmove(a.address, data_before, a.n_bytes)
        self._run(function, grid, data, True)
        for a, first in zip(live, after, strict=True):
            if ctypes.string_at(a.address, a.n_bytes) != first:
                differs = np.flatnonzero(np.frombuffer(first, np.uint8) != self._bytes(a.address, a.n_bytes))
                at = a.address + int(differs[0])
                raise EmulationError(f"{function.title}: {len(differs)} bytes depend on the order of threads, or on what "
                                     f"shared memory held before, the first at {at:#x}, {self._near(at)}")  # fmt: skip

    def _run(self, function: EmulatedFunction, grid: Grid, data: bytes, descending: bool) -> None:
        failure = Failure()
        garbage = 0x5A if descending else GARBAGE
        with RUNNING:
            good = self._machine.emulated_launch(function.entry, data, grid.x, grid.y, grid.threads, descending,
                                                 *function.shared, garbage, ctypes.byref(failure))  # fmt: skip
        if not good:
            said = failure.text.decode(errors="replace")
            if failure.kind == 1:
                said = f"reads or writes {failure.address:#x}, {self._near(failure.address)}"
            raise EmulationError(
                f"{function.title}: thread {failure.thread} of block ({failure.x}, {failure.y}): {failure.where()}{said}"
            )
