"""`python -m bench`: ggmq and llama.cpp in turn on random-weight models; medians and ratios with the machine's facts.

The peer is llama.cpp's native build (CMAKE_ARGS="-DGGML_RPC=on" pip install llama-cpp-python), in this environment or in
the one whose Python `--peer-python` names; without it xllamacpp's wheel stands in, and its rates count 1.15 times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench import serve, speculation
from bench.models import EXPERTS, LARGE, Q4_K_M, Shape, write_model

MIB = 1 << 20
WHEEL_FACTOR = 1.15


@dataclass(frozen=True)
class Scenario:
    """Both sides' settings, and what is compared.

    Attributes:
        compare: keys of the results; times are compared the other way round.
        rpc: workers of one thread against as many RPC servers of one thread; 0: one worker against llama.cpp here.
        goals: the ratios that are aimed at, by key.
    """

    name: str
    compare: tuple[str, ...]
    type: str = "Q4_0"
    prompt: int = 128
    gen: int = 64
    depth: int = 0
    streams: int = 1
    rpc: int = 0
    cached: bool = False
    experts: bool = False
    goals: dict[str, float] = field(default_factory=dict)


RATES = ("decode_tok_s", "prefill_tok_s")
SCENARIOS = [
    Scenario("local", RATES, goals={"decode_tok_s": 1.4, "prefill_tok_s": 1.8}),
    Scenario("local-512", ("prefill_tok_s",), prompt=512, gen=16, goals={"prefill_tok_s": 1.8}),
    Scenario("local-q8_0", RATES, "Q8_0", goals={"decode_tok_s": 1.2, "prefill_tok_s": 1.5}),
    Scenario("local-q4_k_m", RATES, Q4_K_M, goals={"decode_tok_s": 1.2, "prefill_tok_s": 1.9}),
    Scenario("context-4096", ("decode_tok_s",), prompt=512, gen=32, depth=4060, goals={"decode_tok_s": 1.2}),
    Scenario("experts", RATES, experts=True, goals={"decode_tok_s": 1.2, "prefill_tok_s": 1.5}),
    Scenario("rpc", RATES, prompt=512, rpc=2, goals={"decode_tok_s": 2.2, "prefill_tok_s": 4.0}),
    Scenario("rpc-8-streams", ("decode_tok_s",), prompt=64, gen=32, streams=8, rpc=2, goals={"decode_tok_s": 3.0}),
    Scenario("load-cold", ("load_and_token_s",), "Q8_0", prompt=16, gen=2, rpc=2, goals={"load_and_token_s": 0.5}),
    Scenario("load-cached", ("load_and_token_s",), "Q8_0", prompt=16, gen=2, rpc=2, cached=True,
             goals={"load_and_token_s": 0.35}),
]  # fmt: skip


def run(command: list[str], env: dict[str, str] | None = None) -> dict[str, float]:
    """One measurement in processes of its own."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def ours(s: Scenario, model: Path, threads: int, cache: Path) -> dict[str, float]:
    """ggmq's side. A load is counted as the peer's is: workers run already, so what starts them is left out.

    Cold: the file's hashes are not known yet. Cached: they are; workers of this host read the file itself either way.
    """
    each = ["--workers", str(s.rpc), "-t", str(s.rpc)] if s.rpc else ["--workers", "1", "-t", str(threads)]
    command = [sys.executable, "-m", "ggmq", "bench", "-m", str(model), "-p", str(s.prompt), "-n", str(s.gen), "-d",
               str(s.depth), "--streams", str(s.streams), "-r", "1", "-o", "json", *each]  # fmt: skip
    return run(command, {"LLAMA_CACHE": str(cache), "XDG_CACHE_HOME": str(cache)} if s.name.startswith("load") else None)


def theirs(s: Scenario, model: Path, threads: int, cache: Path, python: str) -> dict[str, float]:
    command = [python, "-m", "bench.theirs", str(model), str(1 if s.rpc else threads), str(s.prompt), str(s.gen),
               "--context", str(s.depth), "--streams", str(s.streams), "--rpc", str(s.rpc)]  # fmt: skip
    if s.name.startswith("load"):
        command += ["--cache", str(cache)]
    return run(command)


