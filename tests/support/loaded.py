"""Models that are loaded on the devices of a bus."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ggmq.archs import open_arch
from ggmq.cluster import Client, LocalBus
from ggmq.gguf import GGUF
from ggmq.model import Model, ModelConfig, place_model
from ggmq.runner import Rows, UnderWay


@contextlib.contextmanager
def cpu_workers(n: int) -> Iterator[Client]:
    """A client of a bus of its own with so many workers, each a CPU device of one thread."""
    bus = LocalBus()
    try:
        for _ in range(n):
            bus.spawn("CPU", 1)
        yield bus.start()
    finally:
        bus.close()


def loaded(client: Client, file: GGUF | Path, n_ctx: int, split: Sequence[float] | None = None, order: Sequence[str] = (),
           **config: Any) -> Model:  # fmt: skip
    """The model of a file, with a context of `n_ctx` tokens. Errors: as `place_model`'s and `Model.load`'s."""
    g = file if isinstance(file, GGUF) else GGUF(file)
    model = place_model(ModelConfig(g.path, n_ctx, tensor_split=split, **config), open_arch(g), client, order)
    model.load()
    return model


def computed(model: Model) -> list[int]:
    """Tokens that the model is sent from now on, a batch each."""
    counts: list[int] = []
    submit = model.runner.submit

    def noted(rows: Sequence[Rows], n_stages: int = 0) -> UnderWay:
        counts.append(sum(len(r.tokens) for r in rows))
        return submit(rows, n_stages)

    model.runner.submit = noted  # type: ignore[method-assign]
    return counts
