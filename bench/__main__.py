"""`python -m bench`: ggmq and llama.cpp in turn on a random-weight model; medians and ratios with the machine's facts.

Needs the peer: pip install -e '.[peers]'.
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
from pathlib import Path

from bench.models import write_model
from protocol.dtypes import GGMLType

MIB = 1 << 20


def run(*command: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument("--type", default="Q4_0", choices=["Q4_0", "Q8_0", "Q4_K", "F16"])
    p.add_argument("-t", "--threads", type=int, default=2)
    p.add_argument("-p", "--prefill", type=int, default=128)
    p.add_argument("-n", "--decode", type=int, default=64)
    p.add_argument("-r", "--rounds", type=int, default=3)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ggmq-bench")
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model = args.folder / f"llama-0.85b-{args.type.lower()}.gguf"
    write_model(model, GGMLType[args.type])
    ours, theirs = [], []
    for _ in range(args.rounds):
        each = max(1, args.threads // args.workers)
        ours.append(run("bench.ours", str(model), str(each), str(args.workers), str(args.prefill), str(args.decode)))
        theirs.append(run("bench.theirs", str(model), str(args.threads), str(args.prefill), str(args.decode)))
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    print(f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}; {model.name}, {args.threads} threads, "
          f"{args.workers} worker(s), median of {args.rounds}")  # fmt: skip
    print(f"{'':16}{'ggmq':>10}{'llama.cpp':>12}{'ratio':>8}")
    for key in ("decode_tok_s", "prefill_tok_s"):
        a, b = (statistics.median(r[key] for r in rs) for rs in (ours, theirs))
        print(f"{key:16}{a:10.1f}{b:12.1f}{a / b:8.2f}")
    last = ours[-1]
    print(f"load {last['load_s']:.2f} s, worker memory {last['worker_rss_bytes'] / MIB:.0f} MiB for "
          f"{last['weights_and_kv_bytes'] / MIB:.0f} MiB of weights and KV, "
          f"{last['wire_bytes_per_token']:.0f} bytes and {last['round_trips_per_token']:.0f} round trip a token "
          "at the main host")  # fmt: skip


if __name__ == "__main__":
    main()
