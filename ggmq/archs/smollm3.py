"""SmolLM3 (Bakouch et al. 2025): every fourth layer has no positions (NoPE)."""

from __future__ import annotations

from ggmq.archs.base import QKV
from ggmq.archs.builder import T
from ggmq.archs.qwen2 import Qwen2
from ggmq.archs.stage import StageGraph

NOPE_PERIOD = 4


class SmolLM3(Qwen2):
    rope_mode = 0
    biases = QKV

    def rotate(self, s: StageGraph, x: T, il: int) -> T:
        return x if (il + 1) % NOPE_PERIOD == 0 else super().rotate(s, x, il)
