"""The kernels as machine code: compiled once for a CPU in processes of their own, then loaded without the compiler.

A worker that loads them neither imports Numba nor compiles: it starts faster and holds some 100 MB less.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from config.caches import cache_folder
from config.cores import n_cores
from config.installed import module_command, module_environment
from protocol.errors import KernelError
from workers.kernels.layout import (
    BAD,
    CONTROL_BYTES,
    FIRST,
    HELP,
    LAST,
    LEAD,
    N_WORDS,
    PROFILE,
    PROGRAM,
    SCRATCH,
    SCRATCH_BYTES,
    STAGES,
    STOP,
    UNITS,
    WAKE,
)  # fmt: skip
from workers.ticks import Job, Tick, nothing

Native = Callable[..., None]
"""`team.call`: what, and eight int64; the interpreter's lock is released while it runs."""
COMPILERS = ("numba", "llvmlite", "numpy")
CLEAR = "\r\x1b[K"
NOTED_S = 1.0
"""How often a compilation that is under way says how far it is, on a terminal."""


def _versions() -> str:
    """Versions of what compiles, as their folders of metadata are named: to read the metadata takes as long as to load the
    kernels."""
    found = find_spec("numba")
    folder = Path(found.origin).parents[1] if found is not None and found.origin else Path()
    names = sorted(p.name for p in folder.glob("*.dist-info") if p.name.split("-")[0] in COMPILERS)
    if len(names) == len(COMPILERS):
        return " ".join(names)
    from importlib.metadata import version

    return " ".join(version(package) for package in COMPILERS)


def _cache_folder(cpu: str) -> Path:
    """The folder of this CPU, these versions and this source."""
    source = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))
    told = f"{os.environ.get('NUMBA_CPU_NAME')} {os.environ.get('NUMBA_CPU_FEATURES')}"
    text = f"{cpu} {platform.machine()} {_versions()} {sys.version} {told}"
    return cache_folder("ggmq-kernels") / blake2b(text.encode() + source, digest_size=8).hexdigest()


class Kernels:
    """The kernels of a CPU: compiled aside, on all cores, by the first process that needs them, and kept for all others.

    Threads: use from one; it starts one of its own.
    """

    def __init__(self, cpu: str) -> None:
        self._folder = _cache_folder(cpu)
        self._native: Native | None = None
        self._compiling: Job[Path] | None = None

    def begin(self) -> None:
        """Have what is missing compiled, and go on."""
        if self._compiling is None and not _complete(self._folder):
            self._compiling = Job(partial(_made, self._folder))
            threading.Thread(target=self._compiling.run, daemon=True, name="ggmq-kernels").start()

    def get(self, tick: Tick = nothing) -> Native:
        """The kernels, as soon as they are there. Errors: KernelError with the compiler's words."""
        if self._native is None:
            self.begin()
            folder = self._folder
            if self._compiling is not None:
                while not self._compiling.wait(tick, 60.0):
                    pass
                folder = self._compiling.outcome()
            self._native = _load(folder)
        return self._native


def _complete(folder: Path) -> bool:
    return all((folder / f"{unit}.json").exists() for unit in UNITS)


_own_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when the process ends."""


def _made(folder: Path) -> Path:
    """Compile what is missing. Returns: where it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # nowhere to keep them: compile for this process alone
        own = tempfile.TemporaryDirectory(prefix="ggmq-kernels-")
        _own_folders.append(own)
        _compile(Path(own.name))
        return Path(own.name)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _complete(folder):
            _compile(folder)
    finally:
        os.close(lock)
    return folder


