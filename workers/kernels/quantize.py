"""Block formats in NumPy, written: `quantize` for every type that an op can store.

Shapes: values float32 `(n, block)`, blocks uint8 `(n, block_bytes)`. Arithmetic is float32 in ggml's order, so the
blocks are ggml's own. Threads: pure functions.
Source: the reference rows of ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from protocol.dtypes import GGMLType
from protocol.errors import UnsupportedOp
from workers.kernels.quants import F32, KVALUES_IQ4NL, KVALUES_MXFP4, U8, Arr, T, e8m0_half, ue4m3

GROUP_MAX_EPS = np.float32(1e-15)
_QUANT: dict[int, Callable[[F32], U8]] = {}


def _quant(t: GGMLType) -> Callable[[Callable[[F32], U8]], Callable[[F32], U8]]:
    def add(f: Callable[[F32], U8]) -> Callable[[F32], U8]:
        _QUANT[t] = f
        return f

    return add


def quantize(type_id: int, values: F32) -> U8:
    """Blocks of values, as ggml's reference rows make them. Shapes: `(n, block)` to `(n, block_bytes)`.

    Errors: UnsupportedOp for a type that cannot be made without an importance matrix.
    """
    f = _QUANT.get(type_id)
    if f is None:
        raise UnsupportedOp(f"{GGMLType(type_id).name} cannot be written by an op; expected one of "
                            f"{sorted(GGMLType(t).name for t in _QUANT)}")  # fmt: skip
    with np.errstate(all="ignore"):
        return f(np.ascontiguousarray(values, np.float32))




def _bytes16(x: Arr) -> U8:
    return np.ascontiguousarray(x.astype(np.float16).reshape(-1, 1)).view(np.uint8)


def _round16(x: Arr) -> F32:
    return x.astype(np.float16).astype(np.float32)


def _pack_nibbles(q: Arr) -> U8:
    q = q.astype(np.uint8)
    half = q.shape[-1] // 2
    return q[..., :half] | (q[..., half:] << 4)


def _nearest(x: Arr) -> Arr:
    """Round half to even, which is what ggml's bit trick does."""
    return np.rint(x)


def _absmax_signed(x: F32) -> F32:
    """The element of largest magnitude of each row, with its sign (the first of equals)."""
    at = np.abs(x).argmax(-1)
    return np.take_along_axis(x, at[..., None], -1)


def _sum(x: F32) -> F32:
    """Row sums in ggml's order, one element after the other: the searches below compare them closely."""
    return np.add.accumulate(x, 1, dtype=np.float32)[:, -1:]


def _inverse(d: Arr) -> F32:
    return np.where(d != 0, np.float32(1) / np.where(d != 0, d, 1), 0).astype(np.float32)


@_quant(T.Q4_0)
def _q4_0(x: F32) -> U8:
    d = _absmax_signed(x) / np.float32(-8)
    q = np.clip(np.trunc(x * _inverse(d) + np.float32(8.5)), 0, 15)
    return np.concatenate([_bytes16(d), _pack_nibbles(q)], 1)


@_quant(T.Q4_1)
def _q4_1(x: F32) -> U8:
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    d = (high - low) / np.float32(15)
    q = np.clip(np.trunc((x - low) * _inverse(d) + np.float32(0.5)), 0, 15)
    return np.concatenate([_bytes16(d), _bytes16(low), _pack_nibbles(q)], 1)


def _pack5(q: Arr) -> tuple[U8, U8]:
    q = q.astype(np.uint8)
    return np.packbits(q >> 4, axis=1, bitorder="little"), _pack_nibbles(q & 15)


@_quant(T.Q5_0)
def _q5_0(x: F32) -> U8:
    d = _absmax_signed(x) / np.float32(-16)
    q = np.clip(np.trunc(x * _inverse(d) + np.float32(16.5)), 0, 31)
    return np.concatenate([_bytes16(d), *_pack5(q)], 1)


@_quant(T.Q5_1)
def _q5_1(x: F32) -> U8:
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    d = (high - low) / np.float32(31)
    q = np.clip(np.trunc((x - low) * _inverse(d) + np.float32(0.5)), 0, 31)
    return np.concatenate([_bytes16(d), _bytes16(low), *_pack5(q)], 1)


