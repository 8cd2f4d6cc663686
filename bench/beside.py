"""What a client's tokens wait for while another client's long prompt is read by the same worker; JSON on the last line.

Two clients of one broker, each in a thread of its own, have the model loaded on one CPU worker. The first generates, at
first alone, then from the moment on at which the second sends its prompt until that is read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path

from ggmq.archs import open_arch
from ggmq.cluster import Client, LocalBus
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.model import Model, ModelConfig, place_model
from ggmq.sampling import SamplingParams

N_PAST = 16
"""Tokens of the one who generates."""
N_ALONE = 64


def loaded(client: Client, gguf: GGUF, n_ctx: int) -> Model:
    model = place_model(ModelConfig(gguf.path, n_ctx), open_arch(gguf), client)
    model.load()
    return model


def gaps_s(model: Model, n_past: int, go_on: threading.Event, least: int) -> list[float]:
    """Seconds that each token took, at least so many tokens and as long as the event is not set."""
    out: list[float] = []
    while len(out) < least or not go_on.is_set():
        start = time.perf_counter()
        model.greedy([1], n_past + len(out))
        out.append(time.perf_counter() - start)
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", type=Path)
    p.add_argument("threads", type=int)
    p.add_argument("--prompt", type=int, default=2048)
    args = p.parse_args()
    gguf = GGUF(args.model)
    bus = LocalBus()
    try:
        bus.spawn("CPU", args.threads)
        first = bus.start()
        second = Client(bus.context, "inproc://broker")
        decode, prompt = (loaded(client, gguf, 4096) for client in (first, second))
        for model in (decode, prompt):
            model.greedy([1] * N_PAST, 0)
        engine = Engine(prompt)
        over = threading.Event()
        over.set()
        alone = gaps_s(decode, N_PAST, over, N_ALONE)
        over.clear()
        took: list[float] = []

        def read() -> None:
            start = time.perf_counter()
            engine.add([1] * args.prompt, SamplingParams(temperature=0), 1)
            while engine.busy:
                engine.step()
            took.append(time.perf_counter() - start)
            over.set()

        thread = threading.Thread(target=read)
        thread.start()
        beside = gaps_s(decode, N_PAST + N_ALONE, over, 1)
        thread.join()
        second.close()
    finally:
        bus.close()
    print(json.dumps({
        "alone_tok_s": 1 / statistics.median(alone), "beside_tok_s": len(beside) / sum(beside),
        "worst_gap_s": max(beside), "prompt_tok_s": args.prompt / took[0],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
