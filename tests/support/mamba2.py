"""Mamba-2 a token at a time in float64, as Dao and Gu 2024 write it: what graphs are held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.random_models import Model

Array = npt.NDArray[np.float64]


def logits(m: Model, tokens: Sequence[int]) -> Array:
    """Logits after each token. Shapes: (n_tokens, n_vocab)."""
    k = m.keys
    eps, n_layer = float(np.float32(k["attention.layer_norm_rms_epsilon"])), k["block_count"]
    w = {name: x.astype(np.float64) for name, x in m.tensors.items()}
    layers = [_Layer(k, {n.removeprefix(f"blk.{i}."): x for n, x in w.items() if n.startswith(f"blk.{i}.")}, eps)
              for i in range(n_layer)]  # fmt: skip
    out = []
    for token in tokens:
        x = w["token_embd.weight"][token]
        for layer in layers:
            x = x + layer.step(x)
        out.append(w.get("output.weight", w["token_embd.weight"]) @ (_normed(x, eps) * w["output_norm.weight"]))
    return np.stack(out)


def _normed(x: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


class _Layer:
    def __init__(self, keys: dict[str, Any], w: dict[str, Array], eps: float) -> None:
        self.w, self.eps = w, eps
        self.d_inner, self.n_head, self.n_group, self.d_state = (
            keys["ssm." + name] for name in ("inner_size", "time_step_rank", "group_count", "state_size"))  # fmt: skip
        self.seen = np.zeros((keys["ssm.conv_kernel"], self.d_inner + 2 * self.n_group * self.d_state))
        self.state = np.zeros((self.n_head, self.d_inner // self.n_head, self.d_state))

    def step(self, x: Array) -> Array:
        w = self.w
        projected = w["ssm_in.weight"] @ (_normed(x, self.eps) * w["attn_norm.weight"])
        z, channels, dt = np.split(projected, [self.d_inner, self.d_inner + self.seen.shape[1]])
        self.seen = np.concatenate([self.seen[1:], channels[None]])
        mixed = _silu((self.seen * w["ssm_conv1d.weight"].T).sum(0) + w["ssm_conv1d.bias"])
        inner, b, c = np.split(mixed, [self.d_inner, self.d_inner + self.n_group * self.d_state])
        dt = np.log1p(np.exp(dt + w["ssm_dt.bias"]))
        y = np.empty_like(self.state[:, :, 0])
        for h in range(self.n_head):
            at = h * self.n_group // self.n_head * self.d_state
            group = slice(at, at + self.d_state)
            of_head = inner.reshape(self.n_head, -1)[h]
            self.state[h] = np.exp(dt[h] * w["ssm_a"][h, 0]) * self.state[h] + dt[h] * np.outer(of_head, b[group])
            y[h] = self.state[h] @ c[group] + w["ssm_d"][h, 0] * of_head
        gated = (y.reshape(-1) * _silu(z)).reshape(self.n_group, -1)
        return w["ssm_out.weight"] @ (_normed(gated, self.eps) * w["ssm_norm.weight"]).reshape(-1)
