"""A worker that dies, hangs or is drained costs a pause: real processes that are killed, and the same tokens."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ggmq.cluster import Client, LocalBus, connect
from ggmq.engine import Engine
from ggmq.hub import BUNDLED
from ggmq.keeping import SILENT_S
from ggmq.model import Model
from ggmq.rereading import read_again
from ggmq.sampling import SamplingParams
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.errors import Unavailable
from tests.support.fixtures import free_port
from tests.support.loaded import computed, loaded
from tests.support.processes import GGMQ, WORKER, await_devices, children_of, read_some, started, until
from tests.support.random_models import base, write
from tests.support.serving import serving

pytestmark = pytest.mark.usefixtures("kernels")
RUN = [*GGMQ, "run", "-p", "Once upon a time", "--temp", "0", "--ignore-eos"]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
N_CTX = 512


@contextmanager
def local(n: int) -> Iterator[tuple[LocalBus, Client]]:
    """A bus of its own with so many workers of one thread."""
    bus = LocalBus()
    try:
        for _ in range(n):
            bus.spawn("CPU", 1)
        yield bus, bus.start()
    finally:
        bus.close()


def worker_of(bus: LocalBus, model: Model, stage: int) -> int:
    """The process that a stage lies on."""
    name = model.client.devices()[model.stages[stage].assignment.device].worker
    return bus._local[name][0].pid


def texts(
    engine: Engine, prompts: list[list[int]], n: int = 40, at: dict[int, Callable[[], None]] | None = None
) -> list[list[int]]:
    """What is made of prompts that run together. at: what is done before some of the steps."""
    params = [SamplingParams(temperature=0) if i % 2 else SamplingParams(seed=i) for i in range(len(prompts))]
    sequences = [engine.add(p, x, n) for p, x in zip(prompts, params, strict=True)]
    step = 0
    while not all(s.finished for s in sequences):
        (at or {}).get(step, lambda: None)()
        engine.step()
        step += 1
        assert step < 2000
    return [s.tokens[s.n_prompt :] for s in sequences]


def prompts_of(rng: random.Random, n_vocab: int, *lengths: int) -> list[list[int]]:
    """Some begin alike."""
    head = [rng.randrange(3, n_vocab) for _ in range(70)]
    heads = [head[: n - 1] if i % 2 else [] for i, n in enumerate(lengths)]
    return [h + [rng.randrange(3, n_vocab) for _ in range(n - len(h))] for h, n in zip(heads, lengths, strict=True)]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt-oss", "qwen3moe", "mamba2"])
@pytest.mark.parametrize(("n_workers", "copied"), [(2, True), (3, False)])
def test_whichever_stage_is_killed_and_whenever_every_text_is_the_same(
    arch: str, n_workers: int, copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ggmq.pagecopies.AGAIN_S", 0.0 if copied else 1e9)
    monkeypatch.setattr("ggmq.pagecopies.FAST", 0.0)
    rng = random.Random(f"{arch} {n_workers}")
    file = base(arch, rng)
    path = write(tmp_path / "m.gguf", file)
    prompts = prompts_of(rng, file.n_vocab, 5, 90, 150, 30, 1, 200, 64, 128)
    with local(n_workers) as (bus, client):
        model = loaded(client, path, N_CTX, [1] * n_workers, n_seq=8)
        alone = texts(Engine(model), prompts)
        for _ in range(2 if n_workers == 3 else 1):
            stage = rng.randrange(len(model.stages))
            pid = worker_of(bus, model, stage)
            engine = Engine(model)
            events: list[str] = []
            engine.told = lambda event, seen=events, **figures: seen.append(event)
            at = rng.randrange(1, 40)
            assert texts(engine, prompts, at={at: lambda pid=pid: os.kill(pid, signal.SIGKILL)}) == alone, (stage, at)
            assert events == ["worker lost", "recovered"]
        assert len({s.assignment.device for s in model.stages}) < n_workers


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba2"])
def test_what_was_read_is_there_when_a_broker_is_back(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save where layers keep states: a step that is done twice would count twice there."""
    rng = random.Random(arch)
    file = base(arch, rng)
    path = write(tmp_path / "m.gguf", file)
    prompts = prompts_of(rng, file.n_vocab, 5, 300, 150)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    read: list[set[int]] = []

    def seen(model: Model, sequences: Any, empty: set[int]) -> None:
        read.append(set(empty))
        read_again(model, sequences, empty)

    monkeypatch.setattr("ggmq.engine.read_again", seen)
    with contextlib.ExitStack() as ended:
        def start_broker() -> subprocess.Popen[bytes]:
            command = [*GGMQ, "broker", "--listen", endpoint, "--insecure"]
            return ended.enter_context(started(command, stderr=subprocess.DEVNULL))

        broker = [start_broker()]
        for _ in range(2):
            ended.enter_context(started([*WORKER, "--broker", endpoint, "-d", "CPU", "-t", "1", "--insecure"],
                                        stderr=subprocess.DEVNULL))  # fmt: skip
        await_devices(endpoint, 2)
        client = connect(endpoint)
        model = loaded(client, path, N_CTX, [1, 1], n_seq=8)
        alone = texts(Engine(model), prompts)
        engine = Engine(model)
        events: list[str] = []
        engine.told = lambda event, **figures: events.append(event)

        def kill_and_start() -> None:
            broker[-1].kill()
            broker[-1].wait()
            broker.append(start_broker())

        assert texts(engine, prompts, at={1: kill_and_start, 25: kill_and_start}) == alone
        assert events == ["worker lost", "recovered"] * 2
        everything = set(range(model.arch.hp.n_layer))
        assert read == ([] if arch != "mamba2" else [everything] * len(read))
        assert model.keeper.empty == set()
        client.close()


