"""`python -m tests.soak`: the long form. Exit codes: 0 all held, 1 something did not, 130 interrupted."""

from __future__ import annotations

import argparse
import secrets
import signal
import sys

from tests.soak.report import Report
from tests.soak.run import Amounts, soak


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m tests.soak", description="Does it hold, for hours and through faults?")
    p.add_argument("--sessions", type=int, default=0, help="sessions with one broker and four workers")
    p.add_argument("--lives", type=int, default=0, help="workers that are started and ended")
    p.add_argument("--pauses", type=int, default=0, help="processes that are stopped and resumed")
    p.add_argument("--longest-pause", type=float, default=30.0, metavar="S", help="seconds (default %(default)s)")
    p.add_argument("--broker-kills", type=int, default=0, help="brokers that are killed and started again")
    p.add_argument("--strangers", type=int, default=0, help="silent connections to a worker with 1024 descriptors")
    p.add_argument("--seed", type=int, help="what chance chooses; a failure names it (default: a new one)")
    p.add_argument("--minutes-limit", type=float, default=120.0, metavar="M", help="begin no step later (%(default)s)")
    args = p.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # all processes are ended then too
    seed = secrets.randbits(32) if args.seed is None else args.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    report = Report(seed, 60 * args.minutes_limit)
    amounts = Amounts(args.sessions, args.lives, args.pauses, args.broker_kills, args.strangers,
                      longest_pause_s=args.longest_pause)  # fmt: skip
    interrupted = False
    try:
        soak(report, amounts)
    except KeyboardInterrupt:
        interrupted = True
    except RuntimeError as e:
        report.fail("ground", "process", str(e))
    print(report.table())
    for failure in report.failures:
        print(f"FAILED {failure}")
    return 130 if interrupted else int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
