"""Models that are loaded on the devices of a bus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ggmq.archs import open_arch
from ggmq.cluster import Client
from ggmq.gguf import GGUF
from ggmq.model import Model, ModelConfig, place_model


def loaded(client: Client, file: GGUF | Path, n_ctx: int, split: Sequence[float] | None = None, order: Sequence[str] = (),
           **config: Any) -> Model:  # fmt: skip
    """The model of a file, with a context of `n_ctx` tokens. Errors: as `place_model`'s and `Model.load`'s."""
    g = file if isinstance(file, GGUF) else GGUF(file)
    model = place_model(ModelConfig(g.path, n_ctx, tensor_split=split, **config), open_arch(g), client, order)
    model.load()
    return model
