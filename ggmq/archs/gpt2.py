"""GPT-2 (Radford et al. 2019): learned positions, layer norm, GELU, one fused projection."""

from __future__ import annotations

from ggmq.archs.base import Arch
from ggmq.archs.builder import T
from ggmq.archs.stage import StageGraph


class GPT2(Arch):
    needs_biases = frozenset({"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"})

    def embed(self, s: StageGraph, tokens: T) -> T:
        positions = s.w("position_embd.weight", self.hp.n_embd, self.hp.n_ctx_train)
        return s.b.add(super().embed(s, tokens), s.b.get_rows(positions, s.positions()))

    def norm(self, s: StageGraph, name: str, x: T) -> T:
        return s.layer_norm(name, x)

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        q, k, v = self.qkv(s, self.norm(s, f"blk.{il}.attn_norm", x), il)
        x = s.b.add(self.attend(s, q, k, v, il, self.kq_scale()), x)
        return s.b.add(self.ffn_without_gate(s, self.norm(s, f"blk.{il}.ffn_norm", x), il, "GELU"), x)
