"""LLaMA (Touvron et al. 2023), Mistral 7B, and Mixtral's mixture of experts (Jiang et al. 2024)."""

from __future__ import annotations

from ggmq.archs.base import Arch, StageGraph
from ggmq.archs.builder import T


class Llama(Arch):
    def layer(self, s: StageGraph, x: T, il: int) -> T:
        h = self.norm(s, f"blk.{il}.attn_norm", x)
        q, k, v = self.qkv(s, h, il)
        q, k = self.rotate(s, q, il), self.rotate(s, k, il)
        x = s.b.add(self.attend(s, q, k, v, il, self.kq_scale()), x)
        h = self.norm(s, f"blk.{il}.ffn_norm", x)
        y = self.moe(s, h, il) if s.has(f"blk.{il}.ffn_gate_inp.weight") else self.ffn(s, h, il)
        return s.b.add(y, x)
