"""LLaMA (Touvron et al. 2023), Mistral 7B, and Mixtral's mixture of experts (Jiang et al. 2024)."""

from __future__ import annotations

from ggmq.archs.base import LONG_ROPE, QKV, Arch
from ggmq.archs.builder import T
from ggmq.archs.stage import StageGraph


class Llama(Arch):
    biases = QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}

    @property
    def rope_tensors(self) -> frozenset[str]:
        """The tensors of which `rope_factors` chooses."""
        return LONG_ROPE if self.hp.rope.scaling == "longrope" else frozenset({"rope_freqs.weight"})

    def rope_factors(self, s: StageGraph) -> T | None:
        if self.rope_tensors == LONG_ROPE:
            return self.long_rope_factors(s)
        return s.opt("rope_freqs.weight", self.hp.rope.n_dims // 2)

    def experts(self, s: StageGraph, x: T, il: int) -> T:
        return self.moe(s, x, il, self.n_ff(il))

    def joined(self, s: StageGraph, y: T, x: T) -> T:
        """What a half of a layer made, and what came into it."""
        return s.b.add(y, x)

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        h = self.norm(s, f"blk.{il}.attn_norm", x)
        q, k, v = self.qkv(s, h, il)
        q, k = self.rotate(s, q, il), self.rotate(s, k, il)
        x = self.joined(s, self.attend(s, q, k, v, il, self.kq_scale()), x)
        h = self.norm(s, f"blk.{il}.ffn_norm", x)
        return self.joined(s, self.experts(s, h, il) if self.hp.n_expert else self.ffn(s, h, il), x)