def _q8(x: F32) -> tuple[F32, Arr]:
    d = (np.abs(x).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    return d, _nearest(x * _inverse(d)).astype(np.int8)


@_quant(T.Q8_0)
def _q8_0(x: F32) -> U8:
    d, q = _q8(x)
    return np.concatenate([_bytes16(d), q.view(np.uint8)], 1)


def _best_fp4(x: F32, d: F32) -> U8:
    """Index of the first nearest E2M1 value for each element, by table search as ggml does it."""
    best = np.zeros(x.shape, np.uint8)
    err = np.abs(KVALUES_MXFP4[0] * d - x)
    for i in range(1, 16):
        e = np.abs(KVALUES_MXFP4[i] * d - x)
        better = e < err
        best[better], err = i, np.where(better, e, err)
    return best


@_quant(T.MXFP4)
def _mxfp4(x: F32) -> U8:
    amax = np.abs(x).max(1, keepdims=True)
    e = np.where(amax > 0, np.floor(np.log2(np.where(amax > 0, amax, 1))) - 2 + 127, 0).clip(0, 254).astype(np.uint8)
    return np.concatenate([e, _pack_nibbles(_best_fp4(x, e8m0_half(e)))], 1)


def _to_ue4m3(x: F32) -> U8:
    x = np.clip(x, 0, 448).astype(np.float32)
    bits = x.view(np.uint32)
    exp = ((bits >> 23) & 0xFF).astype(np.int32) - 120
    man = ((bits >> 20) & 7).astype(np.int32) + ((bits >> 19) & 1).astype(np.int32)
    exp_up, man = np.where(man > 7, exp + 1, exp), np.where(man > 7, 0, man)
    normal = np.where(exp_up >= 15, 0x7E, (exp_up << 3) | man)
    small = np.clip((x * 512 + np.float32(0.5)).astype(np.int32), 0, 7)
    return np.where(x <= 0, 0, np.where(exp <= 0, small, np.where(exp >= 15, 0x7E, normal))).astype(np.uint8)


@_quant(T.NVFP4)
def _nvfp4(x: F32) -> U8:
    x = x.reshape(-1, 4, 16)
    scale = _to_ue4m3(np.abs(x).max(2) / np.float32(6))
    q = _best_fp4(x, ue4m3(scale)[..., None])
    return np.concatenate([scale, _pack_nibbles(q).reshape(-1, 32)], 1)


@_quant(T.Q1_0)
def _q1_0(x: F32) -> U8:
    d = np.abs(x).sum(1, keepdims=True, dtype=np.float32) / np.float32(128)
    return np.concatenate([_bytes16(d), np.packbits(x >= 0, axis=1, bitorder="little")], 1)


@_quant(T.Q2_0)
def _q2_0(x: F32) -> U8:
    d = np.abs(x).max(1, keepdims=True)
    y = x * _inverse(d)
    q = (np.clip(np.trunc(y + np.copysign(np.float32(0.5), y)), -1, 2) + 1).astype(np.uint8).reshape(-1, 16, 4)
    return np.concatenate([_bytes16(d), q[..., 0] | q[..., 1] << 2 | q[..., 2] << 4 | q[..., 3] << 6], 1)


def _pack_crumbs(q: Arr) -> U8:
    q = q.astype(np.uint8).reshape(-1, 2, 4, 32)
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(-1, 64)


def _pack_scale_min_k4(scale: U8, low: U8) -> U8:
    s1, s2, m1, m2 = scale[:, :4], scale[:, 4:], low[:, :4], low[:, 4:]
    return np.concatenate([s1 | (s2 >> 4) << 6, m1 | (m2 >> 4) << 6, (s2 & 15) | (m2 & 15) << 4], 1)


def _ternary(x: F32) -> tuple[F32, U8]:
    d = np.abs(x).max(1, keepdims=True)
    y = x * _inverse(d)
    return d, (np.trunc(y + np.copysign(np.float32(0.5), y)) + 1).astype(np.uint8)


@_quant(T.TQ1_0)
def _tq1_0(x: F32) -> U8:
    d, q = _ternary(x)

    def pack(q: Arr, n: int, width: int) -> U8:
        digits = q.reshape(-1, n, width).astype(np.uint16)
        value = (digits * np.array([81, 27, 9, 3, 1], np.uint16)[:n].reshape(-1, 1)).sum(1)
        return ((value * 256 + 242) // 243).astype(np.uint8)

    return np.concatenate([pack(q[:, :160], 5, 32), pack(q[:, 160:240], 5, 16), pack(q[:, 240:], 4, 4), _bytes16(d)], 1)


@_quant(T.TQ2_0)
def _tq2_0(x: F32) -> U8:
    d, q = _ternary(x)
    return np.concatenate([_pack_crumbs(q), _bytes16(d)], 1)


def _fit_affine(
    x: F32, weights: F32, n_max: int, r_min: float, r_delta: float, n_step: int, use_mad: bool
) -> tuple[F32, F32, Arr]:
    """Weighted search for scale and minimum of each row: x is about scale * q - low, q in 0..n_max.

    Shapes: `x`, `weights` `(rows, n)`; returns `(rows, 1)`, `(rows, 1)`, `(rows, n)`.
    """
    f = np.float32
    least, high = np.minimum(x.min(1, keepdims=True), 0), x.max(1, keepdims=True)
    low, flat = least, high == least
    sum_w, sum_x = _sum(weights), _sum(weights * x)
    inv = f(n_max) / np.where(flat, f(1), high - low)
    scale = (f(1) / inv).astype(f)

    def error(scale: F32, low: F32, q: Arr) -> F32:
        diff = scale * q.astype(f) + low - x
        diff = np.abs(diff) if use_mad else diff * diff
        return _sum(weights * diff)

    q = np.clip(_nearest(inv * (x - low)), 0, n_max).astype(np.int32)
    best = error(scale, low, q)
    for step in range(n_step + 1):  # each round starts from the minimum that the best one so far has found
        inv = (f(r_min) + f(r_delta) * f(step) + f(n_max)) / np.where(flat, f(1), high - low)
        trial = np.clip(_nearest(inv * (x - low)), 0, n_max).astype(np.int32)
        lt = trial.astype(f)
        sum_l, sum_l2, sum_xl = _sum(weights * lt), _sum(weights * lt * lt), _sum(weights * lt * x)
        det = sum_w * sum_l2 - sum_l * sum_l
        s = (sum_w * sum_xl - sum_x * sum_l) / det
        m = (sum_l2 * sum_x - sum_l * sum_xl) / det
        positive = m > 0
        s, m = np.where(positive, sum_xl / sum_l2, s), np.where(positive, f(0), m)
        err = error(s, m, trial)
        better = (det > 0) & (err < best)
        best, scale, low = np.where(better, err, best), np.where(better, s, scale), np.where(better, m, low)
        q = np.where(better, trial, q)
    q = np.where(flat, 0, q)
    return np.where(flat, f(0), scale).astype(f), np.where(flat, -least, -low).astype(f), q


def _fit_symmetric(x: F32, n_max: int) -> F32:
    """Search for the scale of each row with weights x^2: x is about scale * q, q in -n_max..n_max-1."""
    f = np.float32
    peak = _absmax_signed(x)
    tiny = np.abs(peak) < GROUP_MAX_EPS
    safe = np.where(tiny, f(1), peak)
    w = x * x

    def sums(inv: F32) -> tuple[F32, F32]:
        q = np.clip(_nearest(inv * x), -n_max, n_max - 1).astype(f)
        return _sum(w * x * q), _sum(w * q * q)

    xl, l2 = sums(-f(n_max) / safe)
    scale = np.where(l2 > 0, xl / l2, f(0))
    best = scale * xl
    for step in range(-9, 10):
        if step == 0:
            continue
        xl, l2 = sums(-(f(n_max) + f(0.1) * f(step)) / safe)
        better = (l2 > 0) & (xl * xl > best * l2)
        scale = np.where(better, xl / l2, scale)
        best = np.where(better, scale * xl, best)
    return np.where(tiny, f(0), scale).astype(f)


def _fit_q3(x: F32) -> F32:
    """Scale of each row of 16 for Q3_K: coordinate descent over q in -4..3, five rounds at most."""
    f, n_max = np.float32, 4
    peak = _absmax_signed(x)[:, 0]
    tiny = np.abs(peak) < GROUP_MAX_EPS
    inv = -f(n_max) / np.where(tiny, f(1), peak)
    q = np.clip(_nearest(inv[:, None] * x), -n_max, n_max - 1).astype(f)
    w = x * x
    xl, l2 = _sum(w * x * q)[:, 0], _sum(w * q * q)[:, 0]
    moving = np.ones(len(x), bool)
    for _ in range(5):
        changed = np.zeros(len(x), bool)
        for i in range(x.shape[1]):
            wi, xi, qi = w[:, i], x[:, i], q[:, i]
            s_xl = xl - wi * xi * qi
            s_l2 = l2 - wi * qi * qi
            new = np.clip(_nearest(xi * s_l2 / s_xl), -n_max, n_max - 1)
            t_xl, t_l2 = s_xl + wi * xi * new, s_l2 + wi * new * new
            take = moving & (s_xl > 0) & (new != qi) & (t_l2 > 0) & (t_xl * t_xl * l2 > xl * xl * t_l2)
            q[:, i] = np.where(take, new, qi)
            xl, l2 = np.where(take, t_xl, xl), np.where(take, t_l2, l2)
            changed |= take
        moving &= changed
    return np.where(tiny | (l2 <= 0), f(0), xl / l2).astype(f)


def _requantize(x: Arr, d: Arr, low: Arr, q: Arr, n_max: int) -> Arr:
    """Elements again, against scales as they will be read; rows whose scale is 0 keep what the search gave."""
    again = np.clip(_nearest((x + low) / np.where(d == 0, 1, d)), 0, n_max)
    return np.where(d == 0, q, again)


@_quant(T.Q2_K)
def _q2_k(x: F32) -> U8:
    x = x.reshape(-1, 16)
    scale, low, q = _fit_affine(x, np.abs(x), 3, -0.5, 0.1, 15, True)
    scale, low = scale.reshape(-1, 16), low.reshape(-1, 16)
    ps, pl = scale.max(1, keepdims=True), low.max(1, keepdims=True)
    s = np.where(ps > 0, _nearest(np.float32(15) * _inverse(ps) * scale), 0).clip(0, 15).astype(np.uint8)
    m = np.where(pl > 0, _nearest(np.float32(15) * _inverse(pl) * low), 0).clip(0, 15).astype(np.uint8)
    d = np.where(ps > 0, ps / np.float32(15), 0)
    dmin = np.where(pl > 0, pl / np.float32(15), 0)
    q = _requantize(x.reshape(-1, 16, 16), (_round16(d) * s)[..., None], (_round16(dmin) * m)[..., None],
                    q.reshape(-1, 16, 16), 3)  # fmt: skip
    return np.concatenate([s | m << 4, _pack_crumbs(q), _bytes16(d), _bytes16(dmin)], 1)


@_quant(T.Q3_K)
def _q3_k(x: F32) -> U8:
    scales = _fit_q3(x.reshape(-1, 16)).reshape(-1, 16)
    peak = _absmax_signed(scales)
    inv = np.float32(-32) * _inverse(peak)
    s = (np.clip(_nearest(inv * scales), -32, 31) + 32).astype(np.uint8)
    s = np.where(peak != 0, s, 0).astype(np.uint8)
    d = _inverse(inv)
    step = (_round16(d) * (s.astype(np.float32) - 32))[..., None]
    q = np.clip(_nearest(x.reshape(-1, 16, 16) / np.where(step == 0, 1, step)), -4, 3) + 4
    q = np.where(step == 0, 4, q).astype(np.uint8).reshape(-1, 256)
    hmask = ((q > 3).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8).reshape(8, 1)).sum(1, dtype=np.uint8)
    high = (s >> 4).reshape(-1, 4, 4)
    packed = np.concatenate([(s[:, :8] & 15) | (s[:, 8:] & 15) << 4,
                             high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6], 1)  # fmt: skip
    return np.concatenate([hmask, _pack_crumbs(np.where(q > 3, q - 4, q)), packed.astype(np.uint8), _bytes16(d)], 1)


def _quant_affine_k(x: F32, n_max: int, r_min: float, n_step: int) -> tuple[U8, Arr]:
    x = x.reshape(-1, 32)
    weights = np.sqrt(_sum(x * x) / np.float32(32)) + np.abs(x)
    scale, low, q = _fit_affine(x, weights.astype(np.float32), n_max, r_min, 0.1, n_step, False)
    scale, low = scale.reshape(-1, 8), low.reshape(-1, 8)
    ps, pl = scale.max(1, keepdims=True), low.max(1, keepdims=True)
    is_, im = (np.where(p > 0, np.float32(63) * _inverse(p), np.float32(0)) for p in (ps, pl))
    s = np.clip(_nearest(is_ * scale), 0, 63).astype(np.uint8)
    m = np.clip(_nearest(im * low), 0, 63).astype(np.uint8)
    d, dmin = ps / np.float32(63), pl / np.float32(63)
    q = _requantize(x.reshape(-1, 8, 32), (_round16(d) * s)[..., None], (_round16(dmin) * m)[..., None],
                    q.reshape(-1, 8, 32), n_max)  # fmt: skip
    head = np.concatenate([_bytes16(d), _bytes16(dmin), _pack_scale_min_k4(s, m)], 1)
    return head, q.astype(np.uint8).reshape(-1, 4, 64)


@_quant(T.Q4_K)
def _q4_k(x: F32) -> U8:
    head, q = _quant_affine_k(x, 15, -1.0, 20)
    return np.concatenate([head, _pack_nibbles(q).reshape(-1, 128)], 1)


@_quant(T.Q5_K)
def _q5_k(x: F32) -> U8:
    head, q = _quant_affine_k(x, 31, -0.5, 15)
    high = ((q >> 4).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8).reshape(8, 1)).sum(1, dtype=np.uint8)
    return np.concatenate([head, high, _pack_nibbles(q & 15).reshape(-1, 128)], 1)


