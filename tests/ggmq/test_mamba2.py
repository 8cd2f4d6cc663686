"""Mamba-2: logits against the recurrence written out, in pieces of any length, of one sequence and of several."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from ggmq.archs.mamba2 import Mamba2
from ggmq.archs.memory import N_RESERVED_SLOTS, SCRAP_SLOT, ZERO_SLOT, Room
from ggmq.archs.stage import Batch, Placed, Stage
from ggmq.cluster import Client
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.sampling import SamplingParams
from protocol import messages as m
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import FormatError
from tests.support import cuda_emulated, mamba2
from tests.support.fixtures import nmse
from tests.support.loaded import cpu_workers
from tests.support.loaded import loaded as loaded_model
from tests.support.random_models import Model, base, write

N_SLOTS = 8
WITH_KERNELS = ("CPU", cuda_emulated.NAME)


def same(device: str, got: np.ndarray, expected: np.ndarray) -> bool:
    """Bit for bit; the reference device leaves the order of its sums to NumPy."""
    return np.array_equal(got, expected) if device in WITH_KERNELS else nmse(got, expected) <= 1e-12


def made(seed: int) -> Model:
    return base("mamba2", random.Random(f"mamba2 {seed}"))


class Loaded:
    """A model's weights and states on a worker, and its graphs by batch."""

    def __init__(self, client: Client, path: Path) -> None:
        self.client, self.arch = client, Mamba2(GGUF(path))
        self.arch.check()
        self.placed, at = {}, 0
        for t in self.arch.gguf:
            self.placed[t.name] = Placed(t, 1, at)
            at += -(-t.n_bytes // 64) * 64
        client.request(m.AllocBuffer(client.session, 1, at))
        for p in self.placed.values():
            header = m.SetTensor(client.session, 1, p.offset, p.info.n_bytes, 0, int(p.info.type), p.info.ne)
            client.request(header, [self.arch.gguf.data(p.info.name)])
        self.stage = Stage(0, range(self.arch.hp.n_layer), True, True)
        self.memory = self.arch.layer_memory(self.stage.layers, Room({}, N_SLOTS), 2)
        for kept in self.memory.values():
            client.request(m.AllocBuffer(client.session, kept.buffer, kept.n_bytes))

    def logits(self, tokens: Sequence[Sequence[int]], read: Sequence[int], written: Sequence[int]) -> np.ndarray:
        """Logits after each token of sequences of equal length. `read`, `written`: slots of their states.

        Shapes: (n_seqs, n, n_vocab).
        """
        n_seqs, n = len(tokens), len(tokens[0])
        batch = Batch(n_seqs * n, n_seqs, n_logits=n_seqs * n, in_order=True, windows=(), has_states=True)
        graph, names = self.arch.build(self.stage, self.placed, self.memory, batch)
        assert names == ["numbers"]
        frame = encode_graph(graph)
        given = {"tokens": [t for s in tokens for t in s], "state_from": read, "state_to": written}
        numbers = [x for name, count in batch.numbers().items() for x in given.get(name, [0] * count)]
        self.client.request(m.GraphPut(self.client.session, graph_digest(frame)), [frame])
        reply = self.client.request(m.GraphCompute(self.client.session, graph_digest(frame), 1),
                                    [np.array(numbers, np.int32).tobytes()])  # fmt: skip
        return np.frombuffer(reply.payload[0], np.float32).reshape(n_seqs, n, -1)


@pytest.fixture
def loaded(bus: Client, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Loaded, Model]]:
    model = made(request.param)
    try:
        yield Loaded(bus, write(tmp_path / "m.gguf", model)), model
    finally:
        bus.drain()


def text(model: Model, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.n_vocab, n).tolist()


@pytest.mark.parametrize("loaded", range(12), indirect=True)
def test_logits_are_those_of_the_recurrence(loaded: tuple[Loaded, Model], device: str) -> None:
    on_device, model = loaded
    tokens, before = text(model, 23), on_device.client.stats(0).n_fallbacks
    got = on_device.logits([tokens], [ZERO_SLOT], [2])[0]
    expected = mamba2.logits(model, tokens)
    for row, want in zip(got, expected, strict=True):
        assert nmse(row, want) <= 1e-7
    if device in WITH_KERNELS:
        assert on_device.client.stats(0).n_fallbacks == before