def test_stages_stay_cut_where_activations_are_rounded_between_them() -> None:
    with local(2) as (bus, client):
        model = loaded(client, BUNDLED, N_CTX, [1, 1], activations=GGMLType.F16)
        prompts = [model.arch.hp.n_layer * [5], [9, 8, 7] * 30]
        alone = texts(Engine(model), prompts)
        cuts = [s.assignment.layers for s in model.stages]
        pid = worker_of(bus, model, 1)
        assert texts(Engine(model), prompts, at={9: lambda: os.kill(pid, signal.SIGKILL)}) == alone
        assert [s.assignment.layers for s in model.stages] == cuts
        assert len({s.assignment.device for s in model.stages}) == 1


def test_a_spare_takes_over_and_one_that_comes_late_is_used_next() -> None:
    with local(3) as (bus, client):
        model = loaded(client, BUNDLED, N_CTX, [1, 1, 0])
        prompts = [[7] * 100, [5, 6] * 40]
        alone = texts(Engine(model), prompts, 60)
        for stage in (0, 1, 1, 0):
            pid, before = worker_of(bus, model, stage), {s.assignment.device for s in model.stages}
            assert texts(Engine(model), prompts, 60, {12: lambda pid=pid: os.kill(pid, signal.SIGKILL)}) == alone
            assert len(model.stages) == 2 and {s.assignment.device for s in model.stages} - before
            assert bus.replace_ended()
            until(lambda: sum(d.state == "ready" for d in client.devices()) == 3)


def test_one_that_hangs_is_done_without_and_holds_nothing_when_it_is_back() -> None:
    with local(2) as (bus, client):
        model = loaded(client, BUNDLED, N_CTX, [1, 1])
        prompts = [[7] * 100, [5, 6] * 40]
        alone = texts(Engine(model), prompts, 60)
        engine, pid = Engine(model), worker_of(bus, model, 1)
        start = time.monotonic()
        assert texts(engine, prompts, 60, {12: lambda: os.kill(pid, signal.SIGSTOP)}) == alone
        assert time.monotonic() - start < SILENT_S + 10 and len(model.stages) == 1
        os.kill(pid, signal.SIGCONT)
        until(lambda: [d.state for d in client.devices()] == ["ready"] * 2)
        engine.tend(idle=True)
        until(lambda: len(model.stages) == 2)  # it has its layers again
        assert texts(engine, prompts, 60) == alone
        assert all(client.stats(i).n_sessions == 1 for i in range(2))
        n = sum(len(part.buffers) for s in model.stages for part in s.parts.values())
        assert sum(client.stats(i).n_buffers for i in range(2)) == n


def test_without_a_place_it_waits_and_then_says_so() -> None:
    with local(1) as (bus, client):
        model = loaded(client, BUNDLED, N_CTX)
        model.keeper.patience_s = 1.0
        pid = worker_of(bus, model, 0)
        engine = Engine(model)
        with pytest.raises(Unavailable, match="nobody took its place") as e:
            texts(engine, [[7] * 20], 60, {5: lambda: os.kill(pid, signal.SIGKILL)})
        assert e.value.retryable


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba2"])
def test_what_was_read_moves_with_the_layers(arch: str, tmp_path: Path) -> None:
    rng = random.Random(arch)
    file = base(arch, rng)
    path = write(tmp_path / "m.gguf", file)
    prompts = prompts_of(rng, file.n_vocab, 90, 150, 30, 200)
    with local(3) as (_, client):
        model = loaded(client, path, N_CTX, [1, 1, 0], n_seq=4)
        alone = texts(Engine(model), prompts)
        engine = Engine(model)
        retired = model.stages[-1].assignment.device
        before = client.stats(retired).n_computes

        def leave() -> None:
            client.request(m.Retire(True), device=retired)
            time.sleep(0.3)  # the broker tells of it a tick later

        n_read = engine.timings.prefill_tokens
        assert texts(engine, prompts, at={12: leave}) == alone
        assert engine.timings.prefill_tokens - n_read < sum(map(len, prompts)) + 1, "nothing is read again"
        assert retired not in {s.assignment.device for s in model.stages} and client.stats(retired).n_computes > before
        until(lambda: client.devices()[retired].n_sessions == 0)
        assert client.stats(retired).n_buffers == 0
        assert texts(engine, prompts) == alone
        client.request(m.Retire(False), device=retired)
        assert not client.devices()[retired].retired


