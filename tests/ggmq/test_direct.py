"""Activations between workers that are reached in every way there is: the same tokens, once over the wire, or through the
broker where workers cannot reach each other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.auth import new_keys
from config.keys import KeyPair, read_keys, write_keys
from ggmq.cluster import Client, LocalBus
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.model import Model
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.errors import Unavailable, WorkerLost
from tests.support.fixtures import ROOT, free_port, nmse
from tests.support.gguf_factory import tiny_model
from tests.support.loaded import loaded

pytestmark = pytest.mark.usefixtures("kernels")
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
TOKENS = [(7 * i + 3) % 50 for i in range(40)]


@contextmanager
def worker(*options: str) -> Iterator[subprocess.Popen[bytes]]:
    p = subprocess.Popen([sys.executable, "-m", "workers", "-t", "1", *options], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield p
    finally:
        p.terminate()
        p.wait(10)


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    write_keys(tmp_path / "keys", new_keys())
    return read_keys(tmp_path / "keys")


@pytest.fixture
def model(tmp_path: Path) -> GGUF:
    return GGUF(tiny_model(tmp_path / "m.gguf", "llama"))


def on_bus(bus: LocalBus, file: GGUF, n_stages: int = 2, **config: Any) -> Model:
    client = bus.start()
    order = [d.worker for d in client.devices()]
    return loaded(client, file, 128, [1] * n_stages, sorted(order), **config)


def reference_logits(model: GGUF) -> np.ndarray:
    bus = LocalBus()
    try:
        bus.spawn("CPU", 1)
        return Engine(on_bus(bus, model, 1), n_batch=8).logits(np.array(TOKENS, np.int32))
    finally:
        bus.close()


def check(bus: LocalBus, model: GGUF, direct: bool) -> None:
    """The bits of one worker, and where the activations went."""
    there = on_bus(bus, model)
    assert there.direct is direct
    got = Engine(there, n_batch=8).logits(np.array(TOKENS, np.int32))
    first = there.client.stats(there.stages[0].assignment.device)
    assert (first.handed_out_bytes > got.shape[0] * 64 * 4) is direct
    assert np.array_equal(got, reference_logits(model))


def test_workers_that_listen_with_keys(model: GGUF, keys: KeyPair) -> None:
    bus = LocalBus(keys)
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        stack.callback(bus.close)
        for port in ports:
            stack.enter_context(worker("-p", str(port), "-d", "CPU", "--keys", keys.path))
            bus.add_remote(f"127.0.0.1:{port}")
        check(bus, model, direct=True)


def test_a_worker_of_this_host_and_one_that_listens(model: GGUF, keys: KeyPair) -> None:
    bus = LocalBus(keys)
    port = free_port()
    with ExitStack() as stack:
        stack.callback(bus.close)
        stack.enter_context(worker("-p", str(port), "-d", "CPU", "--keys", keys.path, "--name", "zz"))
        bus.spawn("CPU", 1)
        bus.add_remote(f"127.0.0.1:{port}")
        bus.names[-1] = "zz"
        check(bus, model, direct=True)


def test_workers_that_dial_in_over_tcp(model: GGUF, keys: KeyPair) -> None:
    bus = LocalBus(keys, "tcp://127.0.0.1:*")
    port = free_port()
    with ExitStack() as stack:
        stack.callback(bus.close)
        for name, more in (("a", ()), ("b", ("-p", str(port)))):
            options = ("--broker", bus.broker.endpoints[-1], "-d", "CPU", "--keys", keys.path, "--name", name, *more)
            stack.enter_context(worker(*options))
            bus.names.append(name)
        check(bus, model, direct=True)
        socket.create_connection(("127.0.0.1", port), 5).close()


def test_two_devices_behind_one_front(model: GGUF, keys: KeyPair) -> None:
    bus = LocalBus(keys)
    port = free_port()
    with ExitStack() as stack:
        stack.callback(bus.close)
        stack.enter_context(worker("-p", str(port), "-d", "CPU,CPU", "--keys", keys.path))
        bus.add_remote(f"127.0.0.1:{port}")
        check(bus, model, direct=True)


def test_a_worker_that_cannot_be_reached_is_served_through_the_broker(model: GGUF) -> None:
    """A listening worker may not connect to a path of its host, which is where a spawned one is."""
    bus = LocalBus()
    port = free_port()
    with ExitStack() as stack:
        stack.callback(bus.close)
        stack.enter_context(worker("-p", str(port), "-d", "CPU", "--insecure", "--name", "aa"))
        bus.spawn("CPU", 1)
        bus.add_remote(f"127.0.0.1:{port}")
        bus.names[-1] = "aa"
        check(bus, model, direct=False)


def test_f16_activations_are_half_the_bytes_and_nearly_the_same(model: GGUF) -> None:
    bus = LocalBus()
    try:
        for _ in range(2):
            bus.spawn("CPU", 1)
        got, handed = {}, {}
        client = bus.start()
        for kind in (GGMLType.F32, GGMLType.F16):
            there = loaded(client, model, 128, [1, 1], activations=kind)
            first = there.stages[0].assignment.device
            before = client.stats(first).handed_out_bytes
            got[kind] = there.forward(TOKENS, 0, range(len(TOKENS)))
            handed[kind] = client.stats(first).handed_out_bytes - before
            client.drain()
    finally:
        bus.close()
    assert 2 * 40 * 64 < handed[GGMLType.F16] < 0.6 * handed[GGMLType.F32]
    assert 0 < nmse(got[GGMLType.F16], got[GGMLType.F32]) < 1e-5


def test_a_long_prompt_goes_in_pieces_where_others_wait_and_whole_where_none_do(model: GGUF) -> None:
    bus = LocalBus()
    try:
        bus.spawn("CPU", 1)
        there = on_bus(bus, model, 1)
        computes, results = [], []
        for others in (False, True):
            if others:
                other = Client(bus.context, "inproc://broker")
                other.request(m.AllocBuffer(other.session, 1, 64))
            before = there.client.stats(0).n_computes
            results.append(Engine(there).logits(np.array([*TOKENS, *TOKENS], np.int32)))
            computes.append(there.client.stats(0).n_computes - before)
            there.runner.tokens_per_s = 320.0  # a slow worker: 32 tokens are a turn
        other.close()
    finally:
        bus.close()
    assert computes == [1, 3]
    assert np.array_equal(*results)


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--cpus", "x"], "CPU numbers"), (["--cpus", "9999"], "may use the CPUs"), (["--spin-us", "-1"], "microseconds"),
     (["--cpus", str(CPUS[0]), "-t", "2"], "--cpus names 1"), (["--cpus", str(CPUS[0]), "-d", "CPU,CPU"], "one device")],
)  # fmt: skip
@pytest.mark.skipif(len(CPUS) < 2, reason="pinning two threads takes a system that can and two CPUs")
def test_options_that_cannot_be_are_refused(options: list[str], says: str) -> None:
    done = subprocess.run([sys.executable, "-m", "workers", *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(len(CPUS) < 2, reason="pinning two threads takes a system that can and two CPUs")
def test_pinned_threads_stay_on_their_cpus(model: GGUF) -> None:
    first, second = CPUS[:2]
    bus = LocalBus()
    try:
        bus.spawn("CPU", 2, ["--cpus", f"{first},{second}"])
        on_bus(bus, model, 1).forward([1], 0, [0])
        tasks = Path(f"/proc/{bus.workers[0].pid}/task").glob("*/status")
        allowed = [line.split()[1] for t in tasks for line in t.read_text().splitlines() if "Cpus_allowed_list" in line]
    finally:
        bus.close()
    assert allowed.count(str(first)) == 1 and allowed.count(str(second)) == 1 and len(allowed) > 2


@pytest.mark.parametrize(
    ("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=["first killed", "second killed", "second stopped"],
)  # fmt: skip
def test_a_stage_that_dies_ends_the_compute_with_an_error(model: GGUF, victim: int, how: signal.Signals) -> None:
    bus = LocalBus()
    try:
        for _ in range(2):
            bus.spawn("CPU", 1)
        there = on_bus(bus, model)
        assert there.direct
        there.forward(TOKENS, 0, [])
        there.forward([1], len(TOKENS), [0])
        os.kill(bus.workers[victim].pid, how)
        with pytest.raises(WorkerLost if how == signal.SIGKILL else Unavailable):
            there.forward([1], len(TOKENS) + 1, [0])
    finally:
        for p in bus.workers:
            p.kill()
        bus.close()
