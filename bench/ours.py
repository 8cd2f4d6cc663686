"""One measurement of ggmq, printed as JSON: `python -m bench.ours MODEL THREADS WORKERS N_PREFILL N_DECODE`."""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from ggmq.archs import open_arch
from ggmq.cluster import local_bus
from ggmq.gguf import GGUF
from ggmq.runner import Runner, plan


def measure(model: str, threads: int, workers: int, n_prefill: int, n_decode: int) -> dict[str, float]:
    """Units: tokens a second, seconds, bytes."""
    n_ctx = -(-(n_prefill + n_decode + 1) // 256) * 256
    with local_bus() as bus:
        for _ in range(workers):
            bus.spawn("CPU", threads)
        client = bus.start()
        arch = open_arch(GGUF(model))
        start = time.perf_counter()
        runner = Runner(client, arch, n_ctx, plan(arch, client.devices(), n_ctx))
        runner.load()
        load_s = time.perf_counter() - start
        prompt = np.arange(100, 100 + n_prefill)
        runner.forward(prompt, 0, [n_prefill - 1])  # graphs are compiled here, outside the measurement
        token = int(runner.forward(prompt, 0, [n_prefill - 1], argmax=True)[0])
        token = int(runner.forward([token], n_prefill, [0], argmax=True)[0])
        start = time.perf_counter()
        runner.forward(prompt, 0, [n_prefill - 1], argmax=True)
        prefill_s = time.perf_counter() - start
        sent, trips = client.sent_bytes + client.received_bytes, client.n_round_trips
        start = time.perf_counter()
        for i in range(n_decode):
            token = int(runner.forward([token], n_prefill + i, [0], argmax=True)[0])
        decode_s = time.perf_counter() - start
        weights = sum(s.assignment.weight_bytes + s.assignment.kv_bytes for s in runner.stages)
        return {
            "decode_tok_s": n_decode / decode_s, "prefill_tok_s": n_prefill / prefill_s, "load_s": load_s,
            "worker_rss_bytes": sum(client.stats(i).rss_bytes for i in range(workers)),
            "weights_and_kv_bytes": weights,
            "wire_bytes_per_token": (client.sent_bytes + client.received_bytes - sent) / n_decode,
            "round_trips_per_token": (client.n_round_trips - trips) / n_decode,
        }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:6]))))