@_quant(T.Q6_K)
def _q6_k(x: F32) -> U8:
    scales = _fit_symmetric(x.reshape(-1, 16), 32).reshape(-1, 16)
    peak = _absmax_signed(scales)
    inv = np.where(np.abs(peak) < GROUP_MAX_EPS, np.float32(0), np.float32(-128) * _inverse(peak))
    d = _inverse(inv)
    s = np.minimum(127, _nearest(inv * scales)).astype(np.int8)
    step = (_round16(d) * s.astype(np.float32))[..., None]
    q = np.clip(_nearest(x.reshape(-1, 16, 16) / np.where(step == 0, 1, step)), -32, 31) + 32
    q = np.where(inv[..., None] == 0, 0, np.where(step == 0, 32, q)).astype(np.uint8).reshape(-1, 2, 4, 32)
    ql = np.concatenate([q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4], 2).reshape(-1, 128)
    h = q >> 4
    qh = (h[:, :, 0] | h[:, :, 1] << 2 | h[:, :, 2] << 4 | h[:, :, 3] << 6).reshape(-1, 64)
    return np.concatenate([ql, qh, s.view(np.uint8), _bytes16(d)], 1)


def _nearest_iq4(y: F32) -> Arr:
    """Index of the nearest table value; of two equally near the larger."""
    middle = (KVALUES_IQ4NL[1:] + KVALUES_IQ4NL[:-1]) / 2
    return np.searchsorted(middle, y, side="right")


