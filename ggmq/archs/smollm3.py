"""SmolLM3 (Bakouch et al. 2025): every fourth layer has no positions (NoPE)."""

from __future__ import annotations

from ggmq.archs.base import StageGraph
from ggmq.archs.builder import T
from ggmq.archs.llama import Llama

NOPE_PERIOD = 4


class SmolLM3(Llama):
    def rotate(self, s: StageGraph, x: T, il: int, plain: bool = False) -> T:
        return x if (il + 1) % NOPE_PERIOD == 0 else super().rotate(s, x, il, plain)
