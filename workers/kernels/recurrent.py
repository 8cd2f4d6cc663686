"""Ops with a state that goes from token to token, in float64: the definitions behind the reference kernels.

Shapes: NumPy order. Source: Gu and Dao 2023 (Mamba), Dao and Gu 2024 (Mamba-2); ggml-cpu/ops.cpp for the layouts.
"""

from __future__ import annotations

import numpy as np

from workers.tensors import Array


def softplus(x: Array) -> Array:
    return np.where(x > 20, x, np.log1p(np.exp(x)))


def causal_conv(x: Array, w: Array) -> Array:
    """One filter a channel over tokens: y[s, t, c] = sum over k of x[s, c, t + k] * w[c, k].

    Shapes: `x` (n_seqs, n_channels, d_conv - 1 + n_tokens), `w` (n_channels, d_conv); the result (n_seqs, n_tokens,
        n_channels).
    """
    d_conv = w.shape[1]
    n_tokens = x.shape[2] - d_conv + 1
    y = np.zeros((x.shape[0], n_tokens, x.shape[1]))
    for k in range(d_conv):
        y += x[:, :, k : k + n_tokens].swapaxes(1, 2) * w[:, k]
    return y


def selective_scan(
    state: Array, x: Array, dt: Array, a: Array, b: Array, c: Array, n_states: int
) -> tuple[Array, Array]:
    """For each token, h = exp(d a) h + d x b and y = h c, where d = softplus(dt); a group of heads shares b and c.

    Shapes: `state` (n_seqs, n_head, d_head, d_state), `x` (n_seqs, n_tokens, n_head, d_head), `dt` (n_seqs, n_tokens,
        n_head), `a` (n_head, d_state or 1), `b` and `c` (n_seqs, n_tokens, n_group, d_state). Returns y as x, and (n_states,
        n_seqs, n_head, d_head, d_state): the states after the last token, after the one before it, and so on; zeros where
        there were fewer tokens.
    """
    n_tokens, n_head = x.shape[1:3]
    d = softplus(dt)
    decay = np.exp(d[..., None] * a)[:, :, :, None, :]
    dx = (d[..., None] * x)[..., None]
    each = n_head // b.shape[2]
    y = np.empty(x.shape)
    states = np.zeros((n_states, *state.shape))
    for t in range(n_tokens):
        state = decay[:, t] * state + dx[:, t] * b[:, t].repeat(each, 1)[:, :, None, :]
        y[:, t] = (state * c[:, t].repeat(each, 1)[:, :, None, :]).sum(-1)
        # as it is kept between batches, so that where a text was cut changes nothing
        state = state.astype(np.float32).astype(np.float64)
        if n_tokens - t <= n_states:
            states[n_tokens - t - 1] = state
    return y, states
