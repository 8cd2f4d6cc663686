"""The kernels as machine code: compiled once for a CPU in a process of its own, then loaded without the compiler.

A worker that loads them neither imports Numba nor compiles: it starts faster and holds some 100 MB less.
`python -m workers.kernels.native FOLDER` compiles.
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
from collections.abc import Callable, Sequence
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.errors import KernelError
from workers.kernels.layout import (
    BAD,
    CONTROL_BYTES,
    FIRST,
    HELP,
    LAST,
    LEAD,
    PROFILE,
    PROGRAM,
    SCRATCH,
    SCRATCH_BYTES,
    STOP,
    WAKE,
)  # fmt: skip

Native = Callable[..., None]
"""`team.call`: what, and eight int64; the interpreter's lock is released while it runs."""
_OBJECT, _ABOUT = "kernels.o", "kernels.json"
N_WORDS = 9


def _cache_folder(cpu: str) -> Path:
    """The folder of this CPU, these versions and this source."""
    base = os.environ.get("LLAMA_CACHE") or os.environ.get("XDG_CACHE_HOME")
    root = (Path(base) if base else Path.home() / ".cache") / "ggmq-kernels"
    source = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))
    told = f"{os.environ.get('NUMBA_CPU_NAME')} {os.environ.get('NUMBA_CPU_FEATURES')}"
    text = f"{cpu} {platform.machine()} {version('numba')} {version('llvmlite')} {version('numpy')} {sys.version} {told}"
    return root / blake2b(text.encode() + source, digest_size=8).hexdigest()


def compile_to(folder: Path) -> None:
    """Compile the kernels into `folder`.

    Numba optimises each function together with all that it calls. Done for every function on the way up that would take
    minutes; so they are made without, and only the outermost is optimised, which holds all others.
    """
    import llvmlite.binding as llvm
    from numba import cfunc, config, types
    from numba.core.registry import cpu_target

    from workers.kernels import team

    def optimise(level: int) -> None:
        os.environ["NUMBA_OPT"] = str(level)
        config.reload_config()

    words = (types.int64,) * N_WORDS
    cpu_target.target_context.codegen()  # takes its own level as it is now
    optimise(0)
    team.call.compile(words)
    optimise(3)
    compiled = cfunc(types.void(*words), nopython=True)(team.call.py_func)
    code = compiled._library._compiled_object or compiled._library._get_compiled_object()
    missing = [s for s in _undefined(code) if s.startswith(("NRT_", "numba_"))]
    (folder / _ABOUT).write_text(json.dumps({"name": compiled.native_name, "unused": missing,
                                             "cpu": llvm.get_host_cpu_name()}))  # fmt: skip
    part = folder / (_OBJECT + ".part")
    part.write_bytes(code)
    part.rename(folder / _OBJECT)


def _undefined(code: bytes) -> list[str]:
    """Names that an ELF object leaves to others: those of its string table that begin as Numba's own do."""
    words = {w.decode("ascii", "replace") for w in code.split(b"\0")}
    return sorted(w for w in words if w.replace("_", "").isalnum())


def load(cpu: str) -> Native:
    """The kernels for this CPU; compiled first where they are not kept yet. Several processes may ask at once.

    Errors: KernelError with the compiler's words.
    """
    folder = _cache_folder(cpu)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # nowhere to keep them: compile for this process alone
        with tempfile.TemporaryDirectory(prefix="ggmq-kernels-") as own:
            _compile_apart(Path(own))
            return _load(Path(own))
    try:
        if not (folder / _OBJECT).exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / _OBJECT).exists():
                _compile_apart(folder)
    finally:
        os.close(lock)
    return _load(folder)


def _compile_apart(folder: Path) -> None:
    print("worker: compiling kernels for this CPU; this happens once and takes up to a minute", file=sys.stderr, flush=True)
    root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-P", "-m", "workers.kernels.native", str(folder)], env=env, capture_output=True,
                          text=True, check=False)  # fmt: skip
    if done.returncode:
        raise KernelError(f"kernels for this CPU: the compiler ended with code {done.returncode}; its last words: "
                          f"{done.stderr[-1500:]}")  # fmt: skip


_kept: list[Any] = []
"""The loaded code lives as long as the process."""


def _load(folder: Path) -> Native:
    import llvmlite.binding as llvm

    about = json.loads((folder / _ABOUT).read_text())
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    never_called = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    for name in about["unused"]:
        llvm.add_symbol(name, never_called)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), llvm.Target.from_default_triple().create_target_machine())
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data((folder / _OBJECT).read_bytes()))
    engine.finalize_object()
    _kept.append(engine)
    address = engine.get_function_address(about["name"])
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
        """Carry out steps first..last. Returns: -1, or the node that a step gave as having data that points outside."""
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


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        compile_to(Path(sys.argv[1]))
