"""`python -m bench serve`: ggmq serve and llama-server, the same model and threads, clients over HTTP, in turn."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.clients import FIRST_ID, Found, Load
from bench.models import LARGE, write_model

N_CTX = 512
START_S = 120.0
GOALS = {"rpc": 3.0, "here": 1.5}
"""What is aimed at for 8 streams: ours by theirs, over two workers of one thread, and on two threads of one."""
WHERE = {"rpc": "2 workers x 1 thread", "here": "1 x 2 threads"}
STORIES = ("Once upon a time", "Tom and Lily", "One day a dog", "The sun was", "There was a girl", "A cat saw", "Mom said",
           "In the park")  # fmt: skip


@dataclass
class Side:
    """A server: how it is started, and what came of each number of streams, a round each."""

    name: str
    where: str
    found: dict[int, list[Found]] = field(default_factory=dict)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block; its output goes with it."""
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                         env={**os.environ, **(env or {})})  # fmt: skip
    try:
        yield p
    finally:
        p.send_signal(signal.SIGINT)
        try:
            p.wait(20)
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()


@contextlib.contextmanager
def ours(model: Path | None, where: str, n_slots: int, n_ctx: int = N_CTX, more: Sequence[str] = ()) -> Iterator[int]:
    """`ggmq serve` with two workers of a thread each, or one of two. Yields: its port."""
    bus = ["--workers", "2" if where == "rpc" else "1", "-t", "2"]
    files = ["-m", str(model)] if model is not None else []
    command = [sys.executable, "-m", "ggmq", "serve", *files, "--port", "0", "-np", str(n_slots), "-c", str(n_ctx),
               "--log-level", "off", "--insecure", *bus, *more]  # fmt: skip
    with running(command) as p:
        assert p.stdout is not None
        line = p.stdout.readline()
        if " at http://" not in line:
            raise SystemExit(f"ggmq serve said {line!r}, and no address")
        yield int(line.rsplit(":", 1)[1].strip().rstrip("/"))


@contextlib.contextmanager
def theirs(binaries: Path, model: Path, where: str, n_slots: int) -> Iterator[int]:
    """`llama-server` on two RPC servers of a thread each, or with two threads. Yields: its port."""
    port, rpc = free_port(), [free_port(), free_port()]
    env = {"LD_LIBRARY_PATH": str(binaries)}
    more = ["--rpc", ",".join(f"127.0.0.1:{r}" for r in rpc), "-ngl", "99", "-fit", "off"] if where == "rpc" else []
    command = [str(binaries / "llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", "2",
               "-np", str(n_slots), "-c", str(N_CTX * n_slots), "-cram", "0", *more]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for r in rpc if where == "rpc" else ():
            stack.enter_context(running([str(binaries / "ggml-rpc-server"), "-t", "1", "-p", str(r)], env))
            _until_open(r)
        p = stack.enter_context(running([*command, "--log-disable"], env))
        _until_healthy(p, port)
        yield port


def _until_open(port: int) -> None:
    due = time.monotonic() + START_S
    while time.monotonic() < due:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port} after {START_S:.0f} s")


def _until_healthy(p: subprocess.Popen[str], port: int) -> None:
    due = time.monotonic() + START_S
    while time.monotonic() < due and p.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as r:
            if r.status == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"llama-server does not answer on port {port}")


