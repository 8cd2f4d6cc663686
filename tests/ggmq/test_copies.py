"""Copies of what running texts have read: with them a lost worker costs no reading."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from ggmq.archs.memory import PAGE
from ggmq.engine import Engine
from ggmq.hub import BUNDLED
from ggmq.model import Model
from ggmq.pagecopies import PageCopies
from tests.support.loaded import computed, loaded
from tests.support.random_models import base, write
from tests.test_resume import N_CTX, local, prompts_of, texts, worker_of

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However soon a text could be read again, and however busy this machine is."""
    monkeypatch.setattr("ggmq.pagecopies.AGAIN_S", 0.0)
    monkeypatch.setattr("ggmq.pagecopies.FAST", 0.0)


def copies_of(model: Model) -> PageCopies:
    assert isinstance(model.prompts, PageCopies)
    return model.prompts


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("n_workers", [2, 3])
def test_what_was_copied_is_not_read_again(stage: int, n_workers: int) -> None:
    rng = random.Random(stage)
    prompt = [rng.randrange(3, 500) for _ in range(300)]
    with local(n_workers) as (bus, client):
        model = loaded(client, BUNDLED, N_CTX, [1] * n_workers)
        alone = texts(Engine(model), [prompt], 80)
        engine, pid = Engine(model), worker_of(bus, model, stage)
        model.store.drop_kept()
        counts = computed(model)
        assert texts(engine, [prompt], 80, at={50: lambda: os.kill(pid, signal.SIGKILL)}) == alone
        assert sum(counts) < 300 + 80 + 2 * PAGE, "the page that is not full, and little else"


def test_a_second_loss_is_met_too(tmp_path: Path) -> None:
    """The new worker's memory is copied as the old one's was."""
    rng = random.Random(7)
    file = base("gemma3", rng)
    path = write(tmp_path / "m.gguf", file)
    prompts = prompts_of(rng, file.n_vocab, 200, 150, 90)
    with local(3) as (bus, client):
        model = loaded(client, path, N_CTX, [1, 1, 1], n_seq=3)
        alone = texts(Engine(model), prompts, 100)
        engine = Engine(model)

        def kill() -> None:
            os.kill(worker_of(bus, model, len(model.stages) - 1), signal.SIGKILL)

        assert texts(engine, prompts, 100, at={20: kill, 90: kill}) == alone


def test_copies_are_bounded_and_those_of_texts_that_have_ended_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggmq.pagecopies.MOST_BYTES", 1 << 20)
    rng = random.Random(1)
    with local(2) as (_, client):
        model = loaded(client, BUNDLED, N_CTX, [1, 1])
        engine, copies = Engine(model), copies_of(model)
        page_bytes = sum(n for stage in model.stages for memory in stage.memory.values() for _, n in memory.page_bytes(1))
        first: set[Any] = set()
        for _ in range(4):
            texts(engine, [[rng.randrange(3, 500) for _ in range(400)]])
            assert copies._kept and copies._n_bytes == sum(map(len, copies._kept.values())) < (1 << 20) + page_bytes * 8
            assert not first & copies._kept.keys(), "nobody holds those"
            first |= copies._kept.keys()
        engine.close()
        assert not copies._kept and not copies._n_bytes


def test_over_a_slow_network_and_of_what_is_soon_read_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [random.Random(1).randrange(3, 500) for _ in range(300)]
    with local(2) as (_, client):
        for name, value in (("FAST", 1e15), ("AGAIN_S", 1e9)):
            with monkeypatch.context() as changed:
                changed.setattr(f"ggmq.pagecopies.{name}", value)
                model = loaded(client, BUNDLED, N_CTX, [1, 1])
                texts(Engine(model), [prompt])
                assert not copies_of(model)._kept
                model.free()


def test_what_was_on_its_way_when_a_text_was_stopped_is_asked_for_again() -> None:
    prompt = [random.Random(2).randrange(3, 500) for _ in range(300)]
    with local(2) as (bus, client):
        model = loaded(client, BUNDLED, N_CTX, [1, 1])
        engine, copies = Engine(model), copies_of(model)
        alone = texts(Engine(model), [prompt], 80)
        model.store.drop_kept()
        copies.close()
        pid, stopped = worker_of(bus, model, 1), False

        def stop() -> None:
            nonlocal stopped
            if copies._saving.under_way and not stopped:
                stopped = True
                engine.abandon()

        kill = {70: lambda: os.kill(pid, signal.SIGKILL)}
        assert texts(engine, [prompt], 80, at=dict.fromkeys(range(1, 60), stop) | kill) == alone
        assert stopped and len(copies._kept) >= 300 // PAGE
