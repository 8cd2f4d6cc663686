"""What the threads of a team do: run the steps of a plan, warm through a token, meeting only before steps that depend.

A step is a row of 32 words: an opcode, 1 if the threads must meet before it, then its arguments (named where a plan is
bound). Helpers are threads inside one compiled function that never takes the interpreter's lock; between plans they spin
a little, then sleep on a futex.
"""

from __future__ import annotations

import platform
import sys

import numpy as np
from numba import njit, types

from workers.kernels import attention, packing, products, rows
from workers.kernels.exports import exported
from workers.kernels.layout import (
    ADD_ID,
    ARANGE,
    ARGMAX,
    ARRIVED,
    ASLEEP,
    ATTEND,
    BAD,
    BY_ROW,
    CLOCK,
    DOZING,
    ELEMENTWISE,
    FIRST,
    GENERATION,
    GET_ROWS,
    HELP,
    LAST,
    LEAD,
    MERGE,
    NARROW,
    NORM,
    PACK_ROWS,
    PHASE,
    PRODUCT,
    PRODUCT_ID,
    PROFILE,
    PROGRAM,
    QUANTIZE,
    RMS_NORM,
    ROPE,
    ROPE_TABLE,
    SCRATCH,
    SCRATCH_BYTES,
    SOFT_MAX,
    STOP,
    STORE_HALVES,
    SUM_ROWS,
    TOP_K,
    UNPACK,
    UNPACK_ROWS,
    WAKE,
    WIDEN,
    WORDS,
)  # fmt: skip
from workers.kernels.simd import (
    atomic_add,
    atomic_load,
    atomic_store,
    bits_to_float,
    load32,
    load64,
    pause,
    store64,
)

SPINS = 2000
SPINS_TO_MEET = 4000
"""Some 100 microseconds: more than threads with a core each are apart."""

_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1) if sys.platform == "linux" else -1
_WAIT, _WAKE = 128, 129
_EVERYONE = 1 << 30
_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


# functions of other units: each is compiled by itself
_times = exported(products.product)
_quantize = exported(products.quantize)
_packed_rows = exported(products.get_rows, truth=True)
_pack_rows = exported(packing.pack_rows)
_unpack_rows = exported(packing.unpack_rows)
_attend = exported(attention.attend)
_merge_parts = exported(attention.merge_parts)
_elementwise = exported(rows.elementwise, floats=(10, 11))
_rms_norm = exported(rows.rms_norm, floats=(7,))
_rope = exported(rows.rope)
_halves = exported(rows.store_halves)
_by_row = exported(rows.by_row)
_soft_max = exported(rows.soft_max, floats=(6,))
_top_k = exported(rows.top_k)
_rows = exported(rows.get_rows, truth=True)
_sum_rows = exported(rows.sum_rows)
_norm = exported(rows.norm, floats=(6,))
_add_id = exported(rows.add_id, truth=True)
_rope_table = exported(rows.rope_table, truth=True)
_arange = exported(rows.arange, floats=(0, 1))
_narrow = exported(rows.narrow)
_widen = exported(rows.widen)
_largest = exported(rows.largest)


@njit(nogil=True)
def _now_ns(room):  # type: ignore[no-untyped-def]
    _clock_gettime(1, room)
    return load64(room) * 1_000_000_000 + load64(room + 8)


@njit(nogil=True)
def _meet(control, n_threads, futex):  # type: ignore[no-untyped-def]
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
        if spins > SPINS_TO_MEET:
            if futex < 0:
                _sched_yield()
                continue
            atomic_add(control + DOZING, 1)
            if atomic_load(control + PHASE) == phase:
                _syscall(futex, control + PHASE, _WAIT, phase & 0xFFFFFFFF, 0, 0, 0)
            atomic_add(control + DOZING, -1)


@njit(nogil=True)
def _arg(a, i):  # type: ignore[no-untyped-def]
    return load64(a + 8 * i)


@njit(nogil=True)
def _float_arg(a, i):  # type: ignore[no-untyped-def]
    return bits_to_float(np.int32(load64(a + 8 * i)))


@njit(nogil=True)
def _product(a, scratch, t, n_threads):  # type: ignore[no-untyped-def]
    n, x, y = _arg(a, 10), _arg(a, 6), _arg(a, 8)
    columns, outputs = scratch, scratch + 8 * n
    for c in range(n):
        store64(columns + 8 * c, x + c * _arg(a, 7))
        store64(outputs + 8 * c, y + c * _arg(a, 9))
    _times(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), columns, outputs, n,
                     scratch + 16 * n, t, n_threads)  # fmt: skip


@njit(nogil=True)
def _product_id(a, control, scratch, t, n_threads):  # type: ignore[no-untyped-def]
    """Each expert's rows times the columns that chose it."""
    row_bytes, n_rows, x, x_bytes, n_slots = _arg(a, 2), _arg(a, 3), _arg(a, 6), _arg(a, 7), _arg(a, 11)
    y, y_bytes, ids, ids_row, n_used, n_tokens = _arg(a, 8), _arg(a, 9), _arg(a, 12), _arg(a, 13), _arg(a, 14), _arg(a, 15)
    n_experts = _arg(a, 10)
    columns, outputs = scratch, scratch + 8 * n_used * n_tokens
    for token in range(n_tokens):
        for slot in range(n_used):
            chosen = load32(ids + token * ids_row + 4 * slot)
            if chosen < 0 or chosen >= n_experts:
                atomic_store(control + BAD, _arg(a, 16) + 1)
                return
    for expert in range(n_experts):
        n = 0
        for token in range(n_tokens):
            for slot in range(n_used):
                if load32(ids + token * ids_row + 4 * slot) == expert:
                    store64(columns + 8 * n, x + (token * n_slots + slot % n_slots) * x_bytes)
                    store64(outputs + 8 * n, y + (token * n_used + slot) * y_bytes)
                    n += 1
        if n:
            _times(_arg(a, 0), _arg(a, 1) + expert * n_rows * row_bytes, row_bytes, n_rows, _arg(a, 4),
                             _arg(a, 5), columns, outputs, n, scratch + 16 * n_used * n_tokens, t, n_threads)  # fmt: skip


