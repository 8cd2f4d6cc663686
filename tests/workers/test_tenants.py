"""Several clients on one worker: each has what is his, and nothing that another does changes his tokens."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import zmq

from config.auth import happening, monitor_of
from config.reaching import Happening
from ggmq.archs import open_arch
from ggmq.cluster import Client, connect
from ggmq.gguf import GGUF
from ggmq.model import Model, ModelConfig, place_model
from protocol import frames, limits
from protocol import messages as m
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import Cancelled, HandleError, OutOfMemory
from protocol.frames import Message, encode
from protocol.graph import Graph
from tests.support.attacker import Attacker, listening_worker
from tests.support.fixtures import free_port
from tests.support.flooding import RUDE
from tests.support.gguf_factory import tiny_model
from tests.support.one_worker import OneWorker
from tests.support.processes import GGMQ, WORKER, await_devices, started, until
from tests.support.strategies import leaf
from workers.devices import open_device
from workers.devices.host import HostDevice
from workers.executor import MAX_PLANS
from workers.ticks import nothing

pytestmark = pytest.mark.usefixtures("kernels")
MIB = 1 << 20
N_TOKENS = 200


@contextmanager
def bus(device: str, *options: str, said: int | IO[str] = subprocess.DEVNULL) -> Iterator[str]:
    """The endpoint of a broker with one worker, each a process of its own. said: where the broker's lines go."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with started([*GGMQ, "broker", "--listen", endpoint, "--insecure"], stderr=said), \
         started([*WORKER, "--broker", endpoint, "-d", device, "-t", "1", "--insecure", *options],
                 stderr=subprocess.DEVNULL):  # fmt: skip
        await_devices(endpoint, 1)
        yield endpoint


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    with bus(request.param, "-m", "128", "--keep", "60") as endpoint:
        c = connect(endpoint)
        yield c
        c.close()


on_each = pytest.mark.parametrize("client", ["CPU", "reference"], indirect=True)


def decode(model: Model, first: int = 3) -> tuple[list[int], list[float]]:
    """Tokens of a model, one after the other, and how long each took, in seconds."""
    tokens, took = [first], []
    for i in range(N_TOKENS):
        start = time.perf_counter()
        tokens.append(model.greedy(tokens[-1:], i))
        took.append(time.perf_counter() - start)
    return tokens, took


def told(name: str, took: list[float]) -> float:
    """Print the latencies of a run's tokens. Returns: their 99th percentile, in seconds."""
    p99 = statistics.quantiles(took, n=100)[98]
    print(f"{name}: p50 {1e3 * statistics.median(took):.2f} ms, p99 {1e3 * p99:.2f} ms a token")
    return p99


def test_a_flood_changes_no_token_of_another_client(tmp_path: Path) -> None:
    """1024 requests in flight, graphs, all memory, handles of others: whatever one may ask for."""
    file = GGUF(tiny_model(tmp_path / "m.gguf", "llama", n_ff=8192))
    with bus("CPU", "-m", "512") as endpoint:
        client = connect(endpoint)
        model = place_model(ModelConfig(file.path, N_TOKENS + 8), open_arch(file), client)
        model.load()
        decode(model)
        expected, quiet = decode(model)
        with started([sys.executable, "-m", "tests.support.flooding", endpoint], stdout=subprocess.PIPE) as p:
            assert p.stdout is not None and p.stdout.readline() == b"ready\n"
            got, flooded = decode(model)
            assert p.poll() is None, "it was given something"
        assert got == expected
        before, under = told("alone", quiet), told("beside a flood", flooded)
        assert under < 20 * before + 0.5, "some turns are not given"
        assert decode(model)[0] == expected
        client.close()


