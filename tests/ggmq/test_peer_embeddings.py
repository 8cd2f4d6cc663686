"""Embeddings are llama.cpp's (through libllama): every architecture, short texts and ones of several batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ggmq.cluster import Client
from ggmq.embeddings import Pooling, pooled, to_read
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from tests.peer.libllama import Peer, library_path
from tests.support.fixtures import BUNDLED, MODELS, SHARED
from tests.support.loaded import cpu_workers, loaded

pytestmark = [pytest.mark.peer, pytest.mark.skipif(library_path() is None, reason="no libllama (pip install ggmq[peers])")]

NUMBERS: dict[Pooling, int] = {"none": 0, "mean": 1, "cls": 2, "last": 3}
FILES = [BUNDLED, *(SHARED / "models" / name for name in MODELS if ".f16." in name)]


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with Peer() as started:
        yield started


@pytest.fixture(scope="module")
def two() -> Iterator[Client]:
    with cpu_workers(2) as client:
        yield client


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(((x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))).min())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_embeddings_agree(peer: Peer, two: Client, path: Path) -> None:
    g = GGUF(path)
    peer.open(path, vocab_only=False)
    try:
        model = loaded(two, g, 256, [1, 1], n_batch=32)
        engine = Engine(model)
        for seed, n in enumerate((1, 2, 31, 77, 200)):
            tokens = np.random.default_rng(seed).integers(3, model.arch.hp.n_vocab, n).tolist()
            for pooling, number in NUMBERS.items():
                sequence = engine.read(*to_read(tokens, pooling))
                while not sequence.finished:
                    engine.step()
                assert sequence.rows is not None
                got, expected = pooled(sequence.rows, pooling, normalize=False), peer.embeddings(tokens, number, 256)
                assert got.shape == (expected.shape if pooling == "none" else expected.shape[1:])
                assert cosine(got, expected) >= 0.9999, (pooling, n)
                assert np.allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(expected, axis=-1), rtol=1e-3)
    finally:
        two.drain()
