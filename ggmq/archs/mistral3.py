"""Mistral 3 (Ministral 3, 2025): LLaMA's layers, YaRN, and queries that warm slowly at long positions."""

from __future__ import annotations

from ggmq.archs.llama import Llama


class Mistral3(Llama):
    def attn_temperature(self) -> tuple[float, int]:
        g, arch = self.gguf, self.hp.arch
        scale = g.number(f"{arch}.attention.temperature_scale", 0.0)
        length = g.integer(f"{arch}.attention.temperature_length", 0) or self.hp.rope.n_ctx_orig
        return scale, length
