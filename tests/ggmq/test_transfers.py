"""Weights on their way to workers: from other workers where they have them, and on where a connection broke; the same
tokens, whatever fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggmq.archs import open_arch
from ggmq.cluster import Client, LocalBus
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.loader import Loader
from ggmq.manifest import tensor_hashes
from ggmq.model import Model, ModelConfig, place_model
from protocol import messages as m
from protocol.errors import GgmqError, Unavailable, WorkerLost
from protocol.limits import MAX_CHUNK_BYTES
from tests.support.fixtures import free_port
from tests.support.gguf_factory import tiny_model
from tests.support.processes import WORKER, await_port, started, until

pytestmark = pytest.mark.usefixtures("kernels")
MIB = 1 << 20
TOKENS = np.array([(7 * i + 3) % 50 for i in range(9)], np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GGUF:
    """Some 38 MiB; most of it in weights of 4 MiB."""
    return GGUF(tiny_model(tmp_path_factory.mktemp("model") / "m.gguf", "llama", n_ff=16384))


@pytest.fixture(scope="module")
def expected(model: GGUF) -> np.ndarray:
    with bus(1) as (client, _, _):
        return logits(on(client, model, 0))


@contextmanager
def bus(n: int, *options: str, folders: tuple[Path, ...] = ()) -> Iterator[tuple[Client, list[Any], list[int]]]:
    """A client of a bus with so many workers that listen, their processes, and their devices' numbers; each has a cache if
    it has a folder."""
    ports, blocks = [free_port() for _ in range(n)], []
    local = LocalBus()
    try:
        for i, port in enumerate(ports):
            cache = ["--cache-dir", str(folders[i])] if i < len(folders) else []
            blocks.append(started([*WORKER, "-d", "CPU", "-t", "1", "-p", str(port), "--insecure", *cache, *options]))
        processes = [b.__enter__() for b in blocks]
        for port in ports:
            await_port(port)
            local.add_remote(f"127.0.0.1:{port}")
        client = local.start()
        addresses = [d.address for d in client.devices()]
        yield client, processes, [addresses.index(f"127.0.0.1:{port}") for port in ports]
    finally:
        local.close()
        for b in blocks:
            b.__exit__(None, None, None)


def on(client: Client, model: GGUF, *devices: int) -> Model:
    """Loaded on these devices."""
    there = place_model(ModelConfig(model.path, 64, tensor_split=[1] * len(devices)), open_arch(model), client,
                        [client.devices()[d].worker for d in devices])  # fmt: skip
    assert [s.assignment.device for s in there.stages] == list(devices)
    there.load()
    return there


def logits(model: Model) -> np.ndarray:
    return Engine(model, n_batch=16).logits(TOKENS)


def weight_bytes(model: Model) -> int:
    return sum(p.info.n_bytes for s in model.stages for p in s.placed.values())


# -- from other workers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["buffers", "cache", "file", "lease"])
def test_a_worker_takes_what_it_lacks_from_one_that_has_it(
    model: GGUF, expected: np.ndarray, tmp_path: Path, where: str
) -> None:
    local = LocalBus()
    try:
        local.spawn("CPU", 1, {"buffers": [], "cache": ["--cache-dir", str(tmp_path / "a")], "lease": ["--keep", "60"],
                               "file": ["--model-dir", str(model.path.parent)]}[where])  # fmt: skip
        local.spawn("CPU", 1)
        client = local.start()
        names = [d.worker for d in client.devices()]
        a, b = names.index("local0"), names.index("local1")
        if where != "file":
            own = client.another()
            first = on(own, model, a)
            assert (first.report.fetched_bytes, first.report.sent_bytes) == (0, weight_bytes(first))
            if where == "cache":
                first.free()
            if where == "lease":
                own.drain()
                assert client.stats(a).kept_bytes
        before = client.stats(a).handed_out_bytes
        second = on(client.another(), model, b)
        r = second.report
        assert (r.fetched_bytes, r.sent_bytes, r.cached_bytes) == (weight_bytes(second), 0, 0)
        assert r.fetched_bytes < client.stats(a).handed_out_bytes - before < 1.01 * r.fetched_bytes + 1e5
        assert np.array_equal(logits(second), expected)
        if where == "buffers":
            assert np.array_equal(logits(first), expected)
        if where != "file":
            own.close()
        second.client.close()
    finally:
        local.close()


def test_layers_of_several_workers_come_from_each_of_them(model: GGUF, expected: np.ndarray) -> None:
    with bus(3) as (client, _, _):  # whichever is which
        first = on(client, model, 0, 1)
        second = on(client, model, 2)
        assert second.report.sent_bytes == 0 and second.report.fetched_bytes == weight_bytes(second)
        assert min(client.stats(d).handed_out_bytes for d in (0, 1)) > 8 * MIB
        assert np.array_equal(logits(second), expected) and np.array_equal(logits(first), expected)


def test_a_damaged_source_is_found_out_and_the_rest_is_sent(model: GGUF, expected: np.ndarray, tmp_path: Path) -> None:
    with bus(2, folders=(tmp_path / "a",)) as (client, _, (a, b)):
        on(client, model, a).free()
        names = sorted({h.hex() for h in tensor_hashes(model).values()})
        until(lambda: sorted(p.name for p in (tmp_path / "a").iterdir()) == names)
        for path in (tmp_path / "a").iterdir():
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)
        second = on(client, model, b)
        assert second.report.sent_bytes == weight_bytes(second)
        assert np.array_equal(logits(second), expected)


def during_the_load(client: Client, device: int, do: Callable[[], None], after_bytes: int = 6 * MIB) -> threading.Thread:
    """Do something when a device has received so much. The client is one that nobody else uses."""

    def watch() -> None:
        try:
            due = time.monotonic() + 30
            while client.stats(device).wire_in_bytes < after_bytes and time.monotonic() < due:
                pass
            do()
        finally:
            client.close()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_source_that_goes_away_in_the_middle_is_done_without(
    model: GGUF, expected: np.ndarray, number: signal.Signals
) -> None:
    with bus(2) as (client, processes, (a, b)):
        on(client, model, a)
        other = place_model(ModelConfig(model.path, 64, tensor_split=[1]), open_arch(model), client.another(),
                            [client.devices()[b].worker])  # fmt: skip
        thread = during_the_load(client.another(), b, lambda: processes[0].send_signal(number))
        other.load()
        thread.join()
        r = other.report
        assert r.fetched_bytes > 0 and r.fetched_bytes + r.sent_bytes >= weight_bytes(other)
        assert np.array_equal(logits(other), expected)


def test_where_workers_cannot_reach_each_other_all_is_sent_from_here(
    model: GGUF, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bus(2) as (client, _, _):
        on(client, model, 0)
        real = Client.submit

        def submit(self: Client, header: m.Header, payload: Any = (), device: int = 0) -> int:
            if isinstance(header, m.Link) and len(header.devices) == 2:  # to a device that there is not
                header = m.Link(header.session, [*header.devices[:1], 99])
            return real(self, header, payload, device)

        monkeypatch.setattr(Client, "submit", submit)
        second = on(client, model, 1)
        assert (second.report.fetched_bytes, second.report.sent_bytes) == (0, weight_bytes(second))
        monkeypatch.undo()
        assert np.array_equal(logits(second), expected)


def test_without_a_link_a_fetch_is_refused_and_changes_nothing(model: GGUF) -> None:
    with bus(2) as (client, _, _):
        data = bytes(range(256)) * 16
        digest = tensor_hashes(model)["output.weight"]
        client.request(m.AllocBuffer(client.session, 1, len(data)), device=1)
        client.request(m.SetTensor(client.session, 1, 0, len(data)), [data], device=1)
        fetch = m.FetchTensor(client.session, 1, 0, 0, (1024, 1, 1, 1), m.Weight(digest, 4096), 0)
        assert client.request(fetch, device=1).header == m.Found(False)
        assert client.request(m.Link(client.session, [1, 0])).header == m.Found(True)
        assert client.request(fetch, device=1).header == m.Found(False), "nobody there has it"
        for wrong in (m.FetchTensor(client.session, 2, 0, 0, (1024, 1, 1, 1), m.Weight(digest, 4096), 0),
                      m.FetchTensor(client.session, 1, 0, 0, (1023, 1, 1, 1), m.Weight(digest, 4096), 0),
                      m.FetchTensor(client.session, 1, 1, 0, (1024, 1, 1, 1), m.Weight(digest, 4096), 0),
                      m.FetchTensor(client.session + 1, 1, 0, 0, (1024, 1, 1, 1), m.Weight(digest, 4096), 0),
                      m.FetchTensor(client.session, 1, 0, 0, (1024, 1, 1, 1), m.Weight(digest, 4096), 9)):  # fmt: skip
            with pytest.raises(GgmqError, match=r"FETCH_TENSOR|tensor|device 9"):
                client.request(wrong, device=1)
        assert bytes(client.request(m.GetTensor(client.session, 1, 0, len(data)), device=1).payload[0]) == data
        with pytest.raises(GgmqError, match="not a request of a client"):
            client.request(m.ReadWeight(m.Weight(digest, 4096), 0), device=1)


# -- on where it broke off ---------------------------------------------------------------------------------------------


def break_in_the_middle(there: Model, do: Callable[[], None]) -> None:
    """Load, and do something when some of it has been acknowledged."""
    done = False

    def progress(phase: str, n: int, total: int) -> None:
        nonlocal done
        if phase == "loading" and n > total // 2 and not done:
            done = True
            do()

    there.load(progress)
    assert done


def test_a_worker_that_slept_is_sent_the_rest(model: GGUF, expected: np.ndarray) -> None:
    with bus(1) as (client, (p,), _):
        there = place_model(ModelConfig(model.path, 64), open_arch(model), client)

        def sleep() -> None:
            os.kill(p.pid, signal.SIGSTOP)
            threading.Timer(4.0, os.kill, (p.pid, signal.SIGCONT)).start()

        break_in_the_middle(there, sleep)
        most = weight_bytes(there) + MAX_CHUNK_BYTES
        assert there.report.sent_bytes <= most and client.stats(0).payload_in_bytes <= most
        assert np.array_equal(logits(there), expected)


def test_a_worker_that_was_killed_and_is_back_with_its_cache_is_sent_the_rest(
    model: GGUF, expected: np.ndarray, tmp_path: Path
) -> None:
    with bus(1, folders=(tmp_path / "cache",)) as (client, (p,), _):
        there = place_model(ModelConfig(model.path, 64), open_arch(model), client)
        port = client.devices()[0].address.rpartition(":")[2]
        command = [*WORKER, "-d", "CPU", "-t", "1", "-p", port, "--insecure", "--cache-dir", str(tmp_path / "cache")]
        again: list[Any] = []
        acknowledged = 0

        def kill() -> None:
            nonlocal acknowledged
            acknowledged = client.stats(0).payload_in_bytes
            time.sleep(0.3)  # the disk is a moment behind
            p.send_signal(signal.SIGKILL)
            p.wait()
            again.append(started(command))
            again[0].__enter__()

        try:
            break_in_the_middle(there, kill)
            r = there.report
            assert client.stats(0).payload_in_bytes <= weight_bytes(there) - acknowledged + MAX_CHUNK_BYTES
            assert r.cached_bytes >= acknowledged - MAX_CHUNK_BYTES > 0
            assert np.array_equal(logits(there), expected)
        finally:
            for block in again:
                block.__exit__(None, None, None)


def test_a_worker_that_is_gone_for_good_is_an_error(model: GGUF) -> None:
    with bus(1) as (client, (p,), _):
        there = place_model(ModelConfig(model.path, 64), open_arch(model), client)

        def kill() -> None:
            p.send_signal(signal.SIGKILL)
            p.wait()

        there.keeper.patience_s = 0.5
        with pytest.raises(Unavailable, match="was lost"):
            break_in_the_middle(there, kill)


def test_a_rest_of_other_bytes_in_a_cache_is_found_out_and_sent_again(
    model: GGUF, expected: np.ndarray, tmp_path: Path
) -> None:
    """Somebody said of other bytes that they have the hash of a weight, and broke off."""
    hashes = tensor_hashes(model)
    with bus(1, folders=(tmp_path / "cache",)) as (client, _, _):
        liar = client.another()
        t = model.tensors["blk.0.ffn_up.weight"]
        liar.request(m.AllocBuffer(liar.session, 1, t.n_bytes))
        for at in (0, MIB):
            lie = m.SetTensor(liar.session, 1, 0, t.n_bytes, at, int(t.type), t.ne, hashes[t.name])
            liar.request(lie, [bytes(MIB)])
        liar.drain()
        liar.close()
        there = on(client, model, 0)
        assert there.report.cached_bytes == 2 * MIB and there.report.sent_bytes == weight_bytes(there) + 2 * MIB - 0
        assert np.array_equal(logits(there), expected)


def test_a_worker_that_falls_silent_while_it_is_loaded_again_is_not_taken_for_whole(
    model: GGUF, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bus(1) as (client, _, _):
        there, real, calls = on(client, model, 0), Loader.load, []

        def load(self: Loader, parts: Any, *more: Any) -> None:
            calls.append(len(parts))
            real(self, parts if len(calls) > 1 else parts[-1:], *more)
            if len(calls) == 1:
                raise WorkerLost("silent for a while")

        monkeypatch.setattr(Loader, "load", load)
        client.drain()  # as if it had come back empty
        there.recover(WorkerLost("silent"))
        assert there.keeper.empty == set(range(there.arch.hp.n_layer))
        assert len(calls) == 2 and np.array_equal(logits(there), expected)


def test_a_loader_may_be_asked_again_for_what_is_there(model: GGUF) -> None:
    with bus(1) as (client, _, _):
        there = on(client, model, 0)
        loader = Loader(client, there.arch, there.store.room)
        loader.load([part for s in there.stages for part in s.parts.values()], there.keeper.hashes)
        assert (loader.report.sent_bytes, loader.report.cached_bytes) == (0, weight_bytes(there))
