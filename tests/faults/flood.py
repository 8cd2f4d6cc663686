"""Crowds without a key: who has it is served as before, and everything is as before when they have gone."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

from config.auth import new_keys
from config.keys import write_keys
from ggmq.cluster import Client, local_bus
from tests.faults.crowd import KINDS
from tests.faults.ground import READY_S, WORKER, Ground
from tests.faults.report import Run, percentile
from tests.faults.streams import Talker
from tests.support.fixtures import ROOT, free_port
from tests.support.processes import n_descriptors, rss_bytes
from tests.support.supervised import until

N_ASKED = 1500
MAX_GROWTH_BYTES = 10 << 20
NORMAL_S = 1.0
SLOWER = 2.0
N_LOOKS = 2
LEAST_S = 0.003
"""Latencies below are noise of the machine."""
MIB = 1 << 20


def _p99(client: Client, n: int) -> float:
    """Of a round trip to the worker and back, in seconds."""
    times = []
    for _ in range(n):
        start = time.monotonic()
        client.stats(0)
        times.append(time.monotonic() - start)
        time.sleep(0.0005)
    return percentile(times, 99)


@contextlib.contextmanager
def _crowd(port: int, kind: str) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.faults.crowd", str(port), kind]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as p:
        assert p.stdin is not None and p.stdout is not None  # pipes were asked for
        p.stdout.readline()
        yield


def strangers(ground: Ground, run: Run) -> None:
    """300 silent peers; 300 that announce 8 GiB; more than there are descriptors."""
    kind = run.rng.choice(sorted(KINDS))
    run.did(kind)
    folder = ground.run_folder()
    keys = new_keys()
    write_keys(folder / "keys", keys)
    port = free_port()
    worker = Talker([*WORKER, "-p", str(port), "-d", "CPU", "-t", "1", "--keys", str(folder / "keys")], ground.env(folder))
    try:
        until(lambda: "free)" in worker.stream.text or worker.stream.ended.is_set(), READY_S, 0.02)
        with local_bus(keys) as bus:
            bus.add_remote(f"127.0.0.1:{port}")
            client = bus.start()
            _p99(client, N_ASKED)
            before, rss, n_fds = _p99(client, N_ASKED), rss_bytes(worker.pid), n_descriptors(worker.pid)
            if kind == "descriptors":
                resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (256, 256))
            with _crowd(port, kind):
                time.sleep(0.5)
                during = _p99(client, N_ASKED)
                grown = rss_bytes(worker.pid) - rss
            gone_s = time.monotonic()
            normal = until(lambda: n_descriptors(worker.pid) <= n_fds + 8, 10, 0.02)
            run.figures["normal after, s"] = time.monotonic() - gone_s
            after = min(_p99(client, N_ASKED) for _ in range(N_LOOKS))
            run.figures |= {"p99 before, ms": 1e3 * before, "p99 during, ms": 1e3 * during, "p99 after, ms": 1e3 * after,
                            "MiB more": grown / MIB}  # fmt: skip
            calm_s = max(before, after, LEAST_S)
            if during > SLOWER * calm_s:
                run.fail(f"p99 during: {1e3 * during:.1f} ms, otherwise {1e3 * calm_s:.1f} ms")
            if after > SLOWER * max(before, LEAST_S):
                run.fail(f"p99 after: {1e3 * after:.1f} ms, before {1e3 * before:.1f} ms")
            if grown > MAX_GROWTH_BYTES:
                run.fail(f"the worker has grown by {grown / MIB:.1f} MiB")
            if not normal or run.figures["normal after, s"] > NORMAL_S:
                run.fail(f"descriptors are given back after {run.figures['normal after, s']:.1f} s")
    finally:
        worker.end()
