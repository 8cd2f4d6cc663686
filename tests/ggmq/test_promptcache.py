"""What was read of prompts stays in files: after a restart little is read again, and no token is another."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ggmq.archs.memory import PAGE
from ggmq.cluster import Client, local_bus
from ggmq.engine import Engine
from ggmq.hub import BUNDLED
from ggmq.names import ROOT, Content, as_bytes
from ggmq.pagefiles import ENTRY, PageFiles
from ggmq.sampling import SamplingParams
from protocol.dtypes import GGMLType
from protocol.errors import ConfigError, OutOfMemory
from tests.support.gguf_factory import tiny_model
from tests.support.loaded import cpu_workers, loaded
from tests.support.processes import GGMQ, children_of, until
from tests.support.random_models import base, write
from tests.support.serving import serving

GREEDY = SamplingParams(temperature=0)
N_MADE = 20


@pytest.fixture(scope="module")
def two() -> Iterator[Client]:
    with cpu_workers(2) as client:
        yield client


class Told(NamedTuple):
    """What came of some prompts: tokens, how many of each prompt were there already, and notes."""

    made: list[list[int]]
    n_cached: list[int]
    notes: list[str]


def told(
    client: Client, path: Path, folder: Path | None, prompts: Sequence[Sequence[int]], n_ctx: int = 1024,
    split: Sequence[float] = (1,), before: Callable[[Engine], None] = lambda engine: None, **config: Any,
) -> Told:  # fmt: skip
    """A run of its own: the model is loaded, each prompt is answered after the other, and all is let go."""
    notes: list[str] = []
    model = loaded(client, path, n_ctx, list(split), prompt_cache=folder, **config)
    model.note = notes.append
    try:
        engine, sequences = Engine(model), []
        before(engine)
        for p in prompts:
            sequences.append(engine.add(p, GREEDY, N_MADE))
            while not sequences[-1].finished:
                engine.step()
        engine.close()
        return Told([s.tokens[s.n_prompt :] for s in sequences], [s.n_cached for s in sequences], notes)
    finally:
        client.drain()


def prompts_of(n_vocab: int, *lengths: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(n_vocab) for _ in range(n)] for n in lengths]


def entries(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if ENTRY.fullmatch(p.name))


MODELS: dict[str, dict[str, Any]] = {
    "one worker": {},
    "two workers": {"split": (1, 1)},
    "f16 between stages": {"split": (1, 1), "activations": GGMLType.F16},
    "q8_0": {"cache_type_k": GGMLType.Q8_0, "cache_type_v": GGMLType.Q8_0},
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_conversation_goes_on_after_a_restart_with_one_token_read_again(
    two: Client, tmp_path: Path, config: dict[str, Any]
) -> None:
    first = prompts_of(700, 3, 64, 200, 500)
    plain = told(two, BUNDLED, None, first, **config)
    assert told(two, BUNDLED, tmp_path, first, **config).made == plain.made
    again = told(two, BUNDLED, tmp_path, first, **config)
    assert again.made == plain.made and again.n_cached == [len(p) - 1 for p in first]
    tails = prompts_of(700, 5, 70, 1, 9, seed=2)
    longer = [[*p, *made, *tail] for p, made, tail in zip(first, plain.made, tails, strict=True)]
    went_on = told(two, BUNDLED, tmp_path, longer, **config)
    assert went_on.made == told(two, BUNDLED, None, longer, **config).made and not went_on.notes
    for p, n in zip(first, went_on.n_cached, strict=True):
        assert n >= len(p) + N_MADE - 1, "all but the last token, which no pass has read"
    assert (tmp_path.stat().st_mode & 0o77, {p.stat().st_mode & 0o77 for p in entries(tmp_path)})[1] == {0}


@pytest.mark.parametrize("arch", ["gemma3", "gpt-oss"])
def test_layers_with_windows_have_what_they_see(two: Client, tmp_path: Path, arch: str) -> None:
    m = base(arch, random.Random(f"{arch} 5"), arch == "gpt-oss").having(attention__sliding_window=40)
    path = write(tmp_path / "m.gguf", m)
    first = prompts_of(m.n_vocab, 30, 300, 600)
    plain = told(two, path, None, first)
    told(two, path, tmp_path / "kept", first)
    again = told(two, path, tmp_path / "kept", first)
    assert again.made == plain.made and again.n_cached == [len(p) - 1 for p in first]


def test_a_part_of_a_page_is_used_and_only_the_longest_is_kept(two: Client, tmp_path: Path) -> None:
    common, *tails = prompts_of(700, 150, 30, 40)
    told(two, BUNDLED, tmp_path, [common])
    n = len(entries(tmp_path))
    longer = [*common, *told(two, BUNDLED, None, [common]).made[0]]
    assert told(two, BUNDLED, tmp_path, [longer]).n_cached == [150 + N_MADE - 1]
    assert len(entries(tmp_path)) == n, "the end that went on is in its place"
    prompts = [[*common, *tail] for tail in tails]
    got = told(two, BUNDLED, tmp_path, prompts)
    assert min(got.n_cached) >= 150 and got.made == told(two, BUNDLED, None, prompts).made


def test_what_another_model_or_other_types_have_read_is_not_taken(two: Client, tmp_path: Path) -> None:
    prompts = prompts_of(50, 200)
    paths = [tiny_model(tmp_path / f"{seed}.gguf", "llama", seed=seed) for seed in (1, 2)]
    told(two, paths[0], tmp_path / "kept", prompts, 512)
    assert told(two, paths[0], tmp_path / "kept", prompts, 320).n_cached == [199]
    assert told(two, paths[1], tmp_path / "kept", prompts, 512).n_cached == [0]
    told(two, BUNDLED, tmp_path / "kept", prompts)
    assert told(two, BUNDLED, tmp_path / "kept", prompts, cache_type_k=GGMLType.Q8_0).n_cached == [0]
    assert told(two, BUNDLED, tmp_path / "kept", prompts).n_cached == [199]
    assert told(two, paths[0], tmp_path / "kept", prompts, 512).n_cached == [199]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[random.Random(path.name).randrange(100, len(raw))] ^= 4
    path.write_bytes(raw)


def swapped(path: Path) -> None:
    path.write_bytes(entries(path.parent)[0].read_bytes())


def linked(path: Path) -> None:
    target = path.parent / "elsewhere"
    os.replace(path, target)
    path.symlink_to(target)


def folder_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut, emptied, flipped, swapped, linked, folder_of, fifo, Path.unlink])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after it was found"])
def test_what_is_damaged_is_read_anew(two: Client, tmp_path: Path, damage: Callable[[Path], None], late: bool) -> None:
    path, folder = tiny_model(tmp_path / "m.gguf", "llama"), tmp_path / "kept"
    prompts = prompts_of(50, 300)
    plain = told(two, path, folder, prompts, 512)

    def hurt(engine: Engine | None = None) -> None:
        if engine is not None:
            assert engine.model.prompts is not None
            until(engine.model.prompts.ready)
        for p in entries(folder)[1::2]:
            damage(p)

    if not late:
        hurt()
    again = told(two, path, folder, prompts, 512, before=hurt if late else lambda engine: None)
    assert again.made == plain.made and again.n_cached[0] < 299
    third = told(two, path, folder, prompts, 512)
    assert third.made == plain.made
    if damage not in (linked, folder_of, fifo):
        assert third.n_cached == [299], "it was written anew"


def test_the_folder_stays_under_its_quota_and_the_newest_stay(two: Client, tmp_path: Path) -> None:
    path, folder = tiny_model(tmp_path / "m.gguf", "llama"), tmp_path / "kept"
    prompts = prompts_of(50, *[300] * 8)
    told(two, path, folder, prompts[:1], 512)
    each = sum(p.stat().st_size for p in entries(folder))
    told(two, path, folder, prompts, 512, prompt_cache_bytes=4 * each)
    assert sum(p.stat().st_size for p in entries(folder)) <= 4 * each
    again = told(two, path, folder, [prompts[-1], prompts[1]], 512, prompt_cache_bytes=4 * each)
    assert again.n_cached == [299, 0]


def test_a_folder_that_is_lost_or_full_costs_nothing_but_itself(two: Client, tmp_path: Path) -> None:
    path, folder = tiny_model(tmp_path / "m.gguf", "llama"), tmp_path / "kept"
    prompts = prompts_of(50, 300, 200)
    plain = told(two, path, None, prompts, 512)
    lost = told(two, path, folder, prompts, 512, before=lambda engine: folder.rmdir())
    assert lost.made == plain.made and not folder.exists()
    assert len(lost.notes) == 1 and "prompts that are not kept are read anew" in lost.notes[0]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [*GGMQ, "run", "-p", "Once upon a time", "-n", "100", "-s", "1", "--workers", "1", "-t", "1"]
    full = subprocess.run([*command, "--prompt-cache", str(folder)], preexec_fn=limit, capture_output=True, timeout=120)
    assert full.returncode == 0 and b"File too large" in full.stderr and not list(folder.iterdir())
    assert full.stdout == subprocess.run(command, capture_output=True, timeout=120, check=True).stdout


def test_a_disk_that_does_not_answer_delays_nothing_for_long(
    two: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder, wakes = tiny_model(tmp_path / "m.gguf", "llama"), tmp_path / "kept", threading.Event()
    prompts = prompts_of(50, 300, 200)
    plain = told(two, path, folder, prompts, 512)
    monkeypatch.setattr("ggmq.pagefiles.STALL_S", 0.3)

    def stall(engine: Engine) -> None:
        assert engine.model.prompts is not None
        until(engine.model.prompts.ready)
        engine.model.prompts.files._start(wakes.wait)

    try:
        assert told(two, path, folder, prompts, 512, before=stall).made == plain.made
    finally:
        wakes.set()
    assert told(two, path, folder, prompts, 512).n_cached == [299, 199]


def test_many_at_once_share_what_is_brought_and_pages_come_back(two: Client, tmp_path: Path) -> None:
    common, *tails = prompts_of(700, 400, *range(1, 9))
    prompts = [[*common, *tail] for tail in tails]
    plain = told(two, BUNDLED, tmp_path, prompts)
    model = loaded(two, BUNDLED, 1024, [1, 1], n_seq=8, n_tokens=2048, prompt_cache=tmp_path)
    engine, free = Engine(model), dict(model.store.n_free)
    try:
        sequences = [engine.add(p, GREEDY, N_MADE) for p in prompts]
        engine.step()
        engine.leave(sequences[0])  # while its pages are on their way, or just there
        while engine.busy:
            engine.step()
        assert [s.tokens[s.n_prompt :] for s in sequences[1:]] == plain.made[1:]
        assert engine.timings.prefill_tokens <= 8 * PAGE and model.store.n_free == free
    finally:
        engine.close()
        two.drain()


def test_where_pages_run_short_nothing_is_brought_that_has_no_room(two: Client, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.gguf", "llama")
    prompts = prompts_of(50, *[280] * 6)
    plain = told(two, path, tmp_path / "kept", prompts, 320)
    model = loaded(two, path, 320, [1, 1], n_seq=6, n_tokens=700, prompt_cache=tmp_path / "kept")
    engine, free = Engine(model), dict(model.store.n_free)
    try:
        sequences = [engine.add(p, GREEDY, N_MADE) for p in prompts]
        while engine.busy:
            engine.step()
        assert [s.tokens[s.n_prompt :] for s in sequences] == plain.made and model.store.n_free == free
    except OutOfMemory as e:
        pytest.fail(str(e))
    finally:
        engine.close()
        two.drain()


def test_a_server_that_is_killed_goes_on_where_it_was_and_a_worker_that_is_killed_costs_little(tmp_path: Path) -> None:
    options = ["--prompt-cache", str(tmp_path / "kept"), "-c", "2048"]
    body: dict[str, Any] = {"prompt": "Once upon a time " * 100, "max_tokens": 30, "temperature": 0}
    with serving(*options) as server:
        first = server.post("/v1/completions", **body).json()
        n_prompt = first["usage"]["prompt_tokens"]
        until(lambda: len(entries(tmp_path / "kept")) > n_prompt // PAGE)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with serving(*options) as server:
        again = server.post("/v1/completions", **body).json()
        assert again["choices"] == first["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == n_prompt - 1
        os.kill(children_of(server.process.pid)[0], signal.SIGKILL)
        third = server.post("/v1/completions", **body).json()
        assert third["choices"] == first["choices"]
        assert third["usage"]["prompt_tokens_details"]["cached_tokens"] == n_prompt - 1


def test_what_was_cancelled_is_kept_later_and_a_worker_that_sleeps_is_not_waited_for(tmp_path: Path) -> None:
    prompts = prompts_of(700, 400)
    with local_bus() as bus:
        bus.spawn("CPU", 1)
        client = bus.start()
        model = loaded(client, BUNDLED, 1024, prompt_cache=tmp_path)
        engine = Engine(model)
        s = engine.add(prompts[0], GREEDY, N_MADE)
        while not s.finished:
            engine.step()
            engine.abandon()
        engine.close()
        assert engine.scheduler.bringer is not None and len(entries(tmp_path)) == (400 + N_MADE) // PAGE + 1
        client.drain()
        model = loaded(client, BUNDLED, 1024, prompt_cache=tmp_path)
        engine = Engine(model)
        again = engine.add([*prompts[0][:300], *prompts[0]], GREEDY, 2)
        while not again.n_made:
            engine.step()
        engine.leave(again)
        os.kill(bus.workers[0].pid, signal.SIGSTOP)
        start = time.monotonic()
        engine.close(1.0)
        assert time.monotonic() - start < 20, "a minute is what a reply may take"


def test_a_model_with_states_and_a_file_for_a_folder_are_told(two: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file: expected a folder"):
        PageFiles(tmp_path / "file", bytes(16), 1, print)
    result = subprocess.run([*GGMQ, "run", "-p", "a", "-n", "1", "--prompt-cache", str(tmp_path / "file")],
                            capture_output=True, text=True, timeout=120)  # fmt: skip
    assert result.returncode == 2 and "expected a folder" in result.stderr and "Traceback" not in result.stderr
    m = base("mamba2", random.Random(1))
    got = told(two, write(tmp_path / "m.gguf", m), tmp_path / "kept", prompts_of(m.n_vocab, 100), 256)
    assert not (tmp_path / "kept").exists() and got.n_cached == [0]


def test_two_that_share_a_folder_leave_each_other_whole_entries(tmp_path: Path) -> None:
    files = [PageFiles(tmp_path, bytes(16), 1 << 20, pytest.fail) for _ in range(2)]
    content = Content(ROOT, as_bytes(range(PAGE)))
    for f in files:
        until(f.ready)
        f.write(0, content, [b"a" * 1000, b"b" * 500])
    assert {f.read(0, content, 1500).result(10) for f in files} == {b"a" * 1000 + b"b" * 500}
    assert files[1].read(3, content, 1500).result(10) is None
    for f in files:
        f.close(10)
    assert len(list(tmp_path.iterdir())) == 1
