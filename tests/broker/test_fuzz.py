"""A real broker under noise: it lives, it serves the others, and it answers good requests as before."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from broker.loop import BrokerLoop
from ggmq.cluster import Client
from protocol import PROTOCOL_VERSION
from protocol import messages as m
from protocol.frames import Message, encode
from protocol.messages import REQUEST, Command


@pytest.fixture
def broker() -> Iterator[tuple[BrokerLoop, str, Any]]:
    context: zmq.Context[Any] = zmq.Context()
    loop = BrokerLoop("t", context)
    endpoint = loop.listen("tcp://127.0.0.1:*")
    loop.serve_in_thread()
    try:
        yield loop, endpoint, context
    finally:
        loop.stop()
        context.destroy(linger=0)


def test_noise_and_mutations_change_nothing(broker: tuple[BrokerLoop, str, Any]) -> None:
    loop, endpoint, context = broker
    rng = random.Random(5)
    client = Client(context, endpoint)
    noise = context.socket(zmq.DEALER)
    noise.linger = 0
    noise.connect(endpoint)
    seeds = [[bytes(f) for f in encode(Message(Command.HELLO, m.Hello(PROTOCOL_VERSION, role, b"t" * 16)))]
             for role in ("client", "worker", "worker-bulk", "broker")]  # fmt: skip
    seeds += [[bytes(f) for f in encode(Message(c, kind(1), ()))] for c, kind in REQUEST.items()
              if kind in (m.Drain, m.Ping)]  # fmt: skip
    try:
        for i in range(3000):
            frames = list(rng.choice(seeds))
            at = rng.randrange(len(frames))
            if rng.random() < 0.5 and frames[at]:
                changed = bytearray(frames[at])
                changed[rng.randrange(len(changed))] = rng.randrange(256)
                frames[at] = bytes(changed)
            else:
                frames[at] = rng.randbytes(rng.randrange(100))
            noise.send_multipart(frames)
            if i % 100 == 0:
                while noise.poll(0):
                    noise.recv_multipart()
                assert client.request(m.Ping(i)).header == m.Ping(i)
        due = time.monotonic() + 20
        while loop.state.traffic.n_refused < 300:  # what is still in the socket's queue is being read
            assert time.monotonic() < due, loop.state.traffic.n_refused
            client.request(m.Ping(0))
        assert all(d.total_bytes == 0 for d in client.devices())
    finally:
        noise.close()
        client.close()


def test_a_client_that_reads_nothing_does_not_hold_up_the_others(broker: tuple[BrokerLoop, str, Any]) -> None:
    _, endpoint, context = broker
    deaf = context.socket(zmq.DEALER)
    deaf.linger, deaf.rcvhwm = 0, 10
    deaf.connect(endpoint)
    deaf.send_multipart(encode(Message(Command.HELLO, m.Hello(PROTOCOL_VERSION, "client"))))
    for i in range(20_000):
        try:
            deaf.send_multipart(encode(Message(Command.DEVICE_INFO, m.DeviceQuery(), seq=i)), zmq.DONTWAIT)
        except zmq.Again:
            break
    client = Client(context, endpoint)
    try:
        for i in range(20):
            assert client.request(m.Ping(i), timeout_s=5).header == m.Ping(i)
    finally:
        client.close()
        deaf.close()
