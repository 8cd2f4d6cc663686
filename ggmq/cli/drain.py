"""`ggmq drain WORKER`: whoever has something on a worker's devices moves it elsewhere, and drops no request for it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import running
from config.auth import find_keys
from config.load import load_cluster
from config.schema import expanded
from config.terminal import print_line
from ggmq.cli.options import add_security, endpoint, require_file
from ggmq.cli.status import open_client
from protocol import messages as m
from protocol.errors import ConfigError, Unavailable

POLL_S = 0.1


def add(commands: Any) -> None:
    p = commands.add_parser("drain", help="have a worker's layers and pages moved to others, so that it can be ended",
                            description="""Have whoever holds something on a worker's devices move it to other devices, and
        place nothing new there. Nobody's request is dropped. Ends when the worker holds nothing any more: it may be ended
        then. Exit code 1: something stays there.""")  # fmt: skip
    p.add_argument("worker", metavar="WORKER", help="its name as `ggmq status` has it")
    p.add_argument("cluster", type=Path, nargs="?", metavar="CLUSTER.yaml", 
                   help="of this cluster (default: the one that is up)")  # fmt: skip
    p.add_argument("--broker", type=endpoint, metavar="ENDPOINT", help="of this broker instead")
    p.add_argument("--undo", action="store_true", help="the worker may be used again")
    p.add_argument("--within", type=float, default=60.0, metavar="SECONDS", help="wait so long (default %(default)g)")
    add_security(p)
    p.set_defaults(run=drain)


def drain(args: argparse.Namespace) -> int:
    """Exit code 1 when something stays on the worker."""
    with _client(args) as client:
        numbers = _devices(args.worker, client.devices())
        for number in numbers:
            client.request(m.Retire(not args.undo), device=number)
        if args.undo:
            print_line(f"{args.worker}: may be used again")
            return 0
        due = time.monotonic() + args.within
        while (n := _n_sessions(listed := client.devices(), numbers)) and time.monotonic() < due:
            if all(listed[i].state in ("lost", "none") for i in numbers if i < len(listed)):
                print_line(f"{args.worker}: was lost meanwhile; who used it goes on elsewhere")
                return 0
            time.sleep(POLL_S)
        if n:
            raise Unavailable(f"{args.worker}: {n} sessions still hold something there after {args.within:g} s: nobody else "
                              "has room for it, or a program waits for its user; nothing new comes there. Add a worker, "
                              f"wait longer (--within), or take it back: ggmq drain {args.worker} --undo")  # fmt: skip
        print_line(f"{args.worker}: holds nothing any more and may be ended")
        return 0


def _client(args: argparse.Namespace) -> Any:
    """The broker that the options name, else that of the only cluster that is up. Errors: ConfigError, Unavailable."""
    if args.broker:
        return open_client(args.broker, find_keys(args.keys, args.insecure), b"")
    states = running.all_states()
    if args.cluster is not None:
        name = load_cluster(require_file(args.cluster)).name
        states = [s for s in states if s.name == name]
    if len(states) != 1:
        which = f"{args.cluster} is not up" if args.cluster is not None else f"{len(states)} clusters are up"
        raise ConfigError(f"drain: {which}; name one that is (ggmq status), or a broker with --broker")
    (state,) = states
    keys = find_keys(args.keys or (expanded(state.keys) if state.keys else None), args.insecure or state.insecure)
    return open_client(state.endpoint, keys, bytes.fromhex(state.id))


def _devices(worker: str, infos: Sequence[m.ListedDevice]) -> list[int]:
    """Errors: ConfigError for a worker that there is not."""
    found = [i for i, d in enumerate(infos) if worker in (d.worker, d.address) and d.state != "none"]
    if not found:
        names = ", ".join(sorted({d.worker for d in infos if d.state != "none"})) or "none"
        raise ConfigError(f"drain {worker}: expected the name of a worker, one of: {names}")
    return found


def _n_sessions(infos: Sequence[m.ListedDevice], numbers: Sequence[int]) -> int:
    return max((infos[i].n_sessions for i in numbers if i < len(infos)), default=0)
