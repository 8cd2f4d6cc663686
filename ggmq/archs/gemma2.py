"""Gemma 2 (Riviere et al. 2024): windows on every other layer, soft caps, norms before and after each half."""

from __future__ import annotations

import math

from ggmq.archs.base import NEOX, Arch
from ggmq.archs.builder import T
from ggmq.archs.stage import StageGraph


class Gemma2(Arch):
    rope_mode = NEOX
    turns_part = True
    swa_period = 2
    tied: bool | None = True
    large_n_layer = 46
    """Layers of the largest size, whose queries are scaled by n_embd / n_head instead of the head's width."""

    def embed_scale(self) -> float:
        return math.sqrt(self.hp.n_embd)

    def kq_scale(self) -> float:
        hp = self.hp
        return 1.0 / math.sqrt(hp.n_embd // hp.n_head[0] if hp.n_layer == self.large_n_layer else hp.d_k)

    def attention(self, s: StageGraph, x: T, il: int) -> T:
        q, k, v = self.qkv(s, x, il)
        q, k = self.rotate(s, q, il), self.rotate(s, k, il)
        return self.attend(s, q, k, v, il, self.kq_scale(), self.hp.attn_softcap)

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        p = f"blk.{il}."
        y = self.attention(s, self.norm(s, p + "attn_norm", x), il)
        x = s.b.add(self.norm(s, p + "post_attention_norm", y), x)
        y = self.ffn(s, self.norm(s, p + "ffn_norm", x), il, "GEGLU")
        return s.b.add(self.norm(s, p + "post_ffw_norm", y), x)