@njit(nogil=True)
def _store_halves(a, control, t, n_threads):  # type: ignore[no-untyped-def]
    ids, n_rows = _arg(a, 4), _arg(a, 2)
    for r in range(n_rows):
        row = load64(ids + 8 * r)
        if row < 0 or row >= _arg(a, 7):
            atomic_store(control + BAD, _arg(a, 8) + 1)
            return
    _halves(_arg(a, 0), _arg(a, 1), n_rows, _arg(a, 3), ids, _arg(a, 5), _arg(a, 6), t, n_threads)


@njit(nogil=True)
def _step(op, a, control, scratch, t, n_threads):  # type: ignore[no-untyped-def]
    if op == PRODUCT:
        _product(a, scratch, t, n_threads)
    elif op == QUANTIZE:
        _quantize(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), t, n_threads)
    elif op == ELEMENTWISE:
        _elementwise(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), _arg(a, 6), _arg(a, 7),
                         _arg(a, 8), _arg(a, 9), _float_arg(a, 10), _float_arg(a, 11), scratch, t, n_threads)  # fmt: skip
    elif op == RMS_NORM:
        _rms_norm(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), _arg(a, 6),
                      _float_arg(a, 7), t, n_threads)  # fmt: skip
    elif op == ATTEND:
        _attend(a, scratch, t, n_threads)
    elif op == MERGE:
        _merge_parts(a, scratch, t, n_threads)
    elif op == ROPE:
        _rope(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), _arg(a, 6), _arg(a, 7),
                  _arg(a, 8), _arg(a, 9), _arg(a, 10), _arg(a, 11), _arg(a, 12), t, n_threads)  # fmt: skip
    elif op == STORE_HALVES:
        _store_halves(a, control, t, n_threads)
    elif op == PRODUCT_ID:
        _product_id(a, control, scratch, t, n_threads)
    elif op == BY_ROW:
        _by_row(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), _arg(a, 6), _arg(a, 7),
                    _arg(a, 8), t, n_threads)  # fmt: skip
    elif op == SOFT_MAX:
        _soft_max(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), _float_arg(a, 6), t,
                      n_threads)  # fmt: skip
    elif op == TOP_K:
        _top_k(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), t, n_threads)
    elif op == GET_ROWS:
        if not _rows(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), _arg(a, 6),
                             _arg(a, 7), _arg(a, 8), _arg(a, 9), _arg(a, 10), t, n_threads):  # fmt: skip
            atomic_store(control + BAD, _arg(a, 11) + 1)
    elif op == SUM_ROWS:
        _sum_rows(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), t, n_threads)
    elif op == NORM:
        _norm(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), _float_arg(a, 6), t, n_threads)
    elif op == ADD_ID:
        if not _add_id(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), _arg(a, 6), _arg(a, 7),
                           _arg(a, 8), _arg(a, 9), _arg(a, 10), _arg(a, 11), t, n_threads):  # fmt: skip
            atomic_store(control + BAD, _arg(a, 12) + 1)
    elif op == UNPACK:
        if not _packed_rows(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), _arg(a, 6),
                                 _arg(a, 7), _arg(a, 8), _arg(a, 9), scratch, t, n_threads):  # fmt: skip
            atomic_store(control + BAD, _arg(a, 10) + 1)
    elif op == ROPE_TABLE:
        if not _rope_table(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), _arg(a, 6),
                               _arg(a, 7), t, n_threads):  # fmt: skip
            atomic_store(control + BAD, _arg(a, 8) + 1)
    elif op == ARANGE:
        _arange(_float_arg(a, 0), _float_arg(a, 1), _arg(a, 2), _arg(a, 3), t, n_threads)
    elif op == NARROW:
        _narrow(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), t, n_threads)
    elif op == WIDEN:
        _widen(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), _arg(a, 5), t, n_threads)
    elif op == ARGMAX:
        _largest(_arg(a, 0), _arg(a, 1), _arg(a, 2), _arg(a, 3), _arg(a, 4), t, n_threads)


@njit(nogil=True)
def _run(control, t, n_threads, futex):  # type: ignore[no-untyped-def]
    """One thread's share of the steps that the shared words name."""
    program, first, last = load64(control + PROGRAM), load64(control + FIRST), load64(control + LAST)
    scratch = load64(control + SCRATCH) + t * load64(control + SCRATCH_BYTES)
    profile = load64(control + PROFILE)
    clock = control + CLOCK
    for i in range(first, last):
        step = program + 8 * WORDS * i
        if n_threads > 1 and load64(step + 8):
            _meet(control, n_threads, futex)
        if profile != 0 and t == 0:
            start = _now_ns(clock)
            _step(load64(step), step + 16, control, scratch, t, n_threads)
            store64(profile + 8 * i, load64(profile + 8 * i) + _now_ns(clock) - start)
        else:
            _step(load64(step), step + 16, control, scratch, t, n_threads)
    if n_threads > 1:
        _meet(control, n_threads, futex)


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