TOUCH = """
import mmap
m = mmap.mmap(-1, 3 << 30)
m.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, len(m), 4096): m[at] = 1
"""


def touch_memory() -> None:
    """Use some memory and give it back. A virtual machine may return what is free to its host after a second or two, and
    whoever takes it next waits for the host: before a load both sides find memory that is there."""
    subprocess.run([sys.executable, "-c", TOUCH], check=False)


def measure(s: Scenario, args: argparse.Namespace) -> list[Row]:
    """Both sides in turn; a table's rows."""
    model = args.folder / f"llama-{'moe-0.55b' if s.experts else '0.85b'}-{s.type.lower()}.gguf"
    write_model(model, s.type, EXPERTS if s.experts else LARGE)
    results: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for i in range(args.rounds + s.cached):
            mine, peer = (Path(folder) / f"{side}{0 if s.cached else i}" for side in ("ours", "theirs"))
            for p in (mine, peer):
                p.mkdir(exist_ok=True)
            kernels = Path.home() / ".cache" / "ggmq-kernels"
            if s.name.startswith("load") and kernels.exists() and not (mine / "ggmq-kernels").exists():
                (mine / "ggmq-kernels").symlink_to(kernels)  # kernels of this CPU are no part of a load
            sides = (partial(ours, s, model, args.threads, mine),
                     partial(theirs, s, model, args.threads, peer, args.peer_python))  # fmt: skip
            pair = []
            for side in sides:
                if s.name.startswith("load"):
                    touch_memory()
                pair.append(side())
            if i or not s.cached:
                for found, r in zip(results, pair, strict=True):
                    found.append(r)
    factor = WHEEL_FACTOR if results[1][0].get("wheel") else 1.0
    rows = []
    for key in s.compare:
        a, b = (statistics.median(r[key] for r in side) for side in results)
        b = b if key.endswith("_s") and not key.endswith("tok_s") else b * factor
        rows.append(Row(f"{s.name} {s.type}", key, a, b, s.goals[key], less=key == "load_and_token_s"))
    return rows + _facts(results[0], LARGE if not s.experts else EXPERTS)


def _facts(ours: list[dict[str, float]], shape: Shape) -> list[Row]:
    """What a token cost on the wire, and the workers' memory beyond what they hold; of the last round."""
    last = ours[-1]
    n, payload = last["workers"], 4 * shape.n_embd
    extra = (last["worker_rss_bytes"] - last["weights_and_kv_bytes"]) / n / 1e6
    out = [Row("", "a worker's memory beyond weights and KV, MB", extra, None, 150, less=True),
           Row("", "round trips a token", last["round_trips_per_token"], None, 1, less=True)]  # fmt: skip
    if n > 1:
        activations = last["handed_bytes_per_token"] / payload / (n - 1)
        rest = last["wire_bytes_per_token"] - payload * (n - 1)
        out.append(Row("", "times the activations cross the wire", round(activations, 1), None, 1, less=True))
        out.append(Row("", "other bytes a token on the wire", rest, None, 1024, less=True))
    return out


@dataclass(frozen=True)
class Row:
    """A line of the table: a rate against the peer's, or, without one, a figure by itself.

    Attributes:
        less: the smaller the better.
    """

    name: str
    key: str
    ours: float
    theirs: float | None
    goal: float
    less: bool = False

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs if self.theirs else self.ours

    @property
    def reached(self) -> bool:
        return self.ratio <= self.goal if self.less else self.ratio >= self.goal

    def __str__(self) -> str:
        theirs, ratio = ("", "") if self.theirs is None else (f"{self.theirs:.2f}", f"**{self.ratio:.2f}**")
        return (f"| {self.name} | {self.key} | {self.ours:.2f} | {theirs} | {ratio} | {self.goal} | "
                f"{'yes' if self.reached else 'no'} |")  # fmt: skip


