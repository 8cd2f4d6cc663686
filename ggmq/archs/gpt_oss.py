"""gpt-oss (OpenAI 2025): attention sinks, windows on every other layer, experts with a clamped SwiGLU."""

from __future__ import annotations

from ggmq.archs.base import NEOX, Arch, StageGraph
from ggmq.archs.builder import GraphBuilder, T


def clamped_swiglu(b: GraphBuilder, gate: T, up: T) -> T:
    return b.glu("SWIGLU_OAI", gate, up, alpha=1.702, limit=7.0)


class GptOss(Arch):
    rope_mode = NEOX
    swa_period = 2

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        p = f"blk.{il}."
        q, k, v = self.qkv(s, self.norm(s, p + "attn_norm", x), il)
        q, k = self.rotate(s, q, il), self.rotate(s, k, il)
        y = self.attend(s, q, k, v, il, self.kq_scale(), sinks=s.w(p + "attn_sinks.weight"))
        x = s.b.add(y, x)
        h = self.norm(s, p + "post_attention_norm", x)
        return s.b.add(self.moe(s, h, il, softmax_weight=True, act=clamped_swiglu), x)
