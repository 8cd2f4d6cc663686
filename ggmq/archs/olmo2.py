"""OLMo 2 and OLMo 3 (Team OLMo 2024, 2025): norms after each half, and on the whole of queries and keys."""

from __future__ import annotations

from ggmq.archs.base import NEOX, Arch, StageGraph
from ggmq.archs.builder import T


class Olmo2(Arch):
    rope_mode = NEOX
    swa_period = 4

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        hp, b, p = self.hp, s.b, f"blk.{il}."
        n = b.ne(x)[1]
        q = self.norm(s, p + "attn_q_norm", s.linear(p + "attn_q", x))
        k = self.norm(s, p + "attn_k_norm", s.linear(p + "attn_k", x))
        v = b.reshape(s.linear(p + "attn_v", x), hp.d_v, hp.n_head_kv[il], n)
        plain = self.swa_layers[il]
        q = self.rotate(s, b.reshape(q, hp.d_k, hp.n_head[il], n), il, plain)
        k = self.rotate(s, b.reshape(k, hp.d_k, hp.n_head_kv[il], n), il, plain)
        y = self.attend(s, q, k, v, il, self.kq_scale())
        x = b.add(self.norm(s, p + "post_attention_norm", y), x)
        return b.add(self.norm(s, p + "post_ffw_norm", self.ffn(s, x, il)), x)
