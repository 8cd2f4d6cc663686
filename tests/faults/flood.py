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
from tests.faults.crowd import KINDS, MANY
from tests.faults.ground import READY_S, WORKER, Ground
from tests.faults.report import Run, percentile
from tests.faults.streams import Talker
from tests.support.fixtures import ROOT, free_port
from tests.support.processes import n_descriptors, rss_bytes
from tests.support.supervised import until

N_WARM, N_ASKED, N_WINDOWS = 1500, 500, 6
"""Round trips before anything counts, in a window, and windows of each kind: with and without a crowd they alternate, so
that whatever else the machine does hits both."""
MAX_GROWTH_BYTES = 10 << 20
NORMAL_S = 1.0
SLOWER = 2.0
LEAST_S = 0.003
"""Latencies below are noise of the machine."""
MIB = 1 << 20


def _ask(client: Client, n: int) -> list[float]:
    """How long each round trip to the worker and back took, in seconds."""
    times = []
    for _ in range(n):
        start = time.monotonic()
        client.stats(0)
        times.append(time.monotonic() - start)
        time.sleep(0.0005)
    return times


@contextlib.contextmanager
def _crowd(port: int, kind: str) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.faults.crowd", str(port), kind]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as p:
        assert p.stdin is not None and p.stdout is not None  # pipes were asked for
        p.stdout.readline()
        yield


def strangers(ground: Ground, run: Run) -> None:
    """300 silent peers; 300 that announce 8 GiB; more than there are descriptors, silent and not."""
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
            _ask(client, N_WARM)
            rss, n_fds = rss_bytes(worker.pid), n_descriptors(worker.pid)
            if kind in MANY:
                resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (256, 256))
            calm: list[float] = []
            during: list[float] = []
            grown, latest_s = 0, 0.0
            for _ in range(N_WINDOWS):
                calm += _ask(client, N_ASKED)
                with _crowd(port, kind):
                    time.sleep(0.5)
                    during += _ask(client, N_ASKED)
                    grown = max(grown, rss_bytes(worker.pid) - rss)
                gone_s = time.monotonic()
                until(lambda: n_descriptors(worker.pid) <= n_fds + 8, 10, 0.02)
                latest_s = max(latest_s, time.monotonic() - gone_s)
            p50, p99 = percentile(calm, 50), max(percentile(calm, 99), LEAST_S)
            run.figures |= {"p50 without, ms": 1e3 * p50, "p99 without, ms": 1e3 * percentile(calm, 99),
                            "p50, times": percentile(during, 50) / p50, "p99, times": percentile(during, 99) / p99,
                            "normal after, s": latest_s, "MiB more": grown / MIB}  # fmt: skip
            if run.figures["p99, times"] >= SLOWER:
                run.fail(f"p99 during: {1e3 * percentile(during, 99):.1f} ms, without {1e3 * p99:.1f} ms")
            if grown > MAX_GROWTH_BYTES:
                run.fail(f"the worker has grown by {grown / MIB:.1f} MiB")
            if latest_s > NORMAL_S:
                run.fail(f"descriptors are given back after {latest_s:.1f} s")
    finally:
        worker.end()
