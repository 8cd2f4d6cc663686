"""Kernels as shared libraries of the host, which are kept from run to run."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from config.caches import cache_folder

FOLDER = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")
OPTIONS = ("-O1", "-g1", "-gdwarf-4", "-w", "-fPIC", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing",
           "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden")  # fmt: skip
CHECKS = ("-fsanitize=bounds,alignment,shift-exponent,integer-divide-by-zero", "-fno-sanitize-recover=all")
"""What the compiler finds by itself; `machine.cpp` has the functions that are called then."""
GARBAGE = "-ftrivial-auto-var-init=pattern"
"""Variables that nothing was put into hold something strange; newer compilers know it."""
MACHINE_OPTIONS = ("-O2", "-fPIC", "-std=c++17", "-fno-exceptions", "-fno-rtti")
MACHINES = ("x86_64", "aarch64")


@lru_cache
def compiler() -> tuple[str, str]:
    """The host's C++ compiler, or the empty string and why kernels cannot be run here."""
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        here = f"{platform.system()} on {platform.machine()}"
        return "", f"CUDA kernels run on the host under Linux on {' and '.join(MACHINES)}, this is {here}"
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        path = shutil.which(name) if name else None
        if path is not None:
            return path, ""
    return "", f"no C++ compiler is found, none of {', '.join(COMPILERS)}: install one to run CUDA kernels on the host"


@lru_cache
def _version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


@lru_cache
def kernel_options(path: str) -> tuple[str, ...]:
    """What this compiler takes kernels with; nothing where there is none."""
    if not path:
        return ()
    known = subprocess.run([path, GARBAGE, "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True).returncode == 0
    return (*OPTIONS, *CHECKS, GARBAGE) if known else (*OPTIONS, *CHECKS)


def _run(command: Sequence[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")


def library(text: str, options: Sequence[str] = ()) -> tuple[Path, bool]:
    """The shared library of a C++ source, and whether it was compiled just now. `options`: other than a kernel's.

    Errors: RuntimeError with what the compiler said.
    """
    path, reason = compiler()
    if not path:
        raise RuntimeError(reason)
    options = options or kernel_options(path)
    key = hashlib.sha256("\0".join([text, _version(path), platform.machine(), *options]).encode()).hexdigest()
    kept = cache_folder("ggmq") / "emulated" / f"{key[:32]}.so"
    if kept.exists():
        return kept, False
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as room:
        (Path(room) / "kernel.cpp").write_text(text, encoding="utf-8")
        _run([path, *options, "-c", "kernel.cpp", "-o", "kernel.o"], room)
        _run([path, "-shared", "kernel.o", "-o", "kernel.so"], room)
        os.replace(Path(room) / "kernel.so", kept)  # another process may have made the same
    return kept, True


class Failure(ctypes.Structure):
    _fields_ = [("address", ctypes.c_uint64), ("code", ctypes.c_uint64), ("thread", ctypes.c_uint32), ("x", ctypes.c_uint32),
                ("y", ctypes.c_uint32), ("kind", ctypes.c_uint32), ("text", ctypes.c_char * 480),
                ("library", ctypes.c_char * 512)]  # fmt: skip

    def where(self) -> str:
        """The line of the source that a signal came from, where that can be told."""
        if not self.library or not shutil.which("addr2line"):
            return ""
        found = subprocess.run(["addr2line", "-e", self.library.decode(), hex(self.code)], capture_output=True, text=True)
        line = found.stdout.strip().rsplit("/", 1)[-1].split(" ")[0]
        return "" if "?" in line else f"{line}: "


@lru_cache
def machine() -> Any:
    """`machine.cpp`, whose names the libraries of kernels find."""
    made, _ = library((FOLDER / "machine.cpp").read_text(encoding="utf-8"), MACHINE_OPTIONS)
    loaded = ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
    word, size = ctypes.c_uint32, ctypes.c_size_t
    shared: list[Any] = [ctypes.c_void_p, size, ctypes.c_int]
    grid: list[Any] = [word, word, word, ctypes.c_int]
    loaded.emulated_launch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, *grid, *shared, ctypes.POINTER(Failure)]
    loaded.emulated_reserve.argtypes, loaded.emulated_reserve.restype = [size], ctypes.c_uint64
    loaded.emulated_commit.argtypes = [ctypes.c_uint64, size]
    loaded.emulated_release.argtypes, loaded.emulated_release.restype = [ctypes.c_uint64, size], None
    return loaded