def test_who_waits_for_no_answer_is_cut_off_and_others_go_on(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as said, bus("CPU", "-m", "128", said=said) as endpoint:
        client = connect(endpoint)
        client.request(m.AllocBuffer(client.session, 1, 1 << 18))
        frame = encode_graph(products(1, 1, 1))
        client.request(m.GraphPut(client.session, graph_digest(frame)), [frame])
        compute = m.GraphCompute(client.session, graph_digest(frame), 0)
        expected = bytes(client.request(compute).payload[0])
        with started([sys.executable, "-m", "tests.support.flooding", endpoint, RUDE], stdout=subprocess.PIPE) as p:
            assert p.stdout is not None and p.stdout.readline() == b"ready\n"
            cut_off = "a client was cut off: 1024 requests of this client wait"
            until(lambda: client.request(compute).payload[0] == expected and cut_off in (tmp_path / "said").read_text())
            for _ in range(1000):
                assert client.request(compute).payload[0] == expected
        for _ in range(2):  # who only asks for all that he may is none of those
            asked = [client.submit(m.Ping(i)) for i in range(limits.MAX_INFLIGHT_PER_CLIENT - 8)]
            for seq in asked:
                client.wait(seq)
        client.close()


def test_who_asks_and_does_not_say_hello_is_cut_off() -> None:
    with bus("reference") as endpoint, zmq.Context() as context, context.socket(zmq.DEALER) as s:
        s.linger, s.reconnect_ivl, s.rcvtimeo = 0, -1, 20_000
        with monitor_of(s) as monitor:
            s.connect(endpoint)
            for seq in range(1, 100):
                s.send_multipart(encode(Message(m.Command.PING, m.Ping(seq), seq=seq)))
                if seq == 1:
                    answer = frames.decode(s.recv_multipart()).header
                    assert isinstance(answer, m.Error) and "expected HELLO first" in answer.message
            monitor.rcvtimeo = 20_000
            while happening(monitor.recv_multipart()) is not Happening.LOST:
                pass
            s.disable_monitor()


@on_each
def test_who_takes_too_much_is_told_and_others_keep_what_they_have(client: Client) -> None:
    other = client.another()
    mine = bytes(range(256)) * 4096
    client.request(m.AllocBuffer(client.session, 1, len(mine)))
    client.request(m.SetTensor(client.session, 1, 0, len(mine)), [mine])
    free = client.stats(0).free_bytes
    with pytest.raises(OutOfMemory, match=rf"a buffer needs {free} bytes, \d+ are free"):
        other.request(m.AllocBuffer(other.session, 1, free))
    n = 0
    for size in (16 * MIB, MIB):  # first come, first served, down to what the graphs of others need
        while True:
            try:
                other.request(m.AllocBuffer(other.session, 10 + n, size))
                n += 1
            except OutOfMemory:
                break
    assert 64 * MIB < other.stats(0).buffer_bytes < 128 * MIB
    assert bytes(client.request(m.GetTensor(client.session, 1, 0, len(mine))).payload[0]) == mine
    ne = (len(mine) // 4, 1, 1, 1)
    squares = [leaf(0, ne, 1)]
    for i in range(4):
        squares.append(replace(leaf(0, ne), op="SQR", src=(i,)))
    frame = encode_graph(Graph(tuple(squares), (), (4,)))
    client.request(m.GraphPut(client.session, graph_digest(frame)), [frame])
    client.request(m.GraphCompute(client.session, graph_digest(frame), 0))
    other.drain()
    assert client.stats(0).buffer_bytes == len(mine)
    other.close()


@on_each
def test_handles_and_graphs_are_of_one_session(client: Client) -> None:
    """The same numbers and the same digest: each has his own."""
    other = client.another()
    square = replace(leaf(0, (64, 1, 1, 1)), op="SQR", src=(0,))
    frame = encode_graph(Graph((leaf(0, (64, 1, 1, 1), 1), square), (), (1,)))
    compute = {c.session: m.GraphCompute(c.session, graph_digest(frame), 0) for c in (client, other)}
    for i, c in enumerate((client, other)):
        c.request(m.AllocBuffer(c.session, 1, 256))
        c.request(m.SetTensor(c.session, 1, 0, 256), [np.full(64, i + 2, np.float32).tobytes()])
    client.request(m.GraphPut(client.session, graph_digest(frame)), [frame])
    with pytest.raises(HandleError):
        other.request(compute[other.session])
    other.request(m.GraphPut(other.session, graph_digest(frame)), [frame])

    def result(c: Client) -> float:
        return float(np.frombuffer(c.request(compute[c.session]).payload[0], np.float32)[5])

    assert (result(client), result(other), result(client)) == (4.0, 9.0, 4.0)
    for header in (m.GetTensor(client.session, 1, 0, 4), m.FreeBuffer(client.session, 1), m.Drain(client.session),
                   m.SetTensorHash(client.session, 1, 0, 256, bytes(32), 0, (64, 1, 1, 1)), compute[client.session],
                   m.CopyTensor(client.session, 1, 0, 1, 0, 4, 4)):  # fmt: skip
        with pytest.raises(HandleError):
            other.request(header)
    other.request(m.FreeBuffer(other.session, 1))
    with pytest.raises(HandleError):
        other.request(compute[other.session])
    assert result(client) == 4.0
    other.drain()
    assert result(client) == 4.0
    other.close()


def products(n: int, rows: int, buffer: int = 0) -> Graph:
    """Powers of what is in a buffer, or comes as an input, and of each row the sum. Shapes: [rows, 65536]."""
    ne = (1 << 16, rows, 1, 1)
    nodes = [leaf(0, ne, buffer), *(replace(leaf(0, ne), op="MUL", src=(i, 0)) for i in range(n))]
    nodes.append(replace(leaf(0, (1, rows, 1, 1)), op="SUM_ROWS", src=(n,)))
    return Graph(tuple(nodes), () if buffer else (0,), (n + 1,))


@pytest.mark.parametrize("name", ["CPU", "reference"])
def test_a_plan_between_whose_parts_others_run_computes_what_it_does_alone(name: str) -> None:
    device = open_device(name, 2, 256 * MIB)
    long, short = device.compile(products(9, 40), {}), device.compile(products(3, 2), {})
    rng = np.random.default_rng(1)
    x, y = (rng.uniform(0.9, 1.1, (rows, 1 << 16)).astype(np.float32).tobytes() for rows in (40, 2))
    alone = [bytes(plan.run([data], nothing)[0]) for plan, data in ((long, x), (short, y))]
    between: list[bytes] = []

    def run_short() -> None:
        device.share(None)
        with device.aside(short):
            between.append(bytes(short.run([y], nothing)[0]))
        device.share(run_short, short=True)

    device.share(run_short, short=True)
    assert bytes(long.run([x], nothing)[0]) == alone[0]
    assert len(between) > 5 and set(between) == {alone[1]}


def test_little_is_not_held_up_by_much_and_much_can_be_cancelled_meanwhile() -> None:
    with bus("CPU", "-m", "256") as endpoint:
        client = connect(endpoint)
        other = client.another()
        computes = []
        for c, graph in ((client, products(2000, 64, 1)), (other, products(3, 1, 1))):
            c.request(m.AllocBuffer(c.session, 1, 16 * MIB))
            frame = encode_graph(graph)
            c.request(m.GraphPut(c.session, graph_digest(frame)), [frame])
            computes.append(m.GraphCompute(c.session, graph_digest(frame), 0))
        much, little = computes
        other.request(little)  # the first time it is not known to be little
        seq = client.submit(much)
        for _ in range(20):
            other.request(little)
        client.look()
        assert not client.answered(seq), "it takes a hundred times as long"
        client.request(m.Cancel(client.session, seq))
        with pytest.raises(Cancelled):
            client.wait(seq)
        other.request(little)
        other.close()
        client.close()


@on_each
def test_memory_that_was_anothers_reads_as_zeros(client: Client) -> None:
    n = 8 * MIB

    def zeros(c: Client) -> bool:
        c.request(m.AllocBuffer(c.session, 1, n))
        return bytes(c.request(m.GetTensor(c.session, 1, 0, n)).payload[0]) == bytes(n)

    def fill(c: Client, content: bytes = b"") -> None:
        c.request(m.AllocBuffer(c.session, 1, n, content))
        c.request(m.SetTensor(c.session, 1, 0, n), [b"\xa5" * n])

    other = client.another()
    fill(client)
    client.request(m.FreeBuffer(client.session, 1))
    assert zeros(client) and zeros(other), "given back, and asked for again"
    other.drain()
    client.request(m.FreeBuffer(client.session, 1))
    fill(other, bytes(32))
    other.drain()
    assert zeros(client), "a session that ended"
    other.close()
    # scratch memory that the graphs of another have used
    ne = (MIB // 4, 1, 1, 1)
    big = [leaf(0, ne), replace(leaf(0, ne), op="SQR", src=(0,)), replace(leaf(0, ne), op="SQR", src=(1,))]
    frame = encode_graph(Graph(tuple(big), (0,), (2,)))
    other = client.another()
    other.request(m.GraphPut(other.session, graph_digest(frame)), [frame])
    other.request(m.GraphCompute(other.session, graph_digest(frame), 1), [b"\xa5" * MIB])
    client.request(m.AllocBuffer(client.session, 2, n))
    assert bytes(client.request(m.GetTensor(client.session, 2, 0, n)).payload[0]) == bytes(n)
    other.close()


def test_weights_that_were_kept_and_made_room_read_as_zeros() -> None:
    """Whoever needs the memory of a lease gets zeros; who knows its name gets it as it was (test_leases)."""
    with listening_worker("-d", "CPU", "-m", "64", "--keep", "60") as (port, _):
        a = Attacker(port, b"a")
        a.ask(m.AllocBuffer(1, 1, 40 * MIB))
        for at in range(0, 40 * MIB, MIB):
            a.ask(m.SetTensor(1, 1, at, MIB), b"\xa5" * MIB)
        a.ask(m.Drain(1))
        a.ask(m.AllocBuffer(2, 1, 60 * MIB))
        for at in range(0, 60 * MIB, 10 * MIB):
            assert bytes(a.ask(m.GetTensor(2, 1, at, 10 * MIB)).payload[0]) == bytes(10 * MIB)
        a.close()


def put(worker: OneWorker, session: int, n: int) -> bytes:
    square = replace(leaf(0, (n, 1, 1, 1)), op="SQR", src=(0,))
    frame = encode_graph(Graph((leaf(0, (n, 1, 1, 1)), square), (0,), (1,)))
    worker.ask(m.GraphPut(session, graph_digest(frame)), frame)
    return graph_digest(frame)


def test_plans_of_one_who_has_few_stay_when_another_has_many() -> None:
    worker = OneWorker()
    few = [put(worker, 1, n) for n in range(1, 4)]
    many = [put(worker, 2, n) for n in range(1, 2 * MAX_PLANS)]
    plans = worker.executor.plans
    assert len(plans) == MAX_PLANS and all(((b"broker", 1), d) in plans for d in few)
    assert ((b"broker", 2), many[-1]) in plans and ((b"broker", 2), many[0]) not in plans
    worker.ask(m.StageCompute(2, many[0], 1), bytes(4))
    assert len(plans) == MAX_PLANS and all(((b"broker", 1), d) in plans for d in few)


def test_what_graphs_of_others_need_is_left_and_one_who_is_alone_has_all() -> None:
    worker = OneWorker(memory_bytes=64 * MIB)
    worker.ask(m.AllocBuffer(1, 1, 64 * MIB))
    worker.ask(m.FreeBuffer(1, 1))
    worker.ask(m.AllocBuffer(1, 1, MIB))
    with pytest.raises(OutOfMemory, match=f"{8 * MIB} more are for graphs of others"):
        worker.ask(m.AllocBuffer(2, 1, 56 * MIB))
    worker.ask(m.AllocBuffer(2, 1, 40 * MIB))
    put(worker, 1, MIB)
    device = worker.executor.device
    assert isinstance(device, HostDevice)
    device.arena.used_bytes = 6 * MIB  # as a plan leaves it behind
    with pytest.raises(OutOfMemory, match=f"{15 * MIB} are free; {2 * MIB} more"):
        worker.ask(m.AllocBuffer(2, 2, 16 * MIB))
    worker.ask(m.AllocBuffer(2, 2, 15 * MIB))
