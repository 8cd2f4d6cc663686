"""Phi-3 (Abdin et al. 2024): fused projections, and rope factors for short and for long contexts (LongRoPE)."""

from __future__ import annotations

from ggmq.archs.base import NEOX, Arch, StageGraph
from ggmq.archs.builder import T


class Phi3(Arch):
    rope_mode = NEOX

    def rope_factors(self, s: StageGraph, il: int) -> T | None:
        if s.has("rope_freqs.weight"):
            return s.opt("rope_freqs.weight")
        long = s.caches[il].n_cells > self.hp.rope.n_ctx_orig
        return s.opt("rope_factors_long.weight" if long else "rope_factors_short.weight")

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        q, k, v = self.qkv(s, self.norm(s, f"blk.{il}.attn_norm", x), il)
        if s.b.tensors[q].view_src >= 0 and not s.b.tensors[q].contiguous:
            q, k = s.b.cont(q), s.b.cont(k)
        q, k = self.rotate(s, q, il), self.rotate(s, k, il)
        x = s.b.add(self.attend(s, q, k, v, il, self.kq_scale()), x)
        return s.b.add(self.ffn(s, self.norm(s, f"blk.{il}.ffn_norm", x), il), x)
