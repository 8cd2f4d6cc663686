"""What the threads of a team do: run the steps of a plan, warm through a token, with barriers only before steps that depend.

A step is a row of words: its opcode, 1 if the threads wait for each other before it, which part of how many it is, then the
fields of its record (`steps`), with which its kernel is called. Helpers are threads inside one compiled function that never
takes the interpreter's lock; between plans they spin a little, then sleep on a futex.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from workers.kernels import packing
from workers.kernels.exports import EXPORTS, exported, exported_step
from workers.kernels.layout import (
    ARRIVED,
    ASLEEP,
    BAD,
    CLOCK,
    DOZING,
    FIRST,
    GENERATION,
    HELP,
    LAST,
    LEAD,
    PACK_ROWS,
    PHASE,
    PROFILE,
    PROGRAM,
    SCRATCH,
    SCRATCH_BYTES,
    STOP,
    UNPACK_ROWS,
    WAKE,
)  # fmt: skip
from workers.kernels.records import HEADER, STEPS, TEAM_ARGUMENTS, WORD, Step
from workers.kernels.simd import (
    Emit,
    atomic_add,
    atomic_load,
    atomic_store,
    f32,
    i64,
    load64,
    pause,
    store64,
)
from workers.kernels.steps import WORDS

SPINS = 2000
SPINS_AT_BARRIER = 4000
"""Some 100 microseconds: more than threads with a core each are apart."""

_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1) if sys.platform == "linux" else -1
_WAIT, _WAKE = 128, 129
_EVERYONE = 1 << 30
_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


_pack_rows = exported(packing.pack_rows)
_unpack_rows = exported(packing.unpack_rows)
_STEPS = [(step, exported_step(step)) for step in STEPS]


@njit(nogil=True)
def _now_ns(room):  # type: ignore[no-untyped-def]
    _clock_gettime(1, room)
    return load64(room) * 1_000_000_000 + load64(room + 8)


@njit(nogil=True)
def _barrier(control, n_threads, futex):  # type: ignore[no-untyped-def]
    """Wait until all threads are here. Who waits long sleeps: another may need this core to get here."""
    phase = atomic_load(control + PHASE)
    if atomic_add(control + ARRIVED, 1) == n_threads - 1:
        atomic_store(control + ARRIVED, 0)
        atomic_add(control + PHASE, 1)
        if futex >= 0 and atomic_add(control + DOZING, 0) > 0:
            _syscall(futex, control + PHASE, _WAKE, _EVERYONE, 0, 0, 0)
        return
    spins = 0
    while atomic_load(control + PHASE) == phase:
        pause()
        spins += 1
        if spins > SPINS_AT_BARRIER:
            if futex < 0:
                _sched_yield()
                continue
            atomic_add(control + DOZING, 1)
            if atomic_load(control + PHASE) == phase:
                _syscall(futex, control + PHASE, _WAIT, phase & 0xFFFFFFFF, 0, 0, 0)
            atomic_add(control + DOZING, -1)


def _call_kernel(b: Any, step: type[Step], name: str, a: Any, control: Any, team: Sequence[Any]) -> None:
    """Write the call of a step's kernel with the fields at `a`, and the note of what it finds wrong."""
    e, kernel, fields = Emit(b), EXPORTS[name], step.__struct_fields__
    types_of = [f32 if t == types.float32 else i64 for t in kernel.arguments]
    own = dict(zip(TEAM_ARGUMENTS, team, strict=True))
    values = [own[p] if p in own else e.load(a, WORD * fields.index(p), kind)
              for p, kind in zip(kernel.parameters, types_of, strict=True)]  # fmt: skip
    checks = "node" in fields
    good = b.call(e.function(name, i64 if checks else ir.VoidType(), types_of), values)
    if checks:
        with cgutils.if_unlikely(b, b.icmp_signed("==", good, e.const(0))):
            node = e.load(a, WORD * fields.index("node"), i64)
            b.store_atomic(b.add(node, e.const(1)), b.inttoptr(e.at(control, BAD), ir.PointerType(i64)), "release", 8)


