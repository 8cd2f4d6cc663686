"""Qwen2 and Qwen2.5 (Yang et al. 2024): LLaMA's layers with biases on queries, keys and values."""

from __future__ import annotations

from ggmq.archs.base import NEOX, QKV, Arch
from ggmq.archs.builder import T
from ggmq.archs.stage import StageGraph


class Qwen2(Arch):
    rope_mode = NEOX
    biases = QKV | {"output"}

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        q, k, v = self.qkv(s, self.norm(s, f"blk.{il}.attn_norm", x), il)
        q, k = self.rotate(s, q, il), self.rotate(s, k, il)
        x = s.b.add(self.attend(s, q, k, v, il, self.kq_scale()), x)
        return s.b.add(self.ffn(s, self.norm(s, f"blk.{il}.ffn_norm", x), il), x)
