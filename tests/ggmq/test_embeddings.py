"""Hidden states of texts that are only read, and the vectors that are made of them."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ggmq.archs import open_arch
from ggmq.bus import BusConfig
from ggmq.cluster import Client
from ggmq.embeddings import default_pooling, pooled, pooling_of, to_read
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.model import Model, ModelConfig
from ggmq.reading import read
from ggmq.sampling import SamplingParams
from ggmq.service import Delta, Done, Event, Request, Rows
from ggmq.serving import serving
from protocol.errors import FormatError
from tests.support.fixtures import BUNDLED
from tests.support.gguf_factory import tiny_model
from tests.support.loaded import cpu_workers, loaded

TEXTS = [[1, 2, 3], list(range(3, 250)), [7], list(range(40, 140))]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with cpu_workers(2) as started:
        yield started


@pytest.fixture(scope="module")
def model(client: Client) -> Model:
    return loaded(client, BUNDLED, 256, [1, 1], n_seq=6, n_batch=64)


def test_bits_do_not_depend_on_company(model: Model) -> None:
    alone = [Engine(model).embed(t) for t in TEXTS]
    logits = Engine(model).logits(np.array(TEXTS[1], np.int32))
    engine = Engine(model, n_batch=50)
    others = [engine.add(t, SamplingParams(seed=i, temperature=i % 2), 60) for i, t in enumerate(TEXTS[::2])]
    for _ in range(3):
        engine.step()
    hidden = [engine.read(t, "hidden") for t in TEXTS]
    last = [engine.read(t, "last") for t in TEXTS]
    beside = engine.read(TEXTS[1], "logits")
    while engine.busy:
        engine.step()
    assert [s.finished for s in others] == ["limit"] * 2
    for text, x, whole, end in zip(TEXTS, alone, hidden, last, strict=True):
        assert whole.rows is not None and end.rows is not None
        assert x.shape == (len(text), model.arch.hp.n_embd)
        assert np.array_equal(whole.rows, x) and np.array_equal(end.rows, x[-1:])
    assert np.array_equal(beside.rows, logits)  # type: ignore[arg-type]


def test_the_last_state_shares_a_beginning_and_the_whole_does_not(model: Model) -> None:
    engine, text = Engine(model), TEXTS[1]
    first = engine.add(text, SamplingParams(temperature=0), 5)
    while not first.n_made:
        engine.step()
    last, whole = engine.read(text, "last"), engine.read(text, "hidden")
    while engine.busy:
        engine.step()
    assert last.n_cached >= 128 and whole.n_cached == 0
    assert np.array_equal(last.rows, whole.rows[-1:])  # type: ignore[index, arg-type]


def test_what_is_read_again_comes_once(model: Model) -> None:
    expected = Engine(model).embed(TEXTS[1])
    engine = Engine(model, n_batch=32)
    sequence = engine.read(TEXTS[1], "hidden")
    for _ in range(3):
        engine.step()
    engine.abandon()
    engine.scheduler.begin_again(held=False)
    while not sequence.finished:
        engine.step()
    assert np.array_equal(sequence.rows, expected)  # type: ignore[arg-type]


def test_a_text_may_fill_the_context(model: Model) -> None:
    assert Engine(model).embed([5] * 256).shape[0] == 256
    for tokens in ([], [5] * 257):
        with pytest.raises(FormatError):
            Engine(model).embed(tokens)


def test_poolings() -> None:
    rows = np.array([[3, 4], [1, 0], [2, 2]], np.float32)
    assert pooled(rows, "mean", normalize=False).tolist() == [2, 2]
    assert pooled(rows, "mean").tolist() == pytest.approx([0.5**0.5] * 2)
    assert pooled(rows[:1], "last").tolist() == pytest.approx([0.6, 0.8])
    assert np.allclose(pooled(rows, "none"), [[0.6, 0.8], [1, 0], [0.5**0.5] * 2])
    assert pooled(np.zeros((2, 2), np.float32), "mean").tolist() == [0, 0]
    assert to_read([5, 6, 7], "cls") == ([5], "last") and to_read([5, 6], "mean") == ([5, 6], "hidden")
    assert pooling_of("last") == "last"
    with pytest.raises(FormatError, match="expected one of"):
        pooling_of("max")


def test_a_file_says_how_it_pools(tmp_path: Path) -> None:
    assert default_pooling(open_arch(GGUF(BUNDLED))) == "mean"
    for number, name in ((0, "none"), (1, "mean"), (2, "cls"), (3, "last")):
        path = tiny_model(tmp_path / f"{name}.gguf", "llama", pooling_type=number)
        assert default_pooling(open_arch(GGUF(path))) == name
    with pytest.raises(FormatError, match="rank"):
        default_pooling(open_arch(GGUF(tiny_model(tmp_path / "rank.gguf", "llama", pooling_type=4))))


def test_texts_are_read_beside_answers(model: Model) -> None:
    expected = [Engine(model).embed(t) for t in TEXTS]
    with serving([ModelConfig(BUNDLED, 256, n_seq=3, bus=BusConfig(workers=1))]) as (services, _):
        service = services["stories"]
        answer: queue.SimpleQueue[Event] = queue.SimpleQueue()
        job = service.submit(Request(TEXTS[0], SamplingParams(banned=service.vocabulary.end_ids), 200), answer.put)
        assert isinstance(answer.get(timeout=60), Delta)
        came: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in TEXTS]
        for text, events in zip(TEXTS, came, strict=True):
            read(service, text, "hidden", events.put, key="reader")
        for text, x, events in zip(TEXTS, expected, came, strict=True):
            rows = events.get(timeout=60)
            assert isinstance(rows, Rows) and np.array_equal(rows.rows, x)
            assert (rows.usage.n_prompt, rows.usage.n_made) == (len(text), 0)
        while not isinstance(event := answer.get(timeout=60), Done):
            assert isinstance(event, Delta)
        assert job.usage().n_made == 200
        state = service.state()
        assert state.n_done == 5 and state.n_prompt_tokens == 3 + sum(map(len, TEXTS))
        with pytest.raises(FormatError, match="do not fit"):
            read(service, [5] * 257, "hidden", answer.put)
