"""gpt-oss (OpenAI 2025): attention sinks, windows on every other layer, experts with a clamped SwiGLU."""

from __future__ import annotations

from ggmq.archs.base import NEOX, Arch
from ggmq.archs.builder import GraphBuilder, T
from ggmq.archs.stage import StageGraph


def clamped_swiglu(b: GraphBuilder, gate: T, up: T) -> T:
    return b.glu("SWIGLU_OAI", gate, up, alpha=1.702, limit=7.0)


class GptOss(Arch):
    rope_mode = NEOX
    swa_period = 2
    tied = False
    needs_biases = frozenset({"attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"})

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        hp, p = self.hp, f"blk.{il}."
        q, k, v = self.qkv(s, self.norm(s, p + "attn_norm", x), il)
        q, k = self.rotate(s, q, il), self.rotate(s, k, il)
        sinks = s.w(p + "attn_sinks.weight", hp.n_head[il])
        x = s.b.add(self.attend(s, q, k, v, il, self.kq_scale(), sinks=sinks), x)
        h = self.norm(s, p + "post_attention_norm", x)
        return s.b.add(self.moe(s, h, il, hp.n_ff_exp, softmax_weight=True, act=clamped_swiglu), x)