def _fit_iq4(x: F32, n_try: int) -> F32:
    """Scale of each row of 32 for the non-linear 4-bit table, weights x^2."""
    f, w = np.float32, x * x
    peak = _absmax_signed(x)
    tiny = np.abs(peak) < GROUP_MAX_EPS
    safe = np.where(tiny, f(1), peak)

    def sums(inv: F32) -> tuple[F32, F32]:
        q = KVALUES_IQ4NL[_nearest_iq4(inv * x)]
        return _sum(w * q * x), _sum(w * q * q)

    first = -safe / KVALUES_IQ4NL[0] if n_try > 0 else safe / KVALUES_IQ4NL[0]
    xl, l2 = sums(f(1) / first)
    d = xl / l2
    best = d * xl
    for step in range(-n_try, n_try + 1) if n_try > 0 else ():
        xl, l2 = sums((f(step) + KVALUES_IQ4NL[0]) / safe)
        better = (l2 > 0) & (xl * xl > best * l2)
        d = np.where(better, xl / l2, d)
        best = np.where(better, d * xl, best)
    return np.where(tiny, f(0), d).astype(f)


@_quant(T.IQ4_NL)
def _iq4_nl(x: F32) -> U8:
    d = _fit_iq4(x, 0)
    peak = _absmax_signed(x)
    # ggml keeps the indices of its first pass here; they were made with max / values[0], not with the fitted scale
    q = _nearest_iq4(x * _inverse(peak / KVALUES_IQ4NL[0]))
    return np.concatenate([_bytes16(d), _pack_nibbles(np.where(np.abs(peak) < GROUP_MAX_EPS, 0, q))], 1)


@_quant(T.IQ4_XS)
def _iq4_xs(x: F32) -> U8:
    scales = _fit_iq4(x.reshape(-1, 32), 7).reshape(-1, 8)
    d = -_absmax_signed(scales) / np.float32(32)
    s = np.clip(_nearest(_inverse(d) * scales), -32, 31)
    q = _nearest_iq4(_inverse(d * s)[..., None] * x.reshape(-1, 8, 32))
    u = (s + 32).astype(np.uint8)
    low = (u[:, 0::2] & 15) | (u[:, 1::2] & 15) << 4
    high = ((u >> 4).astype(np.uint16) << (2 * np.arange(8, dtype=np.uint16))).sum(1, dtype=np.uint16)
    return np.concatenate([_bytes16(d), high.reshape(-1, 1).view(np.uint8), low, _pack_nibbles(q).reshape(-1, 128)], 1)
