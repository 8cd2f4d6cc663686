"""Compare with llama.cpp: `python -m tests.peer tokenizer|templates|models|texts|scans --n N --seed S`.

Needs libllama: `pip install 'ggmq[peers]'`, or `GGMQ_LIBLLAMA=/path/to/libllama.so`. The exit status is 0 when nothing
differs but by choice.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec

SUBJECTS = {
    "tokenizer": "random texts through vocabularies of every kind",
    "templates": "chat templates and conversations",
    "models": "logits of random models of every architecture",
    "texts": "greedy texts of whole models",
    "scans": "states of random recurrences",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peer", description="Compare with llama.cpp through libllama.")
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, what in SUBJECTS.items():
        if find_spec(f"tests.peer.{name}") is None:
            continue
        sub = subjects.add_parser(name, help=what, description=what)
        sub.add_argument("--n", type=int, default=1000, help="how many to compare (default %(default)s)")
        sub.add_argument("--seed", type=int, default=1, help="the same seed compares the same (default %(default)s)")
        import_module(f"tests.peer.{name}").add_arguments(sub)
    args = parser.parse_args()
    return int(import_module(f"tests.peer.{args.subject}").run(args))


if __name__ == "__main__":
    sys.exit(main())
