"""Has NVRTC compile kernels, and keeps what came out on the disk. Needs neither CuPy nor a driver."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from config.caches import cache_folder
from protocol.errors import DeviceError, InternalError
from workers.kernels.cuda.sources import OPTIONS, Kernel

HASH_BYTES = 32
LOG_LINES = 12
"""Of the compiler's words that an error carries."""
WHEELS = {12: ("nvidia.cuda_nvrtc", "nvidia-cuda-nvrtc-cu12"), 13: ("nvidia.cu13", "nvidia-cuda-nvrtc")}
"""By the major version of CUDA: the package that has the library in its folder `lib`, and the wheel that brings it."""


class Compiled(NamedTuple):
    """What a driver loads, and what the compiler said."""

    code: bytes
    log: str


def _places(major: int) -> Iterator[Path]:
    """Where the library may lie, the wheel's first."""
    try:
        found = find_spec(WHEELS[major][0])
    except ModuleNotFoundError:
        found = None
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        yield Path(folder) / "lib"
    for root in (*(os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX")), "/usr/local/cuda"):
        if root:
            yield from (Path(root) / "lib64", Path(root) / "lib")


def library(major: int) -> ctypes.CDLL:
    """NVRTC of this major version of CUDA. Errors: DeviceError that says where it comes from."""
    name = f"libnvrtc.so.{major}"
    for path in (folder / name for folder in _places(major)):
        if path.exists():
            for beside in path.parent.glob("libnvrtc-builtins.so.*"):  # wheels of 13.0 do not look for it there
                ctypes.CDLL(str(beside))
            return ctypes.CDLL(str(path))
    try:
        return ctypes.CDLL(name)
    except OSError as e:
        raise DeviceError(f"{name}: expected NVRTC, which compiles the CUDA kernels, in the wheel {WHEELS[major][1]} or in "
                          f"$CUDA_PATH: {e}; `pip install 'ggmq[cuda{major}]'` brings it") from None  # fmt: skip


class Nvrtc:
    """The compiler of one version of CUDA.

    Attributes:
        version: as (12, 9).
        architectures: those it makes machine code for, as 90, in order.

    Threads: any.
    """

    def __init__(self, major: int) -> None:
        self._library = library(major)
        a, b = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(a), ctypes.byref(b))
        self.version = (a.value, b.value)
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(a))
        numbers = (ctypes.c_int * a.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        self.architectures = sorted(numbers)

    def _call(self, function: str, *args: Any) -> None:
        code = getattr(self._library, function)(*args)
        if code:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise InternalError(f"{function}: {self._library.nvrtcGetErrorString(code).decode()}")

    def target(self, architecture: str) -> str:
        """What to compile for, as sm_90; for a GPU newer than this version what its driver translates, as compute_90."""
        number = int(architecture.removeprefix("sm_"))
        same = [n for n in self.architectures if n <= number and n // 10 == number // 10]
        if same:
            return f"sm_{same[-1]}"
        below = [n for n in self.architectures if n <= number]
        if not below:
            raise DeviceError(f"NVRTC {self.version[0]}.{self.version[1]} compiles for compute capability "
                              f"{self.architectures[0] / 10} and newer, got {number / 10}")  # fmt: skip
        return f"compute_{below[-1]}"

    def compile(self, text: str, name: str, target: str, options: Sequence[str] = OPTIONS) -> Compiled:
        """Machine code for a target as sm_90, PTX for one as compute_90. Errors: InternalError with the compiler's words."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        try:
            given = [o.encode() for o in (f"--gpu-architecture={target}", *options)]
            failed = self._library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
            log = self._bytes("ProgramLog", program).rstrip(b"\0").decode("utf-8", "replace").strip()
            if failed:
                ours, words = ".".join(map(str, self.version)), "\n".join(log.splitlines()[:LOG_LINES])
                raise InternalError(f"{name}: NVRTC {ours} does not compile it for {target}:\n{words}")
            return Compiled(self._bytes("CUBIN" if target.startswith("sm_") else "PTX", program), log)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        room = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, room)
        return room.raw


class Compiler:
    """Kernels for one architecture, each compiled once on this host.

    An entry's name is a hash of all that it depends on, and it begins with a hash of what follows.

    Attributes:
        n_compiles: how many were not there yet.

    Threads: any; two that ask for the same at once both have it compiled.
    """

    def __init__(self, major: int, architecture: str, folder: Path | None = None) -> None:
        self.nvrtc = Nvrtc(major)
        self.target = self.nvrtc.target(architecture)
        self._folder = folder if folder is not None else cache_folder("ggmq-kernels") / "cuda"
        self.n_compiles = 0

    def get(self, kernel: Kernel) -> bytes:
        """What the driver loads: every function of the kernel's file. Errors: InternalError with the compiler's words."""
        text = kernel.text()
        about = "\0".join((text, *OPTIONS, self.target, str(self.nvrtc.version)))
        path = self._folder / f"{kernel.file}-{blake3(about.encode()).hexdigest()[:32]}"
        kept = self._kept(path)
        if kept is not None:
            return kept
        code = self.nvrtc.compile(text, f"{kernel.file}.cu", self.target).code
        self.n_compiles += 1
        self._keep(path, code)
        return code

    @staticmethod
    def _kept(path: Path) -> bytes | None:
        try:
            data = path.read_bytes()
        except OSError:
            return None
        code = data[HASH_BYTES:]
        return code if code and blake3(code).digest() == data[:HASH_BYTES] else None

    @staticmethod
    def _keep(path: Path, code: bytes) -> None:
        """Under a name of its own, synced and renamed: who reads it finds all of it or nothing. Where the disk takes nothing
        it is compiled again."""
        name = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
            with os.fdopen(fd, "wb") as f:
                f.write(blake3(code).digest() + code)
                f.flush()
                os.fsync(f.fileno())
            os.replace(name, path)
        except OSError:
            if name:
                Path(name).unlink(missing_ok=True)

