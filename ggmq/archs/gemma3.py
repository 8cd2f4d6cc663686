"""Gemma 3 (Kamath et al. 2025): five windowed layers to one that sees all, each kind with a rope base of its own."""

from __future__ import annotations

from dataclasses import replace

from ggmq.archs.builder import T
from ggmq.archs.gemma2 import Gemma2
from ggmq.archs.hparams import Rope
from ggmq.archs.stage import StageGraph


class Gemma3(Gemma2):
    swa_period = 6
    tied = None
    large_n_layer = 62

    @property
    def unused(self) -> frozenset[str]:
        return frozenset({"dense_2.weight", "dense_3.weight"})  # of EmbeddingGemma's head

    def windowed_rope(self) -> Rope:
        return replace(self.hp.rope, freq_base=self.hp.rope.freq_base_swa, freq_scale=1.0)

    def attention(self, s: StageGraph, x: T, il: int) -> T:
        q, k, v = self.qkv(s, x, il)
        q = self.rotate(s, self.norm(s, f"blk.{il}.attn_q_norm", q), il)
        k = self.rotate(s, self.norm(s, f"blk.{il}.attn_k_norm", k), il)
        return self.attend(s, q, k, v, il, self.kq_scale())
