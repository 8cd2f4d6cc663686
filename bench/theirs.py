"""One measurement of llama.cpp through xllamacpp, as JSON: `python -m bench.theirs MODEL THREADS N_PREFILL N_DECODE`."""

from __future__ import annotations

import json
import os
import sys
import time

import xllamacpp


def measure(model: str, threads: int, n_prefill: int, n_decode: int) -> dict[str, float]:
    """Units: tokens a second, seconds."""
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup = model, n_prefill + n_decode + 64, 1, False
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    start = time.perf_counter()
    server = xllamacpp.Server(p)
    load_s = time.perf_counter() - start
    timings = {}
    for shift in (0, 1):  # the first request warms up
        prompt = list(range(100 + shift, 100 + shift + n_prefill))
        r = server.handle_completions({"prompt": prompt, "n_predict": n_decode, "temperature": 0, "ignore_eos": True,
                                       "cache_prompt": False})  # fmt: skip
        timings = r["timings"]
    return {"decode_tok_s": timings["predicted_per_second"], "prefill_tok_s": timings["prompt_per_second"],
            "load_s": load_s}  # fmt: skip


if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(2, 1)  # the library writes its log where the result should go
    result = json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:5])))
    os.write(out, result.encode() + b"\n")
    os._exit(0)
