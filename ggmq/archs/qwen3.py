"""Qwen3 (Yang et al. 2025): every head's queries and keys are normalised before they are turned."""

from __future__ import annotations

from ggmq.archs.base import NEOX, Arch
from ggmq.archs.builder import T
from ggmq.archs.stage import StageGraph


class Qwen3(Arch):
    rope_mode = NEOX

    @property
    def unused(self) -> frozenset[str]:
        return frozenset({"cls.output.weight"})  # of the reranker's head

    def feed_forward(self, s: StageGraph, x: T, il: int) -> T:
        return self.ffn(s, x, il)

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        h = self.norm(s, f"blk.{il}.attn_norm", x)
        q, k, v = self.qkv(s, h, il)
        q = self.rotate(s, self.norm(s, f"blk.{il}.attn_q_norm", q), il)
        k = self.rotate(s, self.norm(s, f"blk.{il}.attn_k_norm", k), il)
        x = s.b.add(self.attend(s, q, k, v, il, self.kq_scale()), x)
        return s.b.add(self.feed_forward(s, self.norm(s, f"blk.{il}.ffn_norm", x), il), x)