@pytest.mark.parametrize("loaded", range(3), indirect=True)
@pytest.mark.parametrize("pieces", [[1] * 20, [19, 1], [2, 7, 1, 10], [3, 3, 14]])
def test_where_a_text_is_cut_changes_no_bit(
    loaded: tuple[Loaded, Model], device: str, pieces: list[int]
) -> None:
    on_device, model = loaded
    tokens = text(model, 20)
    whole = on_device.logits([tokens], [ZERO_SLOT], [2])[0]
    out, at, slot = [], 0, ZERO_SLOT
    for n in pieces:
        out.append(on_device.logits([tokens[at : at + n]], [slot], [3])[0])
        at, slot = at + n, 3
    assert same(device, np.concatenate(out), whole)


@pytest.mark.parametrize("loaded", range(4), indirect=True)
def test_sequences_in_one_batch_are_as_each_alone(loaded: tuple[Loaded, Model], device: str) -> None:
    """Three sequences, one that is in the middle, in slots in no order, and padding that reads zeros and writes to scrap."""
    on_device, model = loaded
    texts = [text(model, 9, seed) for seed in range(3)]
    on_device.logits([texts[2][:4]], [ZERO_SLOT], [6])
    batch = [texts[0][:5], texts[1][:5], texts[2][4:], [0] * 5]
    together = on_device.logits(batch, [ZERO_SLOT, ZERO_SLOT, 6, ZERO_SLOT], [5, 2, 6, SCRAP_SLOT])
    then = on_device.logits([texts[1][5:], texts[0][5:]], [2, 5], [2, 5])
    for i, got in ((0, np.concatenate([together[0], then[1]])), (1, np.concatenate([together[1], then[0]]))):
        assert same(device, got, on_device.logits([texts[i]], [ZERO_SLOT], [7])[0])
    assert same(device, together[2], on_device.logits([texts[2]], [ZERO_SLOT], [7])[0][4:])


@pytest.mark.parametrize("loaded", [1], indirect=True)
def test_a_state_can_be_read_again(loaded: tuple[Loaded, Model]) -> None:
    """What is written to another slot than it was read from leaves the first as it was: a snapshot."""
    on_device, model = loaded
    tokens = text(model, 8)
    on_device.logits([tokens[:4]], [ZERO_SLOT], [2])
    first = on_device.logits([tokens[4:]], [2], [3])
    on_device.logits([text(model, 5, 1)], [3], [3])
    assert np.array_equal(on_device.logits([tokens[4:]], [2], [4]), first)