@intrinsic
def _step(typingctx: Any, opcode: Any, a: Any, control: Any, scratch: Any, t: Any, n_threads: Any) -> Any:
    """One thread's share of the step whose fields lie at `a`."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        opcode, a, control, *team = args
        behind = b.append_basic_block("behind")
        chosen = b.switch(opcode, behind)
        for step, name in _STEPS:
            block = b.append_basic_block(name)
            chosen.add_case(ir.Constant(i64, step.opcode), block)
            b.position_at_end(block)
            _call_kernel(b, step, name, a, control, team)
            b.branch(behind)
        b.position_at_end(behind)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@njit(nogil=True)
def _run(control, t, n_threads, futex):  # type: ignore[no-untyped-def]
    """One thread's share of the steps that the shared words name."""
    program, first, last = load64(control + PROGRAM), load64(control + FIRST), load64(control + LAST)
    scratch = load64(control + SCRATCH) + t * load64(control + SCRATCH_BYTES)
    profile = load64(control + PROFILE)
    clock = control + CLOCK
    for i in range(first, last):
        step = program + WORD * WORDS * i
        parts = load64(step + 2 * WORD)
        own, n_own = (parts >> 32) * n_threads + t, (parts & 0xFFFFFFFF) * n_threads
        if n_threads > 1 and load64(step + WORD):
            _barrier(control, n_threads, futex)
        if profile != 0 and t == 0:
            start = _now_ns(clock)
            _step(load64(step), step + WORD * HEADER, control, scratch, own, n_own)
            store64(profile + 16 * i, start)
            store64(profile + 16 * i + 8, _now_ns(clock))
        else:
            _step(load64(step), step + WORD * HEADER, control, scratch, own, n_own)
    if n_threads > 1:
        _barrier(control, n_threads, futex)


@njit(nogil=True)
def _lead(control, n_threads, futex):  # type: ignore[no-untyped-def]
    """Start everyone on the steps that the shared words name, and do one's share."""
    if n_threads > 1:
        atomic_add(control + GENERATION, 1)
        if atomic_add(control + ASLEEP, 0) > 0 and futex >= 0:
            _syscall(futex, control + GENERATION, _WAKE, _EVERYONE, 0, 0, 0)
    _run(control, 0, n_threads, futex)


@njit(nogil=True)
def _help(control, t, n_threads, futex):  # type: ignore[no-untyped-def]
    """A helper's life."""
    seen = 0
    while True:
        spins = 0
        while atomic_load(control + GENERATION) == seen:
            pause()
            spins += 1
            if spins > SPINS:
                atomic_add(control + ASLEEP, 1)
                if atomic_load(control + GENERATION) == seen:
                    if futex >= 0:
                        _syscall(futex, control + GENERATION, _WAIT, seen & 0xFFFFFFFF, 0, 0, 0)
                    else:
                        _usleep(100)
                atomic_add(control + ASLEEP, -1)
        seen += 1
        if atomic_load(control + STOP):
            return
        _run(control, t, n_threads, futex)


@njit(nogil=True)
def _wake(control, futex):  # type: ignore[no-untyped-def]
    atomic_add(control + GENERATION, 1)
    if futex >= 0:
        _syscall(futex, control + GENERATION, _WAKE, _EVERYONE, 0, 0, 0)


@njit(nogil=True)
def call(what, a, b, c, d, e, f, g, h):  # type: ignore[no-untyped-def]
    """The one function that is compiled for the world outside."""
    if what == LEAD:
        _lead(a, b, _FUTEX)
    elif what == HELP:
        _help(a, b, c, _FUTEX)
    elif what == WAKE:
        _wake(a, _FUTEX)
    elif what == PACK_ROWS:
        _pack_rows(a, b, c, d, e, f)
    elif what == UNPACK_ROWS:
        _unpack_rows(a, b, c, d, e, f, g, h)
