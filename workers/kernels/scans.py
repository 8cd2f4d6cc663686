"""Convolutions and recurrences over tokens, each a thread's share of the channels or of the rows of states.

Units: addresses and counts; `_row`, `_head`, `_token` and `_seq` strides in bytes. The sums of a token run in an order of
their own, and a state is float32 between tokens, so neither where a text is cut nor what else is in a batch changes a bit.
Source: Dao and Gu 2024 (Mamba-2); `recurrent` has the definitions.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit

from workers.kernels.simd import as_floats, load32, loadf, storef


@njit(nogil=True)
def concat(  # type: ignore[no-untyped-def]
    x, x_step, x_row, x_plane, n_x, z, z_step, z_row, z_plane, n_z, y, n_rows, n_planes, t, n_threads
):  # fmt: skip
    work = n_rows * n_planes
    for i in range(work * t // n_threads, work * (t + 1) // n_threads):
        p, r, d = i // n_rows, i % n_rows, carray(as_floats(y + 4 * (n_x + n_z) * i), n_x + n_z)
        for j in range(n_x):
            d[j] = loadf(x + p * x_plane + r * x_row + j * x_step)
        for j in range(n_z):
            d[n_x + j] = loadf(z + p * z_plane + r * z_row + j * z_step)


@njit(nogil=True)
def ssm_conv(x, x_row, x_seq, w, w_row, y, d_conv, n_channels, n_tokens, n_seqs, t, n_threads):  # type: ignore[no-untyped-def]
    for i in range(n_seqs * n_channels * t // n_threads, n_seqs * n_channels * (t + 1) // n_threads):
        seq, c = i // n_channels, i % n_channels
        a = carray(as_floats(x + seq * x_seq + c * x_row), n_tokens + d_conv - 1)
        f = carray(as_floats(w + c * w_row), d_conv)
        d = y + 4 * (seq * n_tokens * n_channels + c)
        for j in range(n_tokens):
            total = np.float32(0)
            for k in range(d_conv):
                total += a[j + k] * f[k]
            storef(d + 4 * j * n_channels, total)


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _recur(h, decay, dx, b, c):  # type: ignore[no-untyped-def]
    """One element of a head goes on by a token: its state [d_state], and what is read from it."""
    total = np.float32(0)
    for j in range(h.shape[0]):
        h[j] = decay * h[j] + dx * b[j]
        total += h[j] * c[j]
    return total


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _recur_by_state(h, d, a, dx, b, c):  # type: ignore[no-untyped-def]
    """The same where each number of the state decays by its own `a`."""
    total = np.float32(0)
    for j in range(h.shape[0]):
        h[j] = np.float32(math.exp(d * a[j])) * h[j] + dx * b[j]
        total += h[j] * c[j]
    return total


@njit(nogil=True)
def ssm_scan(  # type: ignore[no-untyped-def]
    state, n_slots, x, x_head, x_token, x_seq, dt, a, n_a, b, c, group, token, seq, ids, y, d_state, d_head, n_head, n_group,
    n_tokens, n_seqs, n_states, t, n_threads,
):  # fmt: skip
    """False: an id points outside; nothing is written then, whatever the others do."""
    for s in range(n_seqs):
        slot = load32(ids + 4 * s)
        if slot < 0 or slot >= n_slots:
            return False
    n_rows = n_seqs * n_head * d_head
    states = y + 4 * n_rows * n_tokens
    each = 4 * d_state
    i, end = n_rows * t // n_threads, n_rows * (t + 1) // n_threads
    while i < end:  # the rows of one head together: they share its step and its decay
        unit = i // d_head
        s, head = unit // n_head, unit % n_head
        last = min(end, (unit + 1) * d_head)
        old = state + each * ((load32(ids + 4 * s) * n_head + head) * d_head - unit * d_head)
        for r in range(i, last):
            u, v = carray(as_floats(old + each * r), d_state), carray(as_floats(states + each * r), d_state)
            for j in range(d_state):
                v[j] = u[j]
        own, of_group = carray(as_floats(a + 4 * n_a * head), n_a), head // (n_head // n_group)
        for k in range(n_tokens):
            raw = np.float64(loadf(dt + 4 * ((s * n_tokens + k) * n_head + head)))
            d = np.float32(raw if raw > 20.0 else math.log1p(math.exp(raw)))
            decay = np.float32(math.exp(d * own[0]))
            at = s * seq + k * token + of_group * group
            to, out = carray(as_floats(b + at), d_state), carray(as_floats(c + at), d_state)
            xs = x + s * x_seq + k * x_token + head * x_head
            ys = y + 4 * ((s * n_tokens + k) * n_head + head) * d_head
            for r in range(i, last):
                h, e = carray(as_floats(states + each * r), d_state), 4 * (r - unit * d_head)
                dx = d * loadf(xs + e)
                storef(ys + e, _recur(h, decay, dx, to, out) if n_a == 1 else _recur_by_state(h, d, own, dx, to, out))
            later = n_tokens - 1 - k
            if 0 < later < n_states:
                for r in range(i, last):
                    u = carray(as_floats(states + each * r), d_state)
                    v = carray(as_floats(states + each * (later * n_rows + r)), d_state)
                    for j in range(d_state):
                        v[j] = u[j]
        for k in range(n_tokens, n_states):
            for r in range(i, last):
                v = carray(as_floats(states + each * (k * n_rows + r)), d_state)
                for j in range(d_state):
                    v[j] = np.float32(0)
        i = last
    return True
