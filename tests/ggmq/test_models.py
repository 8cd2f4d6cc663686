"""Logits through real workers against llama.cpp's, in pieces, over one, two and three workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ggmq.archs import ARCHS, open_arch
from ggmq.cluster import Client, LocalBus
from ggmq.gguf import GGUF
from ggmq.runner import Entry, Runner, n_cells, plan
from tests.support.fixtures import MODELS, nmse
from tests.support.gguf_factory import tiny_model
from workers.kernels.layout import KIND_OF

EXACT_TYPES = ("f32", "f16", "bf16")


def run(
    client: Client, g: GGUF, tokens: np.ndarray, chunks: list[int], split: list[float] | None = None
) -> list[np.ndarray]:
    """Logits for each chunk size, from one load."""
    arch = open_arch(g)
    runner = Runner(client, arch, 256, plan(arch, client.devices(), 256, split))
    try:
        runner.load()
        return [runner.logits(tokens, n) for n in chunks]
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
    # the CPU device has a kernel for every node but one: rows of an embedding whose type has no products
    rows = device == "CPU" and g.tensors["token_embd.weight"].type not in KIND_OF
    assert bus.stats(0).n_fallbacks - before == rows * (1 + 24 + 4)


def test_every_architecture_has_a_recorded_model(shared: Path) -> None:
    assert {GGUF(shared / "models" / n).text("general.architecture") for n in MODELS} == set(ARCHS)


@pytest.fixture(scope="module")
def three() -> Iterator[Client]:
    started = LocalBus()
    try:
        for _ in range(3):
            started.spawn("CPU", 1)
        yield started.start()
    finally:
        started.close()


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
    arch = open_arch(GGUF(tiny_model(tmp_path / "m.gguf", "llama")))
    runner = Runner(three, arch, 128, plan(arch, three.devices(), 128, [1, 1, 1]))
    try:
        runner.load()
        runner.forward([1, 2, 3], 0, [2])
        runner.forward([4], 3, [0])
        before = three.n_round_trips
        runner.forward([5], 4, [0])
        assert three.n_round_trips == before + 1
    finally:
        three.drain()


@pytest.mark.parametrize("split", [[1], [1, 1, 1]], ids=["1 worker", "3 workers"])
def test_the_largest_logits_come_with_their_ids(three: Client, tmp_path: Path, split: list[float]) -> None:
    arch = open_arch(GGUF(tiny_model(tmp_path / "m.gguf", "llama")))
    runner = Runner(three, arch, 128, plan(arch, three.devices(), 128, split))
    try:
        runner.load()
        whole = runner.forward([1, 2, 3], 0, [0, 2])
        top = runner.forward([1, 2, 3], 0, [0, 2], top_k=7)
    finally:
        three.drain()
    assert top.shape == (2, 7)
    for row, logits in zip(top, whole, strict=True):
        assert set(row["id"]) == set(np.argsort(-logits, kind="stable")[:7])
        assert np.array_equal(row["logit"], logits[row["id"]])


COMPANY = ["tiny", *(n for n in MODELS if any(k in n for k in ("moe", "q4_0", "q6_k", "iq4", "gemma3", "gpt-oss", "gpt2")))]


@pytest.mark.parametrize("split", [[1], [1, 1]], ids=["1 worker", "2 workers"])
@pytest.mark.parametrize("name", COMPANY)
def test_a_token_has_the_same_bits_alone_and_among_others(
    three: Client, tmp_path: Path, request: pytest.FixtureRequest, name: str, split: list[float]
) -> None:
    """Eight sequences in one batch, each in a slot of its own, against each of them alone in the first slot."""
    tiny = name == "tiny"
    path = tiny_model(tmp_path / "m.gguf", "llama") if tiny else request.getfixturevalue("shared") / "models" / name
    arch = open_arch(GGUF(path))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 50, n).tolist() for n in (1, 7, 70, 30, 3, 65, 20, 2)]

    def runner(n_slots: int) -> Runner:
        cells = n_cells(160, n_slots)
        return Runner(three, arch, cells // n_slots, plan(arch, three.devices(), cells, split), n_slots)

    together = runner(8)
    try:
        together.load()
        for slot, prompt in enumerate(prompts):
            together.forward(prompt[:-1] or prompt, 0, [0], slot=slot)
        last = [Entry(p[-1], max(0, len(p) - 1), slot) for slot, p in enumerate(prompts)]
        many = together.wait(together.submit(last, range(8)))
    finally:
        three.drain()
    alone = runner(1)
    try:
        alone.load()
        for slot, prompt in enumerate(prompts):
            assert np.array_equal(alone.forward(prompt, 0, [len(prompt) - 1])[0], many[slot]), slot
    finally:
        three.drain()


def test_a_context_that_is_full_and_a_token_outside_are_refused(three: Client, tmp_path: Path) -> None:
    from protocol.errors import FormatError

    arch = open_arch(GGUF(tiny_model(tmp_path / "m.gguf", "llama")))
    runner = Runner(three, arch, 32, plan(arch, three.devices(), 32))
    try:
        runner.load()
        for tokens, past in (([1] * 33, 0), ([1], 32), ([50], 0), ([-1], 0), ([], 0)):
            with pytest.raises(FormatError):
                runner.forward(tokens, past, [0])
    finally:
        three.drain()
