"""`ggmq pull`, `ggmq list`, `ggmq rm`: models of the Hugging Face hub in its cache on this host."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from config.terminal import print_line
from ggmq.cli.session import note
from ggmq.hub import CachedModel, HubName, Removal, cache_folder, cached_models, fetch
from protocol.errors import ConfigError

GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10
_AGES = (("year", 365 * 86400), ("month", 30 * 86400), ("week", 7 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60))


def add(commands: Any) -> None:
    pull = commands.add_parser("pull", help="download a model of the Hugging Face hub",
                               description="Download a model of the hub into its cache. Prints where it lies.")  # fmt: skip
    pull.add_argument("name", metavar="USER/REPO[:QUANT]", help="without QUANT: Q4_K_M, Q4_0, Q8_0, or the first file")
    pull.set_defaults(run=_pull)
    p = commands.add_parser("list", help="the downloaded models", description="The GGUF models in the hub's cache.")
    p.set_defaults(run=_list)
    rm = commands.add_parser("rm", help="remove a downloaded model", description="Remove GGUF files from the hub's cache.")
    rm.add_argument("name", metavar="USER/REPO[:QUANT]", help="without QUANT all GGUF files of the repository")
    rm.add_argument("-y", "--yes", action="store_true", help="do not ask")
    rm.set_defaults(run=_rm)


def _pull(args: argparse.Namespace) -> int:
    paths = fetch(HubName.parse(args.name))
    note(f"{shown_size(sum(p.stat().st_size for p in paths))}; run it with: ggmq run -hf {args.name}")
    print_line(paths[0])
    return 0


def _list(args: argparse.Namespace) -> int:
    models, unreadable = cached_models()
    for text in unreadable:
        note(f"left out: {text}")
    if not models:
        note(f"no models in {cache_folder()}; get one with: ggmq pull USER/REPO[:QUANT]")
        return 0
    _print_table([("REPOSITORY", "FILE", "TYPE", "SIZE", "USED"), *(_row(m) for m in models)])
    return 0


def _row(m: CachedModel) -> tuple[str, ...]:
    remarks = [f"revision {m.revision}"] if m.revision else []
    if m.n_missing:
        remarks.append(f"{m.n_missing} part{'s' if m.n_missing > 1 else ''} missing")
    return (m.repo, m.file + (f" ({', '.join(remarks)})" if remarks else ""), m.kind or "-", shown_size(m.n_bytes),
            shown_age(time.time() - m.used_s))  # fmt: skip


def _rm(args: argparse.Namespace) -> int:
    removal = Removal(HubName.parse(args.name))
    if not args.yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"rm {args.name}: removes {', '.join(removal.files)}; say -y where nobody can be asked")
        for f in removal.files:
            print_line(f, file=sys.stderr)
        if not _agreed(f"Remove {'it' if len(removal.files) == 1 else 'them'} and free {shown_size(removal.n_bytes)}?"):
            print_line("nothing was removed", file=sys.stderr)
            return 1
    removal.carry_out()
    print_line(f"removed {', '.join(removal.files)}; freed {shown_size(removal.n_bytes)}")
    return 0


def _agreed(question: str) -> bool:
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def shown_size(n_bytes: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.1f} {name}"
    return f"{n_bytes} B"


def shown_age(seconds: float) -> str:
    for name, length in _AGES:
        if seconds >= length:
            n = int(seconds // length)
            return f"{n} {name}{'s' if n > 1 else ''} ago"
    return "just now"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
