"""Granite 3 (IBM 2024): LLaMA's layers with multipliers on embeddings, attention, residuals and logits."""

from __future__ import annotations

from ggmq.archs.builder import T
from ggmq.archs.llama import Llama
from ggmq.archs.stage import StageGraph


class Granite(Llama):
    def embed_scale(self) -> float:
        return self.keys.number("embedding_scale") or 1.0

    def logit_scale(self) -> float:
        scale = self.keys.number("logit_scale")
        if not scale:
            raise self.keys.wrong("logit_scale", "what logits are divided by", 0)
        return 1.0 / scale

    @property
    def turned(self) -> bool:
        """In this family the key is the switch for positions, not a remark on training."""
        return self.keys.boolean("rope.scaling.finetuned")

    @property
    def unused(self) -> frozenset[str]:
        return frozenset() if self.turned else self.rope_tensors

    def rotate(self, s: StageGraph, x: T, il: int) -> T:
        return super().rotate(s, x, il) if self.turned else x

    def experts(self, s: StageGraph, x: T, il: int) -> T:
        y, p, n = super().experts(s, x, il), f"blk.{il}.", self.hp.n_ff_shexp
        if not n:
            return y
        act = s.b.glu("SWIGLU", s.linear(p + "ffn_gate_shexp", x, n), s.linear(p + "ffn_up_shexp", x, n))
        return s.b.add(y, s.linear(p + "ffn_down_shexp", act, self.hp.n_embd))

    def joined(self, s: StageGraph, y: T, x: T) -> T:
        residual = self.keys.number("residual_scale")
        return s.b.add(s.b.scale(y, residual) if residual else y, x)