def plot(rows: list[Row], path: Path) -> None:
    """The ratios as bars, each with its aim. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    compared = [r for r in rows if r.theirs is not None]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(compared) + 1.2))
    places = range(len(compared), 0, -1)
    axes.barh(places, [r.ratio for r in compared], color=["#2a7" if r.reached else "#c52" for r in compared])
    axes.scatter([r.goal for r in compared], places, marker="|", s=200, color="black", label="aim")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(places, [f"{r.name}: {r.key.removesuffix('_tok_s').removesuffix('_s').replace('_', ' ')}"
                             for r in compared])  # fmt: skip
    axes.set_xlabel("ours ÷ the peer's: rates, and of loads the time (less is better)")
    axes.legend(loc="best")
    figure.tight_layout()
    figure.savefig(path)


def stages_against_one(args: argparse.Namespace) -> list[Row]:
    """Two workers of one thread against one worker of one thread, both ours."""
    model = args.folder / "llama-0.85b-q4_0.gguf"
    write_model(model)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for n, found in rates.items():
            command = [sys.executable, "-m", "ggmq", "bench", "-m", str(model), "-p", "128", "-n", "64", "-r", "1", "-o",
                       "json", "--workers", str(n), "-t", str(n)]  # fmt: skip
            found.append(run(command)["decode_tok_s"])
    two, one = statistics.median(rates[2]), statistics.median(rates[1])
    return [Row("2 workers x 1 thread ÷ 1 x 1, both ours", "decode_tok_s", two, one, 0.95)]


def beside_a_prompt(args: argparse.Namespace) -> list[Row]:
    """A client's tokens while another's long prompt is read by the same worker, both ours."""
    model = args.folder / "llama-0.85b-q4_0.gguf"
    write_model(model)
    found = [run([sys.executable, "-m", "bench.beside", str(model), str(args.threads)]) for _ in range(args.rounds)]
    beside, alone, gap = (statistics.median(r[key] for r in found) for key in ("beside_tok_s", "alone_tok_s", "worst_gap_s"))
    return [Row("decode beside a prompt of 2048 ÷ alone, both ours", "decode_tok_s", beside, alone, 0.35),
            Row("", "the longest wait for a token beside it, s", gap, None, 0.25, less=True)]  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = ", ".join(s.name for s in SCENARIOS)
    p.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {names}, stages, beside (default), serve, "
                   "beginnings, speculation")  # fmt: skip
    p.add_argument("-t", "--threads", type=int, default=2)
    p.add_argument("-r", "--rounds", type=int, default=3)
    p.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ggmq-bench", help="where the models lie")
    p.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of the ratios (needs matplotlib)")
    p.add_argument("--llama-bin", type=Path, metavar="DIR", help="where llama-server and ggml-rpc-server are, for serve "
                   "(default: PATH)")  # fmt: skip
    p.add_argument("--seconds", type=float, default=20.0, help="each side is measured so long by serve (default 20)")
    p.add_argument("--peer-python", default=sys.executable, help="a Python that has llama_cpp")
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, Callable[[], list[Row]]] = {s.name: lambda s=s: measure(s, args) for s in SCENARIOS}  # type: ignore[misc]
    known["stages"] = lambda: stages_against_one(args)
    known["beside"] = lambda: beside_a_prompt(args)
    told: dict[str, Callable[[], None]] = {
        "serve": lambda: serve.serve(args.folder, args.llama_bin, args.rounds, args.seconds),
        "beginnings": lambda: serve.beginnings(args.folder, args.rounds),
        "speculation": lambda: speculation.measure(args.folder, args.rounds),
    }
    telling = [name for name in args.scenarios if name in told]
    args.scenarios = [name for name in args.scenarios if name not in told]
    unknown = [name for name in args.scenarios if name not in known]
    if unknown:
        p.error(f"no such scenario: {', '.join(unknown)}")
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    print(f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, median of {args.rounds}\n")
    for name in telling:
        told[name]()
    if telling and not args.scenarios:
        return
    print("| scenario | | ggmq | llama.cpp | ratio | aim | reached |\n|---|---|---|---|---|---|---|")
    rows = []
    for name in args.scenarios or known:
        for row in known[name]():
            print(row, flush=True)
            rows.append(row)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
