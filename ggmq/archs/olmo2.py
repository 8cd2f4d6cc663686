"""OLMo 2 and OLMo 3 (Team OLMo 2024, 2025): norms after each half, and on the whole of queries and keys."""

from __future__ import annotations

from dataclasses import replace

from ggmq.archs.base import NEOX, Arch
from ggmq.archs.builder import T
from ggmq.archs.hparams import Rope
from ggmq.archs.stage import StageGraph


class Olmo2(Arch):
    rope_mode = NEOX
    swa_period = 4
    tied = False

    def windowed_rope(self) -> Rope:
        return replace(self.hp.rope, freq_scale=1.0, ext_factor=0.0, attn_factor=1.0)

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        hp, b, p = self.hp, s.b, f"blk.{il}."
        n = b.ne(x)[1]
        q, k, v = (y if b.tensors[y].contiguous else b.cont(y) for y in self.projections(s, x, il))
        q, k = self.norm(s, p + "attn_q_norm", q), self.norm(s, p + "attn_k_norm", k)
        q = self.rotate(s, b.reshape(q, hp.d_k, hp.n_head[il], n), il)
        k = self.rotate(s, b.reshape(k, hp.d_k, hp.n_head_kv[il], n), il)
        y = self.attend(s, q, k, b.reshape(v, hp.d_v, hp.n_head_kv[il], n), il, self.kq_scale())
        x = b.add(self.norm(s, p + "post_attention_norm", y), x)
        return b.add(self.norm(s, p + "post_ffw_norm", self.ffn(s, x, il)), x)
