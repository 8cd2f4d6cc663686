"""Phi-3 (Abdin et al. 2024): fused projections, and rope factors for short and for long contexts (LongRoPE)."""

from __future__ import annotations

from ggmq.archs.base import NEOX, Arch
from ggmq.archs.builder import T
from ggmq.archs.stage import StageGraph


class Phi3(Arch):
    rope_mode = NEOX
    turns_part = True

    def rope_factors(self, s: StageGraph) -> T | None:
        return self.long_rope_factors(s)

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        q, k, v = self.qkv(s, self.norm(s, f"blk.{il}.attn_norm", x), il)
        q, k = self.rotate(s, q, il), self.rotate(s, k, il)
        x = s.b.add(self.attend(s, q, k, v, il, self.kq_scale()), x)
        return s.b.add(self.ffn_without_gate(s, self.norm(s, f"blk.{il}.ffn_norm", x), il, "SWIGLU"), x)
