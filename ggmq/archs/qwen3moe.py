"""Qwen3's mixture of experts (Yang et al. 2025)."""

from __future__ import annotations

from ggmq.archs.base import StageGraph
from ggmq.archs.builder import T
from ggmq.archs.qwen3 import Qwen3


class Qwen3MoE(Qwen3):
    def feed_forward(self, s: StageGraph, x: T, il: int) -> T:
        return self.moe(s, x, il)
