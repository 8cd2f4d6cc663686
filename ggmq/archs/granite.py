"""Granite 3 (IBM 2024): LLaMA's layers with multipliers on embeddings, attention, residuals and logits."""

from __future__ import annotations

from ggmq.archs.base import Arch, StageGraph
from ggmq.archs.builder import T


class Granite(Arch):
    def _multiplier(self, name: str) -> float:
        return self.gguf.number(f"{self.hp.arch}.{name}", 0.0)

    def embed_scale(self) -> float:
        return self._multiplier("embedding_scale") or 1.0

    def logit_scale(self) -> float:
        return 1.0 / (self._multiplier("logit_scale") or 1.0)

    def rotate(self, s: StageGraph, x: T, il: int, plain: bool = False) -> T:
        # in this family the key is the switch for positions, not a remark on training
        turned = self.gguf.boolean(f"{self.hp.arch}.rope.scaling.finetuned", True)
        return super().rotate(s, x, il, plain) if turned else x

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        residual = self._multiplier("residual_scale")

        def joined(y: T, x: T) -> T:
            return s.b.add(s.b.scale(y, residual) if residual else y, x)

        q, k, v = self.qkv(s, self.norm(s, f"blk.{il}.attn_norm", x), il)
        q, k = self.rotate(s, q, il), self.rotate(s, k, il)
        x = joined(self.attend(s, q, k, v, il, self.kq_scale()), x)
        h = self.norm(s, f"blk.{il}.ffn_norm", x)
        return joined(self.moe(s, h, il) if s.has(f"blk.{il}.ffn_gate_inp.weight") else self.ffn(s, h, il), x)
