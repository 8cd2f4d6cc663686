"""What sequences of an engine are asked for in tests."""

from __future__ import annotations

from dataclasses import dataclass

from ggmq.sampling import SamplingParams


@dataclass(frozen=True)
class Wish:
    """A prompt, and how many tokens are made of it in which way."""

    tokens: tuple[int, ...]
    params: SamplingParams
    n: int
