"""`python -m tests.load`: the long form. Exit codes: 0 all held, 1 something did not."""

from __future__ import annotations

import argparse
import secrets
import sys

from tests.load.run import load


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m tests.load", description="Does a server hold under clients of all manners?")
    p.add_argument("--minutes", type=float, default=60.0, help="how long they come (default %(default)s)")
    p.add_argument("--clients", type=int, default=12, help="how many there are at a time (default %(default)s)")
    p.add_argument("--pause", type=float, default=0.0, metavar="S", help="mean seconds until another comes (%(default)s)")
    p.add_argument("--seed", type=int, help="what chance chooses (default: a new one, which is printed)")
    args = p.parse_args()
    seed = secrets.randbits(32) if args.seed is None else args.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    seen, table = load(60 * args.minutes, seed, args.clients, args.pause, say=True)
    print(table)
    for failure in seen.failures[:50]:
        print(f"FAILED (--seed {seed}) {failure}")
    return int(bool(seen.failures))


if __name__ == "__main__":
    sys.exit(main())
