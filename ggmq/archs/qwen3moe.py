"""Qwen3's mixture of experts (Yang et al. 2025)."""

from __future__ import annotations

from ggmq.archs.builder import T
from ggmq.archs.qwen3 import Qwen3
from ggmq.archs.stage import StageGraph


class Qwen3MoE(Qwen3):
    @property
    def unused(self) -> frozenset[str]:
        return frozenset()

    def feed_forward(self, s: StageGraph, x: T, il: int) -> T:
        hp = self.hp
        n_ff = hp.n_ff_exp or self.n_ff(il) // max(1, hp.n_expert_used)
        y = self.moe(s, x, il, n_ff)
        s.w(f"blk.{il}.ffn_gate_exps.weight", hp.n_embd, n_ff, hp.n_expert)  # without it `moe` does as well
        return y