def clients(load: Load) -> Found:
    """What clients in a process of their own see."""
    command = [sys.executable, "-m", "bench.clients"]
    done = subprocess.run(command, input=json.dumps(asdict(load)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"clients failed: {done.stderr[-1000:]}")
    return Found(**json.loads(done.stdout))


def percentile(values: Sequence[float], p: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[p - 1] if len(values) > 1 else (values or [0.0])[0]


def row(side: Side, n: int) -> str:
    """Medians over the rounds of what is summed up in each."""
    found = side.found[n]
    rate = statistics.median(f.tokens_per_s for f in found)
    figures = [f"{1e3 * statistics.median(percentile(v, p) for v in values):.1f}"
               for values in ([f.first_s for f in found], [f.gaps_s for f in found]) for p in (50, 99)]  # fmt: skip
    return f"| {n} | {WHERE[side.where]} | {side.name} | {rate:.1f} | {' | '.join(figures)} |"


def binaries_of(folder: Path | None) -> tuple[Path | None, str]:
    """Where the peer's programs are. Returns: also why nothing is measured against it."""
    found = folder or (Path(p).parent if (p := shutil.which("llama-server")) else None)
    missing = [name for name in ("llama-server", "ggml-rpc-server") if found is None or not (found / name).is_file()]
    return (None, f"{' and '.join(missing)} missing: give their folder with --llama-bin") if missing else (found, "")


def serve(folder: Path, llama_bin: Path | None, rounds: int, seconds: float, streams: Sequence[int] = (1, 8)) -> None:
    model = folder / "llama-0.85b-q4_0.gguf"
    write_model(model)
    binaries, why = binaries_of(llama_bin)
    if binaries is None:
        print(f"llama-server: skipped, {why}")
    places = ("rpc", "here")
    sides = [Side(name, where) for where in places for name in ("ggmq", "llama-server") if name == "ggmq" or binaries]
    for i in range(rounds):
        for side in sides:
            started = ours(model, side.where, max(streams)) if side.name == "ggmq" or binaries is None else theirs(
                binaries, model, side.where, max(streams))  # fmt: skip
            with started as port:
                for n in streams:
                    load = Load(port, n, n_vocab=LARGE.n_vocab, seconds=seconds, seed=i + 1)
                    side.found.setdefault(n, []).append(clients(load))
    print("| streams | | | tokens/s | first token p50, ms | p99 | between tokens p50, ms | p99 |\n" + "|---" * 8 + "|")
    for n in streams:
        for side in sides:
            print(row(side, n), flush=True)
    counts = {f.prompt_tokens for side in sides for found in side.found.values() for f in found}
    print(f"\nprompts of {', '.join(map(str, sorted(counts)))} tokens on all sides, answers of {Load(0, 0).n_made}")
    for where in places if binaries is not None else ():
        a, b = ([statistics.median(f.tokens_per_s for f in s.found[n]) for n in streams] for s in sides if s.where == where)
        for n, mine, peer in zip(streams, a, b, strict=True):
            goal = f", aim {GOALS[where]}, {'reached' if mine >= GOALS[where] * peer else 'not reached'}" if n == 8 else ""
            print(f"{n} streams, {where}: {mine / max(peer, 1e-3):.2f} times llama-server{goal}")
    equal_texts(None, "here", 64)
    equal_texts(model, "rpc", 8, 24)


def equal_texts(model: Path | None, where: str, n: int, n_texts: int = 64) -> None:
    """Many clients at once: each has the text that it has alone. model: None: the bundled one."""
    rng = random.Random(7)
    texts = [f"{rng.choice(STORIES)} {rng.choice(STORIES).lower()}"[: rng.randrange(6, 40)] for _ in range(n_texts)]
    with ours(model, where, n) as port:
        alone = clients(Load(port, 1, n_made=48, texts=texts))
        start = time.perf_counter()
        together = clients(Load(port, n, n_made=48, texts=texts))
        took = time.perf_counter() - start
    same = sum(a == b for a, b in zip(alone.texts, together.texts, strict=True))
    name = model.name if model is not None else "the bundled model"
    print(f"{n} clients at once on {name}, {WHERE[where]}: {same} of {n_texts} texts are those that they have alone "
          f"({took:.1f} s)")  # fmt: skip


def beginnings(folder: Path, rounds: int, n_common: int = 500, n_own: int = 10) -> None:
    """How much sooner a first token comes when the beginning of a prompt was read before: in memory, and after a restart."""
    model, kept = folder / "llama-0.85b-q4_0.gguf", folder / "prompts"
    write_model(model)
    rng = random.Random(3)
    times: dict[str, list[float]] = {"anew": [], "in memory": [], "after a restart": []}
    for _ in range(rounds):
        shutil.rmtree(kept, ignore_errors=True)

        def prompt(begin: Sequence[int] = ()) -> list[int]:
            n = n_common + n_own - len(begin)
            return [*begin, *(rng.randrange(FIRST_ID, LARGE.n_vocab) for _ in range(n))]

        common = prompt()[:n_common]
        for names in (("anew", "in memory"), ("after a restart",)):
            with ours(model, "here", 1, 1024, ["--prompt-cache", str(kept)]) as port:
                first_token_s(port, prompt())  # graphs are made once
                for name in names:
                    times[name].append(first_token_s(port, prompt(common)))
    print(f"first token of a prompt of {n_common + n_own} tokens, the first {n_common} of which were read before, median of "
          f"{rounds}")  # fmt: skip
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, median in medians.items():
        goal = f", {medians['anew'] / median:.1f} times sooner, aim 5" if name != "anew" else ""
        print(f"{name}: {1e3 * median:.0f} ms{goal}", flush=True)


def first_token_s(port: int, prompt: Sequence[int]) -> float:
    body = {"prompt": list(prompt), "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})  # fmt: skip
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=START_S) as answer:
        next(line for line in answer if line.startswith(b"data: {"))
        took = time.perf_counter() - start
        answer.read()
    return took
