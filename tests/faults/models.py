"""Models of random weights of any size: how long things take does not depend on what weights say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench.models import LARGE, Shape, write_model

SMALL = Shape(n_embd=512, n_layer=8, n_head=8, n_head_kv=4, n_ff=1408, n_vocab=8000)


def _counts(s: Shape) -> tuple[float, float]:
    """Parameters of the ends, and of a layer."""
    kv = s.n_embd // s.n_head * s.n_head_kv
    return 2 * s.n_vocab * s.n_embd, s.n_embd * (2 * s.n_embd + 2 * kv + 3 * s.n_ff)


def shape_of(params_g: float) -> Shape:
    """Layers as those of a model of 0.85 G parameters, or smaller ones, as many as come near."""
    like = LARGE if params_g >= 0.3 else SMALL
    ends, layer = _counts(like)
    return replace(like, n_layer=max(4, round((params_g * 1e9 - ends) / layer)))


def random_model(folder: Path, params_g: float, mix: str) -> Path:
    path = folder / "random.gguf"
    write_model(path, mix, shape_of(params_g))
    return path
