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

from bench.clients import Found, Load
from bench.models import LARGE, write_model

N_CTX = 512
START_S = 120.0
GOALS = {"rpc": 3.0, "here": 1.5}
"""What is aimed at for 8 streams: ours by theirs, over two workers of one thread, and on two threads of one."""
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
def ours(model: Path | None, where: str, n_slots: int) -> Iterator[int]:
    """`ggmq serve` with two workers of a thread each, or one of two. Yields: its port."""
    bus = ["--workers", "2" if where == "rpc" else "1", "-t", "2"]
    files = ["-m", str(model)] if model is not None else []
    command = [sys.executable, "-m", "ggmq", "serve", *files, "--port", "0", "-np", str(n_slots), "-c", str(N_CTX),
               "--log-level", "off", "--insecure", *bus]  # fmt: skip
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
    where = {"rpc": "2 workers x 1 thread", "here": "1 x 2 threads"}[side.where]
    return f"| {n} | {where} | {side.name} | {rate:.1f} | {' | '.join(figures)} |"


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
    equal_texts()


def equal_texts(n: int = 64) -> None:
    """Many clients at once on the bundled model: each has the text that it has alone."""
    rng = random.Random(7)
    texts = [f"{rng.choice(STORIES)} {rng.choice(STORIES).lower()}"[: rng.randrange(6, 40)] for _ in range(n)]
    with ours(None, "here", n) as port:
        alone = clients(Load(port, 1, n_made=48, texts=texts))
        start = time.perf_counter()
        together = clients(Load(port, n, n_made=48, texts=texts))
        took = time.perf_counter() - start
    same = sum(a == b for a, b in zip(alone.texts, together.texts, strict=True))
    print(f"{n} clients at once on the bundled model: {same} of {n} texts are those that they have alone ({took:.1f} s)")