def test_a_worker_is_drained_while_a_server_answers_and_the_answers_are_the_same() -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    broker = [*GGMQ, "broker", "--listen", endpoint, "--insecure"]
    worker = [*WORKER, "--broker", endpoint, "-d", "CPU", "-t", "1", "--insecure", "--name"]
    body = {"prompt": "Once upon a time", "max_tokens": 450, "temperature": 0, "ignore_eos": True}
    quiet = {"stderr": subprocess.DEVNULL}
    with started(broker, **quiet), started([*worker, "a"], **quiet) as a, started([*worker, "b"], **quiet):
        await_devices(endpoint, 2)
        with serving("--broker", endpoint, "--insecure") as server:
            alone = server.post("/v1/completions", **body).json()["choices"]
            answers: list[httpx.Response] = []
            asker = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", **body)))
            asker.start()
            until(lambda: any(s["state"] == "decode" for s in server.get("/slots").json()) or not asker.is_alive())
            done = subprocess.run([*GGMQ, "drain", "a", "--broker", endpoint], capture_output=True, timeout=60)
            assert done.returncode == 0 and b"may be ended" in done.stdout, done.stderr.decode()
            a.terminate()
            a.wait()
            asker.join()
            assert answers[0].status_code == 200 and answers[0].json()["choices"] == alone
            assert server.post("/v1/completions", **body).json()["choices"] == alone
        wrong = subprocess.run([*GGMQ, "drain", "c", "--broker", endpoint], capture_output=True, timeout=60)
        assert wrong.returncode == 2 and b"expected the name of a worker, one of: b" in wrong.stderr


def test_a_broker_that_is_killed_twice_and_started_again_gives_the_same_text() -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    broker = [*GGMQ, "broker", "--listen", endpoint, "--insecure"]
    worker = [*WORKER, "--broker", endpoint, "-d", "CPU", "-t", "1", "--insecure", "--name"]
    quiet = {"stderr": subprocess.DEVNULL}
    alone = subprocess.run([*RUN, "-n", "300", "--workers", "1"], capture_output=True, check=True).stdout
    with started([*worker, "a"], **quiet), started([*worker, "b"], **quiet), started(broker, **quiet) as first:
        await_devices(endpoint, 2)
        with started([*RUN, "-n", "300", "--broker", endpoint, "--insecure"], **PIPES) as p:
            got = read_some(p, 50)
            first.kill()
            with started(broker, **quiet) as second:
                got += read_some(p, 200)
                second.kill()
                second.wait()
                with started(broker, **quiet):
                    out, err = p.communicate(timeout=60)
                    assert p.returncode == 0 and got + out == alone, err.decode()
                    client = connect(endpoint)
                    stats = [client.stats(i) for i in range(2)]
                    client.close()
                    assert [s.cache_misses for s in stats] == [0, 0]


def kill_a_worker_of(pid: int) -> None:
    """Of a command's workers, of which one may only just be started again."""

    def killed() -> bool:
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            workers = [c for c in children_of(pid) if b"workers" in Path(f"/proc/{c}/cmdline").read_bytes()]
            if workers:
                os.kill(random.choice(workers), signal.SIGKILL)
                return True
        return False

    until(killed)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_run_goes_on_when_its_workers_are_killed_one_after_the_other(n_workers: int) -> None:
    alone = subprocess.run([*RUN, "-n", "400", "--workers", "1"], capture_output=True, check=True).stdout
    with started([*RUN, "-n", "400", "--workers", str(n_workers)], **PIPES) as p:
        got = read_some(p, 50)
        for _ in range(3):
            kill_a_worker_of(p.pid)
            got += read_some(p, 200)
        out, err = p.communicate(timeout=60)
    assert p.returncode == 0 and got + out == alone, err.decode()


def test_pages_that_are_in_files_are_not_computed_again(tmp_path: Path) -> None:
    with local(2) as (bus, client):
        model = loaded(client, BUNDLED, N_CTX, [1, 1], prompt_cache=tmp_path)
        rng = random.Random(3)
        prompts = [[rng.randrange(3, 500) for _ in range(300)]]
        alone = texts(Engine(model), prompts)
        client.drain()
        model = loaded(client, BUNDLED, N_CTX, [1, 1], prompt_cache=tmp_path)
        engine, pid = Engine(model), worker_of(bus, model, 1)
        counts = computed(model)
        assert texts(engine, prompts, at={9: lambda: os.kill(pid, signal.SIGKILL)}) == alone
        assert sum(counts) < 250, "the prompt came from files, before and after the worker was lost"
        engine.close()
