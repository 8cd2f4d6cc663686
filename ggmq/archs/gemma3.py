"""Gemma 3 (Kamath et al. 2025): five windowed layers to one that sees all, each kind with a rope base of its own."""

from __future__ import annotations

from dataclasses import replace

from ggmq.archs.base import StageGraph
from ggmq.archs.builder import T
from ggmq.archs.gemma2 import Gemma2
from ggmq.gguf import GGUF


class Gemma3(Gemma2):
    swa_period = 6
    large_n_layer = 62

    def __init__(self, g: GGUF) -> None:
        super().__init__(g)
        # the windowed layers keep base 10000 unless the file says otherwise
        base = g.number(f"{self.hp.arch}.rope.freq_base_swa", 10000.0)
        self.hp = replace(self.hp, rope=replace(self.hp.rope, freq_base_swa=base))

    def attention(self, s: StageGraph, x: T, il: int) -> T:
        q, k, v = self.qkv(s, x, il)
        plain = self.swa_layers[il]
        q = self.rotate(s, self.norm(s, f"blk.{il}.attn_q_norm", q), il, plain)
        k = self.rotate(s, self.norm(s, f"blk.{il}.attn_k_norm", k), il, plain)
        return self.attend(s, q, k, v, il, self.kq_scale())
