"""Qwen3's mixture of experts (Yang et al. 2025)."""

from __future__ import annotations

from ggmq.archs.base import StageGraph
from ggmq.archs.builder import T
from ggmq.archs.qwen3 import Qwen3


class Qwen3MoE(Qwen3):
    unused = frozenset()

    def feed_forward(self, s: StageGraph, x: T, il: int) -> T:
        hp = self.hp
        if not hp.n_expert:
            raise self.keys.wrong("expert_count", "at least one expert", 0)
        n_ff = hp.n_ff_exp or self.n_ff(il) // hp.n_expert_used
        s.w(f"blk.{il}.ffn_gate_exps.weight", hp.n_embd, n_ff, hp.n_expert)  # without it `moe` would do as well
        return self.moe(s, x, il, n_ff)