@pytest.mark.parametrize(("key", "value", "words"), [
    ("ssm.conv_kernel", 1, "2 to 1024, got 1"), ("ssm.group_count", 3, "a divisor of"), ("ssm.group_count", 0, "1 to"),
    ("ssm.time_step_rank", 7, "heads that divide the inner size"), ("ssm.state_size", 0, "1 to"),
    ("ssm.state_size", 9, r"blk\.0\.ssm_\w+\.\w+: expected shape"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_by_name(tmp_path: Path, key: str, value: int, words: str) -> None:
    with pytest.raises(FormatError, match=words) as e:
        Mamba2(GGUF(write(tmp_path / "m.gguf", made(2).having(**{key: value})))).check()
    assert key in str(e.value) or "blk.0" in str(e.value)


@pytest.mark.parametrize("key", ["conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count"])
def test_a_file_without_its_sizes_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(FormatError, match=rf"key mamba2\.ssm\.{key} is missing"):
        Mamba2(GGUF(write(tmp_path / "m.gguf", made(2).without(f"ssm.{key}"))))


# -- through the scheduler ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> Iterator[Client]:
    with cpu_workers(2) as client:
        yield client


SPLITS = pytest.mark.parametrize("split", [[1], [1, 1]], ids=["1 worker", "2 workers"])


def deep(seed: int) -> Model:
    """A model of more than one layer."""
    return next(model for i in range(100) if (model := made(100 * seed + i)).keys["block_count"] > 1)


@SPLITS
def test_logits_through_the_scheduler_are_those_of_the_recurrence(two: Client, tmp_path: Path, split: list[float]) -> None:
    model = deep(1)
    tokens = np.array(text(model, 150), np.int32)
    placed = loaded_model(two, write(tmp_path / "m.gguf", model), 256, split, n_batch=70)
    try:
        assert nmse(Engine(placed).logits(tokens), mamba2.logits(model, tokens.tolist())) <= 1e-7
    finally:
        two.drain()


@SPLITS
def test_sequences_that_come_and_go_have_the_tokens_that_they_have_alone(
    two: Client, tmp_path: Path, split: list[float]
) -> None:
    model, rng = deep(2), random.Random(5)
    placed = loaded_model(two, write(tmp_path / "m.gguf", model), 256, split, n_seq=6, n_batch=32)
    jobs = [(text(model, rng.choice([1, 3, 20, 33, 90]), i), SamplingParams(temperature=0.8 * (i % 2), seed=i),
             rng.choice([1, 7, 25])) for i in range(14)]  # fmt: skip
    try:
        alone = []
        engine = Engine(placed)
        for prompt, params, n in jobs:
            sequence = engine.add(prompt, params, n)
            while engine.busy:
                engine.step()
            alone.append(sequence.tokens[sequence.n_prompt :])
        waiting, running = list(enumerate(jobs)), {}
        while waiting or engine.busy:
            if waiting and (not engine.busy or rng.random() < 0.4):
                i, (prompt, params, n) = waiting.pop(0)
                running[i] = engine.add(prompt, params, n)
            engine.step()
        for i, sequence in running.items():
            assert sequence.tokens[sequence.n_prompt :] == alone[i], i
        assert placed.store.n_free_slots == placed.store.room.n_slots - N_RESERVED_SLOTS
    finally:
        two.drain()


@pytest.mark.parametrize("n_steps", [1, 5, 14])
def test_what_is_interrupted_is_read_again_and_has_the_same_tokens(two: Client, tmp_path: Path, n_steps: int) -> None:
    """What was under way may or may not have changed a state in its place."""
    model, greedy = deep(5), SamplingParams(temperature=0)
    placed = loaded_model(two, write(tmp_path / "m.gguf", model), 256, [1, 1], n_seq=3, n_batch=16)
    prompts = [text(model, 20 + 9 * i, i) for i in range(3)]
    try:
        engine, runs = Engine(placed), []
        for n_interruptions in (0, 3):
            sequences = [engine.add(prompt, greedy, 10) for prompt in prompts]
            for _ in range(n_interruptions):
                for _ in range(n_steps):
                    engine.step()
                engine.abandon()
            while engine.busy:
                engine.step()
            runs.append([s.tokens[s.n_prompt :] for s in sequences])
        assert runs[0] == runs[1]
    finally:
        two.drain()


def test_more_sequences_than_there_are_states_for_take_turns(two: Client, tmp_path: Path) -> None:
    """A conversation that is kept, with a snapshot, and five others where there is room for one."""
    model, greedy = deep(4), SamplingParams(temperature=0)
    placed = loaded_model(two, write(tmp_path / "m.gguf", model), 256)
    prompts = [text(model, 5 + i, i) for i in range(6)]
    try:
        engine, alone = Engine(placed), []
        for prompt in prompts:
            engine.start(prompt, greedy)
            alone.append(list(engine.generate(9)))
        together = [engine.add(prompt, greedy, 9) for prompt in prompts]
        while engine.busy:
            engine.step()
        assert [s.tokens[s.n_prompt :] for s in together] == alone
    finally:
        two.drain()


def test_a_conversation_goes_on_from_where_its_state_was_kept(two: Client, tmp_path: Path) -> None:
    model = deep(3)
    path, greedy = write(tmp_path / "m.gguf", model), SamplingParams(temperature=0)

    def answers(*prompts: list[int]) -> tuple[list[int], int]:
        """What the last of them is answered, and how many tokens were read for it."""
        placed = loaded_model(two, path, 256)
        try:
            engine = Engine(placed)
            for prompt in prompts:
                read = engine.timings.prefill_tokens
                engine.start(prompt, greedy)
                out = list(engine.generate(12))
            return out, engine.timings.prefill_tokens - read
        finally:
            two.drain()

    first = text(model, 40)
    said, _ = answers(first)
    follows, other = [*first, *said, *text(model, 9, 1)], [*first, *text(model, 9, 2)]
    for prompt in (follows, other, text(model, 30, 3)):
        again, n_read = answers(first, prompt)
        assert again == answers(prompt)[0]
        assert n_read < len(prompt) or prompt[0] != first[0]