def _compile(folder: Path) -> None:
    """Have processes share the units that are missing, and say how far they are."""
    for unit in UNITS:
        taken = folder / f"{unit}.taken"
        if (folder / f"{unit}.json").exists():
            taken.touch()
        else:
            taken.unlink(missing_ok=True)  # of one that was killed
    command = [*module_command("workers.kernels.units"), str(folder)]
    start = time.monotonic()
    words = "worker: compiling kernels for this CPU, once"
    terminal = sys.stderr.isatty()
    with tempfile.TemporaryFile() as said:
        running = [subprocess.Popen(command, env=module_environment(), stdin=subprocess.DEVNULL,
                                    stdout=subprocess.DEVNULL, stderr=said) for _ in range(n_cores())]  # fmt: skip
        try:
            if not terminal:
                print(f"{words}; this takes some seconds", file=sys.stderr, flush=True)
            while any(p.poll() is None for p in running):
                if terminal:
                    done = sum((folder / f"{unit}.json").exists() for unit in UNITS)
                    print(f"\r{words}: {done} of {len(UNITS)}", end="", file=sys.stderr, flush=True)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    next((p for p in running if p.poll() is None), running[0]).wait(NOTED_S)
        finally:
            for p in running:
                p.kill()
                p.wait()
        failed = next((p.returncode for p in running if p.returncode), 0)
        if failed or not _complete(folder):
            said.seek(0)
            raise KernelError(f"kernels for this CPU: the compiler ended with code {failed}; its last words: "
                              f"{said.read()[-1500:].decode('utf-8', 'replace')}")  # fmt: skip
    print(f"{CLEAR if terminal else ''}{words}: done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _load(folder: Path) -> Native:
    """The units in an order in which each finds the names that it calls."""
    from workers.kernels.linking import link, never_called

    addresses: dict[str, int] = {}
    for units in STAGES:
        objects: list[bytes] = []
        symbols: dict[str, str] = {}
        for unit in units:
            for i, about in enumerate(json.loads((folder / f"{unit}.json").read_text())):
                never_called(about["unused"])
                symbols |= about["exports"]
                objects.append((folder / f"{unit}.{i}.o").read_bytes())
        addresses = link(objects, symbols)
    (address,) = addresses.values()  # the team's one function
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * N_WORDS)(address)


class Team:
    """`n_threads` threads, the caller's among them. Helpers are threads that stay inside compiled code.

    With `cpus` each thread stays on one of them: the caller's, from its first plan on, on the first.

    Threads: call from one.
    """

    def __init__(self, native: Native, n_threads: int, cpus: Sequence[int] = ()) -> None:
        self.native, self.n_threads = native, n_threads
        self._cpu = cpus[0] if cpus else -1
        room = np.zeros(CONTROL_BYTES + 64, np.uint8)
        start = -room.ctypes.data % 64
        self._control: npt.NDArray[np.int64] = room[start : start + CONTROL_BYTES].view(np.int64)
        self._address = self._control.ctypes.data
        self.scratch = np.zeros(0, np.uint8)
        rest = (0,) * (N_WORDS - 4)

        def help_from(t: int) -> None:
            if cpus:
                os.sched_setaffinity(0, {cpus[t]})
            native(HELP, self._address, t, n_threads, *rest)

        self._helpers = [threading.Thread(target=help_from, args=(t,), daemon=True, name=f"ggmq-{t}")
                         for t in range(1, n_threads)]  # fmt: skip
        for h in self._helpers:
            h.start()

    def reserve(self, n_bytes: int) -> None:
        """Give every thread scratch memory of at least so many bytes; `scratch` is the caller's, and the others' behind."""
        each = -(-n_bytes // 4096) * 4096
        if each * self.n_threads > len(self.scratch):
            self.scratch = np.zeros(each * self.n_threads, np.uint8)
            self._set(SCRATCH, self.scratch.ctypes.data)
            self._set(SCRATCH_BYTES, each)

    def _set(self, word: int, value: int) -> None:
        self._control[word // 8] = value

    def call(self, what: int, *args: int) -> None:
        """One of the functions that `layout` names, on this thread."""
        self.native(what, *args, *(0,) * (N_WORDS - 1 - len(args)))

    def run(self, program: npt.NDArray[np.int64], first: int, last: int, profile: npt.NDArray[Any] | None = None) -> int:
        """Carry out steps first..last. Returns: -1, or the node that a step gave as having data that points outside.

        profile: where the first thread writes when each step began and ended, in nanoseconds of the monotonic clock.
        Shapes: int64 [n_steps, 2].
        """
        if self._cpu >= 0:  # not before: threads that others start meanwhile, as for sockets, may go elsewhere
            os.sched_setaffinity(0, {self._cpu})
            self._cpu = -1
        self._set(PROGRAM, program.ctypes.data)
        self._set(FIRST, first)
        self._set(LAST, last)
        self._set(PROFILE, 0 if profile is None else profile.ctypes.data)
        self._set(BAD, 0)
        self.call(LEAD, self._address, self.n_threads)
        return int(self._control[BAD // 8]) - 1

    def close(self) -> None:
        """End the helpers."""
        self._set(STOP, 1)
        self.call(WAKE, self._address)
        for h in self._helpers:
            h.join(5)
        self._helpers.clear()

