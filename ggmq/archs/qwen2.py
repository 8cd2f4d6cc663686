"""Qwen2 and Qwen2.5 (Yang et al. 2024): LLaMA's layers with biases on queries, keys and values."""

from __future__ import annotations

from ggmq.archs.base import NEOX
from ggmq.archs.llama import Llama


class Qwen2(Llama):
    rope_mode = NEOX
