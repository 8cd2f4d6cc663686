"""One measurement of llama.cpp, as JSON: its native build through llama_cpp's C interface, else xllamacpp's wheel.

`python -m bench.theirs MODEL THREADS PREFILL DECODE [--context N] [--streams N] [--rpc N]`; with `--rpc` the model lies
on that many RPC servers of this host, each with THREADS threads, which were started before. The native build:
`CMAKE_ARGS="-DGGML_RPC=on" pip install llama-cpp-python`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

NATIVE = importlib.util.find_spec("llama_cpp") is not None


def _library(name: str) -> ctypes.CDLL:
    """One of ggml's shared libraries as llama_cpp ships them.

    A wheel holds copies where a build has links: only the name with a version is the one that libllama itself loaded.
    """
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None  # NATIVE was seen
    folder = Path(spec.origin).parent / "lib"
    versioned = folder / f"lib{name}.so.0"
    return ctypes.CDLL(str(versioned if versioned.exists() else folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)


def serve(port: int, threads: int, cache: str) -> None:
    """An RPC server with the CPU device. Never returns."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    ggml, rpc = _library("ggml"), _library("ggml-rpc")
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    device = ctypes.c_void_p(ggml.ggml_backend_dev_by_type(0))
    rpc.ggml_backend_rpc_start_server(f"127.0.0.1:{port}".encode(), cache.encode() or None, ctypes.c_size_t(threads),
                                      ctypes.c_size_t(1), ctypes.byref(device))  # fmt: skip


@contextlib.contextmanager
def servers(n: int, threads: int, cache: str) -> Iterator[list[str]]:
    """RPC servers in processes of their own; yields their endpoints."""
    running, ports = [], []
    try:
        for _ in range(n):
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                ports.append(s.getsockname()[1])
            command = [sys.executable, "-m", "bench.theirs", "--serve", str(ports[-1]), str(threads), cache]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for port in ports:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for p in running:
            p.kill()
            p.wait()


class Native:
    """llama_cpp with a context of `n_ctx` cells and `n_seq` sequences. Units: seconds."""

    def __init__(self, model: str, threads: int, n_ctx: int, n_seq: int, endpoints: list[str]) -> None:
        import llama_cpp as c

        self.c = c
        self._quiet = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(self._quiet, ctypes.c_void_p(0))
        c.llama_backend_init()
        start = time.perf_counter()
        params = c.llama_model_default_params()
        if endpoints:
            ggml, rpc = _library("ggml"), _library("ggml-rpc")
            rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
            ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
            for endpoint in endpoints:
                ggml.ggml_backend_register(rpc.ggml_backend_rpc_add_server(endpoint.encode()))
            params.n_gpu_layers = 999
        self.model = c.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp could not load {model}")
        p = c.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = n_ctx, 2048, 512, n_seq
        p.n_threads = p.n_threads_batch = threads
        p.kv_unified = n_seq == 1
        self.context = c.llama_init_from_model(self.model, p)
        self.n_vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.load_s = time.perf_counter() - start

    def decode(self, tokens: list[tuple[int, int, int]]) -> list[int]:
        """One batch of (token, position, sequence); the greedy tokens of the last of each sequence."""
        c, last = self.c, {s: i for i, (_, _, s) in enumerate(tokens)}
        batch = c.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, int(last[sequence] == i)
        if c.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        out = [int(np.ctypeslib.as_array(c.llama_get_logits_ith(self.context, i), (self.n_vocab,)).argmax())
               for i in last.values()]  # fmt: skip
        c.llama_batch_free(batch)
        return out

    def clear(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)


def measure_native(a: argparse.Namespace, endpoints: list[str]) -> dict[str, float]:
    llm = Native(a.model, a.threads, max(a.prefill, a.context) + a.decode + 8 if a.streams == 1 else
                 (a.prefill + a.decode + 8) * a.streams, a.streams, endpoints)  # fmt: skip
    start = time.perf_counter()
    llm.decode([(100, 0, 0)])
    first_s = time.perf_counter() - start
    prefill_s = 0.0
    for _ in range(2):  # the first one warms up
        llm.clear()
        start = time.perf_counter()
        token = llm.decode([(100 + i, i, 0) for i in range(a.prefill)])[0]
        prefill_s = time.perf_counter() - start
    n = a.prefill
    while n < a.context:
        more = min(512, a.context - n)
        token = llm.decode([(100 + i, n + i, 0) for i in range(more)])[0]
        n += more
    tokens = [token]
    for s in range(1, a.streams):
        tokens += llm.decode([(100 + i + s, i, s) for i in range(a.prefill)])
    start = time.perf_counter()
    for i in range(a.decode):
        tokens = llm.decode([(t, n + i, s) for s, t in enumerate(tokens)])
    return {"decode_tok_s": a.decode * a.streams / (time.perf_counter() - start), "prefill_tok_s": a.prefill / prefill_s,
            "load_s": llm.load_s, "load_and_token_s": llm.load_s + first_s}  # fmt: skip


def measure_wheel(a: argparse.Namespace) -> dict[str, float]:
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup = a.model, max(a.prefill, a.context) + a.decode + 64, 1, False
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = a.threads
    start = time.perf_counter()
    server = xllamacpp.Server(p)
    load_s = time.perf_counter() - start
    timings = {}
    for n in (a.prefill, a.prefill, a.context):  # the first request warms up
        prompt = [100 + i for i in range(max(n, a.prefill))]
        r = server.handle_completions({"prompt": prompt, "n_predict": a.decode, "temperature": 0, "ignore_eos": True,
                                       "cache_prompt": False})  # fmt: skip
        timings["prefill"] = timings.get("prefill", 0.0) if n == a.context else r["timings"]["prompt_per_second"]
        timings["decode"] = r["timings"]["predicted_per_second"]
    return {"decode_tok_s": timings["decode"], "prefill_tok_s": timings["prefill"], "load_s": load_s}


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.theirs", description=__doc__)
    p.add_argument("model")
    p.add_argument("threads", type=int)
    p.add_argument("prefill", type=int)
    p.add_argument("decode", type=int)
    p.add_argument("--context", type=int, default=0)
    p.add_argument("--streams", type=int, default=1)
    p.add_argument("--rpc", type=int, default=0)
    p.add_argument("--cache", default="", help="folder of the servers' caches; without it they have none")
    a = p.parse_args()
    out = os.dup(1)
    os.dup2(2, 1)  # the libraries write their logs where the result should go
    if not NATIVE:
        if a.rpc or a.streams > 1:
            raise SystemExit("the wheel has no RPC client: CMAKE_ARGS=-DGGML_RPC=on pip install llama-cpp-python")
        result = measure_wheel(a)
    elif a.rpc:
        with servers(a.rpc, a.threads, a.cache) as endpoints:
            result = measure_native(a, endpoints)
    else:
        result = measure_native(a, [])
    os.write(out, json.dumps(result).encode() + b"\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        main()
