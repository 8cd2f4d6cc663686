"""Logits through real workers against llama.cpp's, in pieces, over one, two and three workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ggmq.archs import ARCHS
from ggmq.cluster import Client
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.runner import ALL, Rows
from protocol.dtypes import GGMLType
from tests.support import cuda_emulated, gpu
from tests.support.fixtures import MODELS, nmse
from tests.support.gguf_factory import tiny_model
from tests.support.loaded import cpu_workers, loaded
from workers.kernels.cuda import planes
from workers.kernels.layout import KIND_OF

EXACT_TYPES = ("f32", "f16", "bf16")


def run(
    client: Client, g: GGUF, tokens: np.ndarray, chunks: list[int], split: list[float] | None = None
) -> list[np.ndarray]:
    """Logits for each chunk size, from one load."""
    model = loaded(client, g, 256, split)
    try:
        return [Engine(model, n_batch=n).logits(tokens) for n in chunks]
    finally:
        client.drain()


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_llama_cpp(bus: Client, device: str, shared: Path, name: str) -> None:
    path = shared / "models" / name
    record = np.load(path.with_suffix(".npz"))
    g, before = GGUF(path), bus.stats(0).n_fallbacks
    whole, single, uneven = run(bus, g, record["tokens"], [24, 1, 7])
    exact = path.suffixes[-2].lstrip(".") in EXACT_TYPES
    for row in range(len(whole)):
        assert nmse(whole[row], record["logits"][row]) <= (1e-5 if exact else 1e-3), f"position {row}"
    bound = 1e-10 if device == "reference" else 1e-6
    assert nmse(single, whole) <= bound and nmse(uneven, whole) <= bound
    # those with kernels have one for every node but one: rows of an embedding whose type has no products
    on_cuda = (GGMLType.F32, *planes.KINDS)
    known = {"CPU": tuple(KIND_OF), cuda_emulated.NAME: on_cuda, gpu.NAME: on_cuda}
    with_products = known.get(device, tuple(GGMLType))
    rows = g.tensors["token_embd.weight"].type not in with_products
    assert bus.stats(0).n_fallbacks - before == rows * (1 + 24 + 4)


def test_every_architecture_has_a_recorded_model(shared: Path) -> None:
    assert {GGUF(shared / "models" / n).text("general.architecture") for n in MODELS} == set(ARCHS) - {"mamba2"}


@pytest.fixture(scope="module")
def three() -> Iterator[Client]:
    with cpu_workers(3) as client:
        yield client


@pytest.mark.parametrize("chunk", [1, 5, 30])
def test_one_two_and_three_workers_give_the_same_bits(three: Client, tmp_path: Path, chunk: int) -> None:
    g = GGUF(tiny_model(tmp_path / "m.gguf", "llama", seed=chunk))
    tokens = np.random.default_rng(chunk).integers(0, 50, 30).astype(np.int32)
    one, two, all_three = (run(three, g, tokens, [chunk], split)[0] for split in ([1], [2, 1], [1, 1, 1]))
    assert np.array_equal(one, two) and np.array_equal(one, all_three)


@pytest.mark.parametrize("name", [n for n in MODELS if "moe" in n or "q4_0" in n or "gemma3" in n])
def test_recorded_models_over_two_workers_give_the_same_bits(three: Client, shared: Path, name: str) -> None:
    g = GGUF(shared / "models" / name)
    tokens = np.load((shared / "models" / name).with_suffix(".npz"))["tokens"]
    one, two = (run(three, g, tokens, [9], split)[0] for split in ([1], [1, 1]))
    assert np.array_equal(one, two)


def test_a_token_is_one_round_trip_for_the_main_host(three: Client, tmp_path: Path) -> None:
    model = loaded(three, tiny_model(tmp_path / "m.gguf", "llama"), 128, [1, 1, 1])
    try:
        model.forward([1, 2, 3], 0, [2])
        model.forward([4], 3, [0])
        before = three.n_round_trips
        model.forward([5], 4, [0])
        assert three.n_round_trips == before + 1
    finally:
        three.drain()


@pytest.mark.parametrize("split", [[1], [1, 1, 1]], ids=["1 worker", "3 workers"])
def test_the_largest_logits_come_with_their_ids(three: Client, tmp_path: Path, split: list[float]) -> None:
    model = loaded(three, tiny_model(tmp_path / "m.gguf", "llama"), 128, split)
    try:
        whole = model.forward([1, 2, 3], 0, [0, 2])
        top = model.forward([1, 2, 3], 0, [0, 2], want=7)
    finally:
        three.drain()
    assert top.shape == (2, 8), "sizes are rounded up, so that few graphs serve"
    for row, logits in zip(top, whole, strict=True):
        assert set(row["id"]) == set(np.argsort(-logits, kind="stable")[:8])
        assert np.array_equal(row["logit"], logits[row["id"]])


COMPANY = ["tiny", *(n for n in MODELS if any(k in n for k in ("moe", "q4_0", "q6_k", "iq4", "gemma3", "gpt-oss", "gpt2")))]


@pytest.mark.parametrize("split", [[1], [1, 1]], ids=["1 worker", "2 workers"])
@pytest.mark.parametrize("name", COMPANY)
def test_a_token_has_the_same_bits_alone_and_among_others(
    three: Client, tmp_path: Path, request: pytest.FixtureRequest, name: str, split: list[float]
) -> None:
    """Eight sequences in one batch, each in pages of its own, against each of them alone."""
    tiny = name == "tiny"
    path = tiny_model(tmp_path / "m.gguf", "llama") if tiny else request.getfixturevalue("shared") / "models" / name
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 50, n).tolist() for n in (1, 7, 70, 30, 3, 65, 20, 2)]

    model = loaded(three, path, 160, split, n_seq=8)
    try:
        held = [model.store.begin() for _ in prompts]
        for h, prompt in zip(held, prompts, strict=True):
            if len(prompt) > 1:
                model.forward(prompt[:-1], 0, [], held=h)
        for h, prompt in zip(held, prompts, strict=True):
            assert model.store.grow(h, len(prompt)) == []
        last = [Rows(p[-1:], len(p) - 1, h.pages, [0], ALL) for p, h in zip(prompts, held, strict=True)]
        many = model.runner.wait(model.runner.submit(last))
        for h in held:
            model.store.release(h)
    finally:
        three.drain()
    model = loaded(three, path, 160, split)
    try:
        for prompt, row in zip(prompts, many, strict=True):
            assert np.array_equal(model.forward(prompt, 0, [len(prompt) - 1]), row)
    finally:
        three.drain()


def test_a_context_that_is_full_and_a_token_outside_are_refused(three: Client, tmp_path: Path) -> None:
    from protocol.errors import FormatError

    model = loaded(three, tiny_model(tmp_path / "m.gguf", "llama"), 32)
    try:
        for tokens, past in (([1] * 33, 0), ([1], 32), ([50], 0), ([-1], 0), ([], 0)):
            with pytest.raises(FormatError):
                model.forward(tokens, past, [0])
    finally:
        three.drain()
