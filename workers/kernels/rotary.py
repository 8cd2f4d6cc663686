"""Rotary positions: by what angle a position turns each pair of a row. `p` are ROPE's parameters by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from protocol.rules import ROPE_IMROPE, ROPE_MROPE, ROPE_VISION
from workers.tensors import Array


def rope_angles(p: dict[str, Any], ne0: int, positions: Array, factors: Array | None) -> tuple[Array, Array, float]:
    """Cosine and sine for each token and pair, and the magnitude they carry.

    Shapes: `positions` [n_tokens] or [4 * n_tokens]; both results (n_tokens, n_pairs). `ne0`: elements of a row.
    Source: Su et al. (RoPE), Peng et al. (YaRN), Wang et al. (M-RoPE, Qwen2-VL).
    """
    mode = p["mode"]
    which, exponent = rope_kinds(p, ne0 // 2 if mode == ROPE_VISION else p["n_dims"] // 2)
    kinds = positions.reshape(4 if mode & ROPE_MROPE else 1, -1).astype(np.float64)
    pos = kinds[which].T
    turn, magnitude = rope_turn(p, factors, exponent)
    angle = pos * turn
    return np.cos(angle) * magnitude, np.sin(angle) * magnitude, magnitude


def rope_kinds(p: dict[str, Any], n_pairs: int) -> tuple[Array, Array]:
    """Which of a token's positions each pair goes by, and its exponent. Shapes: both (n_pairs,). Source: as
    `rope_angles`.
    """
    mode, pair = p["mode"], np.arange(n_pairs)
    if not mode & ROPE_MROPE:
        return np.zeros(n_pairs, np.int64), pair.astype(np.float64)
    s = [p[f"section_{i}"] for i in range(4)]
    sector, edge = pair % sum(s), np.cumsum(s)
    if mode == ROPE_IMROPE:
        which = np.full(n_pairs, 3)
        for i in range(3):
            which[(sector % 3 == i) & (sector < 3 * s[i])] = i
    else:
        which = np.minimum(np.searchsorted(edge, sector, side="right"), 3)
    if mode == ROPE_VISION:  # every section starts its frequencies anew
        return which, (sector - np.concatenate([[0], edge[:3]])[which]).astype(np.float64)
    return which, pair.astype(np.float64)


def rope_turn(p: dict[str, Any], factors: Array | None, exponent: Array) -> tuple[Array, float]:
    """The angle by which one position turns each pair, and the magnitude of what is turned.

    Shapes: `exponent` and the result (n_pairs,). Source: as `rope_angles`.
    """
    n_pairs = len(exponent)
    n_dims, base = p["n_dims"], float(p["freq_base"])
    theta = base ** (-2.0 * exponent / n_dims)
    if factors is not None:
        theta = theta / factors.reshape(-1)[:n_pairs]
    scale, ext, magnitude = float(p["freq_scale"]), float(p["ext_factor"]), float(p["attn_factor"])
    turn = scale * theta
    if ext != 0:
        low, high = yarn_correction(n_dims, p["n_ctx_orig"], base, p["beta_fast"], p["beta_slow"])
        ramp = (1 - np.clip((np.arange(n_pairs) - low) / max(0.001, high - low), 0, 1)) * ext
        turn = turn * (1 - ramp) + theta * ramp
        magnitude *= 1 + 0.1 * math.log(1 / scale)
    return turn, magnitude


def yarn_correction(n_dims: int, n_ctx_orig: int, base: float, fast: float, slow: float) -> tuple[float, float]:
    """The dimensions between which YaRN passes from extrapolation to interpolation."""

    def dim(n_rotations: float) -> float:
        ratio = n_ctx_orig / (n_rotations * 2 * math.pi)
        return n_dims * math.log(ratio) / (2 * math.log(base)) if ratio > 0 else -math.inf

    start, end = dim(fast), dim(slow)
    low = max(0.0, math.floor(start) if math.isfinite(start) else start)
    return low, min(n_dims - 1.0, math.ceil(end) if math.isfinite(end) else end)
