"""`python -m tests.faults`: the long form. Exit codes: 0 all held, 1 something did not, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

from tests.faults.ground import Ground, Sizes
from tests.faults.models import random_model
from tests.faults.report import Report
from tests.faults.scenarios import SCENARIOS, run_all

BUNDLED_SIZES = Sizes()
OTHER_SIZES = Sizes(n_tokens=48, n_ctx=2048, n_sentences=6)
"""Models of random weights have a token for each character of a prompt."""


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m tests.faults", description="Do texts go on, the same, whatever fails?",
                                epilog="scenarios: " + ", ".join(SCENARIOS))  # fmt: skip
    p.add_argument("--only", metavar="NAME[,NAME]", help="these scenarios; a name may end in * (default: all)")
    p.add_argument("--runs", type=int, metavar="N", help="runs of each (default: as many as each is worth)")
    p.add_argument("--seed", type=int, help="of the first run, the next has the next; a failure names its own "
                   "(default: a new one)")  # fmt: skip
    p.add_argument("--model", type=Path, metavar="FILE", help="GGUF file (default: the bundled one)")
    p.add_argument("--params", type=float, metavar="G", help="a model of random weights with so many 10^9 parameters")
    p.add_argument("--quant", default="Q4_0", help="type of its weights (default %(default)s)")
    p.add_argument("--tokens", type=int, metavar="N", help="made of each prompt (default: 300, 48 of another model)")
    p.add_argument("--longest-stop", type=float, default=60.0, metavar="S", help="of a process (default %(default)s s)")
    p.add_argument("--stop", type=float, default=0.0, metavar="S", help="every stop takes so long (default: 0.5, 5 or 60 s, "
                   "as it comes)")  # fmt: skip
    p.add_argument("--minutes-limit", type=float, default=240.0, metavar="M", help="begin no run later (%(default)s)")
    p.add_argument("--quick", action="store_true", help="a scenario that counts messages or steps takes few")
    p.add_argument("-o", "--output", choices=["table", "json"], default="table")
    return p


def _terminated(number: int, frame: FrameType | None) -> None:
    """All processes are ended, undisturbed by a second signal: `timeout` sends two."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    args = _parser().parse_args()
    signal.signal(signal.SIGTERM, _terminated)
    seed = secrets.randbits(31) if args.seed is None else args.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    other = args.model is not None or args.params is not None
    sizes = OTHER_SIZES if other else BUNDLED_SIZES
    sizes = replace(sizes, n_tokens=args.tokens or sizes.n_tokens, longest_stop_s=args.longest_stop,
                    stop_s=args.stop)  # fmt: skip
    ground = Ground(sizes, args.model, args.quick)
    report = Report(seed, 60 * args.minutes_limit)
    start = time.monotonic()
    interrupted = False
    try:
        if args.params is not None:
            ground.model = random_model(ground.folder, args.params, args.quant)
        run_all(ground, report, args.only, args.runs)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        ground.close()
    if args.output == "json":
        print(json.dumps(report.as_json() | {"seconds": round(time.monotonic() - start, 1)}, indent=1))
    else:
        print(report.table())
        for run in report.failed:
            print(f"FAILED {run.line()}")
    return 130 if interrupted else int(bool(report.failed or report.missing))


if __name__ == "__main__":
    sys.exit(main())
