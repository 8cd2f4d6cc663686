"""Mistral 3 (Ministral 3, 2025): LLaMA's layers, YaRN, and queries that warm slowly at long positions."""

from __future__ import annotations

from ggmq.archs.llama import Llama


class Mistral3(Llama):
    def attn_temperature(self) -> tuple[float, int]:
        scale, length = self.keys.number("attention.temperature_scale"), self.hp.rope.n_ctx_short
        if scale and not length:
            raise self.keys.wrong("rope.scaling.original_context_length", "the length over which queries warm", 0)
        return scale, length
