"""Many sequences on real workers: each has the tokens that it has alone, and its memory comes back."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ggmq.archs.memory import PAGE
from ggmq.cluster import Client, LocalBus
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.hub import BUNDLED
from ggmq.runner import ARGMAX
from ggmq.sampling import SamplingParams
from ggmq.scheduler import Sequence
from ggmq.tokenizer import Vocabulary
from protocol.dtypes import GGMLType
from protocol.errors import ConfigError, FormatError, HandleError, OutOfMemory
from tests.support.fixtures import free_port, nmse
from tests.support.gguf_factory import tiny_model
from tests.support.loaded import cpu_workers, loaded
from tests.support.processes import WORKER, started
from tests.support.random_models import base, write
from tests.support.wishes import Wish

GREEDY = SamplingParams(temperature=0)
OPENINGS = ("Once upon a time", "One day", "The dog", "Tom and Lily", "A cat", "In a small village", "It was", "Ben saw")
SPLITS = {"1 worker": [1], "2 workers": [1, 1], "3 workers": [1, 1, 1]}


@pytest.fixture(scope="module")
def three() -> Iterator[Client]:
    with cpu_workers(3) as client:
        yield client


def wishes(n: int, seed: int) -> list[Wish]:
    """Prompts of one to a hundred and fifty tokens, half of them greedy, the others of every kind of sampling."""
    rng, vocabulary = random.Random(seed), Vocabulary(GGUF(BUNDLED))
    out = []
    for i in range(n):
        text = " ".join(rng.choice(OPENINGS) for _ in range(rng.choice([1, 1, 2, 8, 30])))
        kinds = (GREEDY, GREEDY, SamplingParams(seed=i), SamplingParams(1.2, 0, 0.9, 0.0, seed=i),
                 SamplingParams(0.7, 100, 1.0, 0.02, 1.1, 32, seed=i), SamplingParams(0, repeat_penalty=1.3))  # fmt: skip
        out.append(Wish(tuple(vocabulary.encode(text)), rng.choice(kinds), rng.randrange(1, 40)))
    return out


@pytest.fixture(scope="module")
def crowd(three: Client) -> tuple[list[Wish], list[list[int]]]:
    """64 wishes, and what becomes of each of them alone."""
    wanted = wishes(64, 1)
    engine, alone = Engine(loaded(three, BUNDLED, 256, [1])), []
    for w in wanted:
        engine.start(w.tokens, w.params)
        alone.append(list(engine.generate(w.n)))
    three.drain()
    return wanted, alone


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_sequences_that_join_and_leave_at_random_have_the_tokens_that_they_have_alone(
    three: Client, crowd: tuple[list[Wish], list[list[int]]], split: list[float]
) -> None:
    wanted, alone = crowd
    model = loaded(three, BUNDLED, 256, split, n_seq=64)
    engine, rng = Engine(model), random.Random(len(split))
    free = dict(model.store.n_free)
    to_come = list(range(len(wanted)))
    rng.shuffle(to_come)
    running: dict[Sequence, int] = {}
    cut: dict[int, int] = {}
    try:
        while to_come or engine.busy:
            for _ in range(rng.choice([0, 0, 1, 5]) if to_come else 0):
                if to_come:
                    i = to_come.pop()
                    running[engine.add(wanted[i].tokens, wanted[i].params, wanted[i].n)] = i
            if running and rng.random() < 0.06:  # somebody goes away
                gone = rng.choice(list(running))
                if not gone.finished:
                    engine.leave(gone)
                    cut[running[gone]] = gone.n_made
            engine.step()
        for s, i in running.items():
            made = s.tokens[s.n_prompt :]
            assert made == alone[i][: cut.get(i, len(alone[i]))], f"sequence {i}, {s.finished}"
        assert len(running) == 64 and 0 < len(cut) < 40
        assert model.store.n_free == free
    finally:
        three.drain()


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_common_beginning_is_read_and_held_once(three: Client, split: list[float]) -> None:
    model = loaded(three, BUNDLED, 1200, split, n_seq=16)
    engine, rng = Engine(model), random.Random(3)
    common = [rng.randrange(3, model.arch.hp.n_vocab) for _ in range(1000)]
    tails = [[rng.randrange(3, model.arch.hp.n_vocab) for _ in range(1 + i)] for i in range(16)]
    free, pages = model.store.n_free[0], 1000 // PAGE
    try:
        sequences = [engine.add([*common, *tail], GREEDY, 20) for tail in tails]
        n_computed = 0
        while not all(s.n_made for s in sequences):
            engine.step()
            held = [s.held.pages[0][:pages] for s in sequences if s.held is not None]
            assert all(h == held[0] for h in held if len(h) == pages)
            n_computed = engine.timings.prefill_tokens
        assert n_computed <= pages * PAGE + sum(1000 % PAGE + len(tail) for tail in tails)
        own = sum(-(-(len(s.tokens) - pages * PAGE) // PAGE) for s in sequences)
        assert pages <= free - model.store.n_free[0] <= pages + own
        while engine.busy:
            engine.step()
        together = [s.tokens[s.n_prompt :] for s in sequences]
        assert model.store.n_free[0] == free
        for tail, made in zip(tails[::5], together[::5], strict=True):
            engine.start([*common, *tail], GREEDY)
            assert list(engine.generate(20)) == made
    finally:
        three.drain()


def test_where_pages_run_short_the_youngest_wait_and_all_have_their_tokens(three: Client, tmp_path: Path) -> None:
    path, rng = tiny_model(tmp_path / "m.gguf", "llama"), random.Random(1)
    prompts = [[rng.randrange(50) for _ in range(rng.randrange(1, 200))] for _ in range(9)]
    alone = []
    model = loaded(three, path, 320, [1, 1])
    engine = Engine(model)
    for p in prompts:
        engine.start(p, GREEDY)
        alone.append(list(engine.generate(100)))
    three.drain()
    model = loaded(three, path, 320, [1, 1], n_seq=9, n_tokens=640)  # ten pages, and the nine want up to five each
    try:
        engine = Engine(model)
        sequences = [engine.add(p, GREEDY, 100) for p in prompts]
        while engine.busy:
            engine.step()
        assert [s.tokens[s.n_prompt :] for s in sequences] == alone
        assert model.store.n_free == {0: 10}
    finally:
        three.drain()


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "gpt-oss"])
def test_windowed_layers_give_pages_away_and_every_token_is_right(three: Client, tmp_path: Path, arch: str) -> None:
    m = base(arch, random.Random(f"{arch} 5"), arch == "gpt-oss").having(attention__sliding_window=40)
    path, rng = write(tmp_path / "m.gguf", m), random.Random(2)
    prompts = [[rng.randrange(m.n_vocab) for _ in range(rng.choice([1, 30, 90, 300]))] for _ in range(10)]
    model = loaded(three, path, 448, [1])
    engine, alone = Engine(model), []
    for p in prompts:
        engine.start(p, GREEDY)
        alone.append(list(engine.generate(90)))
    three.drain()
    model = loaded(three, path, 448, [1, 1] if m.keys["block_count"] > 1 else [1], n_seq=8, n_batch=64)
    assert model.store.room.n_pages[40] < 8 * 448 // PAGE
    engine, free = Engine(model), dict(model.store.n_free)
    try:
        sequences = [engine.add(p, GREEDY, 90) for p in prompts]
        while engine.busy:
            engine.step()
        assert [s.tokens[s.n_prompt :] for s in sequences] == alone
        assert model.store.n_free == free
    finally:
        three.drain()


def test_when_a_worker_was_silent_all_sequences_go_on_with_their_tokens(tmp_path: Path) -> None:
    path, rng = tiny_model(tmp_path / "m.gguf", "llama"), random.Random(4)
    prompts = [[rng.randrange(50) for _ in range(rng.randrange(1, 120))] for _ in range(8)]
    bus, port = LocalBus(), free_port()
    worker = [*WORKER, "-d", "CPU", "-t", "1", "--insecure", "-p", str(port)]
    with contextlib.ExitStack() as stack:
        stack.callback(bus.close)
        listening = stack.enter_context(started(worker))
        bus.spawn("CPU", 1)
        bus.add_remote(f"127.0.0.1:{port}")
        client = bus.start()
        model = loaded(client, path, 256, [1, 1], bus.names, n_seq=8)
        engine = Engine(model)
        alone = []
        for p in prompts:
            engine.start(p, GREEDY)
            alone.append(list(engine.generate(60)))
        sequences = [engine.add(p, GREEDY, 60) for p in prompts]
        while sum(s.n_made for s in sequences) < 100:
            engine.step()
        os.kill(listening.pid, signal.SIGSTOP)
        threading.Timer(3.0, os.kill, (listening.pid, signal.SIGCONT)).start()
        while engine.busy:
            engine.step()
        assert [s.tokens[s.n_prompt :] for s in sequences] == alone
        client.drain()


def test_a_conversation_that_has_ended_makes_way_for_others(three: Client, tmp_path: Path) -> None:
    model = loaded(three, tiny_model(tmp_path / "m.gguf", "llama"), 128)
    engine = Engine(model)
    try:
        engine.start(list(range(40)), GREEDY)
        text = list(engine.generate(80))
        other = engine.add(list(range(40)), GREEDY, 80)
        while engine.busy:
            engine.step()
        assert other.tokens[40:] == text and model.store.n_free == {0: 2}
        engine.start(list(range(40)), GREEDY)
        assert list(engine.generate(80)) == text
    finally:
        three.drain()


@pytest.mark.parametrize("split", [[1], [1, 1]], ids=["1 worker", "2 workers"])
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "windowed"])
def test_what_was_read_before_is_not_read_again_and_changes_no_text(
    three: Client, tmp_path: Path, split: list[float], kind: str
) -> None:
    path, config = BUNDLED, {"cache_type_k": GGMLType.Q8_0, "cache_type_v": GGMLType.Q8_0} if kind == "Q8_0" else {}
    if kind == "windowed":
        m = base("gemma3", random.Random("gemma3 5"), False).having(attention__sliding_window=40)
        path = write(tmp_path / "m.gguf", m)
    model, rng = loaded(three, path, 320, split, n_seq=3, **config), random.Random(5)
    common = [rng.randrange(3, model.arch.hp.n_vocab) for _ in range(180)]
    prompts = [[*common, *(rng.randrange(3, model.arch.hp.n_vocab) for _ in range(10))] for _ in range(3)]
    engine = Engine(model)

    def text(*wanted: list[int], n: int = 30) -> list[Sequence]:
        sequences = [engine.add(p, SamplingParams(seed=1), n) for p in wanted]
        while engine.busy:
            engine.step()
        return sequences

    try:
        alone = []
        for p in prompts:
            model.store.drop_kept()
            alone += text(p)
        assert [s.n_cached for s in alone] == [0, 0, 0]
        model.store.drop_kept()
        first, *others = text(prompts[0]) + text(*prompts[1:])
        assert [s.n_cached for s in (first, *others)] == [0, 180, 180]
        assert [s.tokens for s in (first, *others)] == [s.tokens for s in alone]
        longer = [*first.tokens, 5, 6, 7]
        on = text(longer)[0]
        assert on.n_cached == len(first.tokens) - 1, "the last token that was made has not been read"
        assert text(longer)[0].n_cached == len(longer) - 1
        model.store.drop_kept()
        assert text(longer)[0].tokens == on.tokens
        running = engine.add(prompts[0], SamplingParams(seed=1), 100)
        while running.n_made < 30:
            engine.step()
        beside = text(prompts[1])[0]
        assert beside.n_cached == 180 and beside.tokens == alone[1].tokens
        logits = engine.logits(np.array(prompts[0], np.int32))
        assert len(logits) == 190 and np.array_equal(logits, engine.logits(np.array(prompts[0], np.int32)))
        engine.start(prompts[2], SamplingParams(seed=1))
        assert list(engine.generate(30)) == alone[2].tokens[190:]
    finally:
        three.drain()


def test_a_forked_sequence_goes_its_own_way(three: Client, tmp_path: Path) -> None:
    model = loaded(three, tiny_model(tmp_path / "m.gguf", "llama"), 256, [1, 1], n_seq=2)
    prompt = [7 * i % 50 for i in range(100)]
    try:
        held = model.store.begin()
        model.forward(prompt, 0, [], held=held)
        twin = model.store.fork(held)
        ways = {}
        for h, token in ((held, 3), (twin, 4)):
            ways[token] = [model.greedy([token], 100, h)]
            for i in range(30):
                ways[token].append(model.greedy(ways[token][-1:], 101 + i, h))
        model.store.release(held)
        model.store.release(twin)
        for token, way in ways.items():
            expected = [model.greedy([*prompt, token], 0)]
            for i in range(30):
                expected.append(model.greedy(expected[-1:], 101 + i))
            assert way == expected
    finally:
        three.drain()


def test_two_models_of_one_session_answer_as_each_alone_and_give_their_memory_back(three: Client, tmp_path: Path) -> None:
    paths = [tiny_model(tmp_path / f"{name}.gguf", name, seed=i) for i, name in enumerate(("llama", "qwen2"))]
    prompt = list(range(1, 41))
    alone = []
    for path in paths:
        engine = Engine(loaded(three, path, 256, [1, 1]))
        engine.start(prompt, GREEDY)
        alone.append(list(engine.generate(30)))
        three.drain()
    before = [three.stats(i).buffer_bytes for i in range(2)]
    models = [loaded(three, path, 256, split) for path, split in zip(paths, ([1, 1], [2, 1]), strict=True)]
    held = [three.stats(i).buffer_bytes for i in range(2)]
    try:
        engines = [Engine(model) for model in models]
        sequences = [engine.add(prompt, GREEDY, 30) for engine in engines]
        while any(engine.busy for engine in engines):
            for engine in engines:
                engine.step()
        assert [s.tokens[s.n_prompt :] for s in sequences] == alone
        models[0].free()
        assert all(b < three.stats(i).buffer_bytes < h for i, (b, h) in enumerate(zip(before, held, strict=True)))
        with pytest.raises(HandleError):
            models[0].forward([1], 0, [0])
        engines[1].start(prompt, GREEDY)
        assert list(engines[1].generate(30)) == alone[1], "the other goes on"
        models[1].free()
        assert [three.stats(i).buffer_bytes for i in range(2)] == before
    finally:
        three.drain()


@pytest.mark.parametrize("kinds", [("Q8_0", "F16"), ("F16", "Q8_0"), ("Q8_0", "Q8_0")], ids="/".join)
def test_a_cache_of_q8_0_is_nearly_the_same_and_smaller(three: Client, kinds: tuple[str, str]) -> None:
    tokens = np.array(Vocabulary(GGUF(BUNDLED)).encode(" ".join(OPENINGS * 4)), np.int32)
    k, v = (GGMLType[kind] for kind in kinds)
    try:
        exact = Engine(model := loaded(three, BUNDLED, 256, [1, 1])).logits(tokens)
        size = sum(s.assignment.kv_bytes for s in model.stages)
        three.drain()
        small = loaded(three, BUNDLED, 256, [1, 1], cache_type_k=k, cache_type_v=v)
        near = Engine(small).logits(tokens)
        alone = Engine(loaded(three, BUNDLED, 256, [1], cache_type_k=k, cache_type_v=v), n_batch=7).logits(tokens)
        assert 0 < nmse(near, exact) < 2e-4 and np.array_equal(near, alone)
        assert sum(s.assignment.kv_bytes for s in small.stages) < (0.6 if kinds[0] == kinds[1] else 0.8) * size
        assert three.stats(0).n_fallbacks == 0
    finally:
        three.drain()


def test_a_cache_type_that_heads_do_not_fit_is_refused(three: Client, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.gguf", "llama")
    with pytest.raises(ConfigError, match="heads of 16 elements: expected a multiple of 32 for a KV cache of type Q8_0"):
        loaded(three, path, 256, cache_type_k=GGMLType.Q8_0)


def test_an_engine_says_what_cannot_be(three: Client, tmp_path: Path) -> None:
    model = loaded(three, tiny_model(tmp_path / "m.gguf", "llama"), 64)
    engine = Engine(model)
    try:
        for tokens in ([], [1] * 64):
            with pytest.raises(FormatError):
                engine.add(tokens, GREEDY)
        model.forward([1] * 60, 0, [59], ARGMAX)  # somebody else holds the only page
        engine.add([1, 2, 3], GREEDY, 4)
        with pytest.raises(OutOfMemory, match="memory of the sequences is full"):
            engine.step()
    finally:
        three.drain()


def test_logits_of_every_token_come_beside_a_sequence_with_the_same_beginning(three: Client) -> None:
    model = loaded(three, BUNDLED, 512, n_seq=2)
    prompt = [1 + i % 200 for i in range(300)]
    alone = Engine(model).logits(np.array(prompt, np.int32))
    engine = Engine(model)
    twin = engine.add(prompt, GREEDY, 100)
    while not twin.n_made:
        engine.step()
    beside = engine.logits(np.array(prompt, np.int32))
    assert beside.shape == alone.shape == (300, model.arch.hp.n_vocab) and np.array_equal(beside, alone)
    model.free()
