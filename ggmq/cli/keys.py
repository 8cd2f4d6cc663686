"""`ggmq keys`: the cluster's key, and keys of their own for who shall do less."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from config.allowed import NAME, list_beside, read_list, remove_key
from config.auth import find_keys, new_keys
from config.handing import new_pair
from config.keys import HOME_KEY_FILE, KeyPair, default_key_file, require, write_keys
from config.roles import DOES, Role
from config.terminal import print_line
from protocol.errors import ConfigError, GgmqError


def add(commands: Any) -> None:
    p = commands.add_parser("keys", help="the cluster key, and who else is let in",
                            description="Make the key that lets hosts use each other; with a NAME one that may do less, for "
                            "one worker or one client. List those keys, and remove them.")  # fmt: skip
    p.add_argument("what", choices=["new", "list", "remove"])
    p.add_argument("name", nargs="?", metavar="NAME", help="of a key for one worker or client; with `new` without it: the "
                   "cluster's own, whose holder may do all")  # fmt: skip
    p.add_argument("--role", choices=[Role.WORKER.value, Role.CLIENT.value],
                   help="what a key with a NAME is for: worker lends devices, client uses them")  # fmt: skip
    p.add_argument("--keys", type=Path, help=f"the cluster's key file (default {default_key_file()})")
    p.set_defaults(run=_keys)


def _keys(args: argparse.Namespace) -> int:
    path = args.keys or default_key_file()
    if args.role and (args.what != "new" or args.name is None):
        raise ConfigError("--role: only a new key with a name has one: `ggmq keys new NAME --role worker`")
    match args.what:
        case "new" if args.name is None:
            _new_cluster_key(path)
        case "new":
            _new_key(path, args.name, args.role)
        case "list":
            _list(path)
        case _:
            _remove(path, args.name)
    return 0


def _cluster_key(path: Path) -> KeyPair:
    if not path.exists():
        raise ConfigError(f"{path}: there is no cluster key yet; make it with `ggmq keys new`")
    keys = find_keys(path, False)
    assert keys is not None  # the file was named
    require(keys, Role.CLUSTER, "the list of keys", "it is kept on the main host, where the cluster's key is")
    return keys


def _new_cluster_key(path: Path) -> None:
    write_keys(path, new_keys())
    print_line(f"wrote {path}")
    print_line("copy it to each host of the cluster; with its name or address for HOST:")
    print_line(f"  ssh HOST 'mkdir -p -m 700 {Path(HOME_KEY_FILE).parent}'")
    print_line(f"  scp -p {shlex.quote(str(path))} HOST:{HOME_KEY_FILE}")


def _new_key(path: Path, name: str, role: str | None) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(f"NAME: expected letters, digits, `_`, `.` and `-`, got {name!r}")
    if role is None:
        raise ConfigError(f"--role: expected worker ({DOES[Role.WORKER]}) or client ({DOES[Role.CLIENT]}), got none; say "
                          f"`ggmq keys new {name} --role worker`")  # fmt: skip
    keys, own = _cluster_key(path), path.with_name(f"{name}.key")
    if own.exists():
        raise ConfigError(f"{own}: exists; a key is never overwritten. Move it away first, or choose another name")
    pair = new_pair(keys, Role(role), name)
    try:
        write_keys(own, pair)
    except GgmqError:
        remove_key(list_beside(path), name)
        raise
    there = f"{Path(HOME_KEY_FILE).parent}/{name}.key"
    print_line(f"wrote {own}: a {role}'s key, which {DOES[pair.role]} and no more; {list_beside(path)} lets it in")
    print_line("copy it to its host, with that one's name or address for HOST; this host needs it no longer:")
    print_line(f"  ssh HOST 'mkdir -p -m 700 {Path(HOME_KEY_FILE).parent}'")
    print_line(f"  scp -p {shlex.quote(str(own))} HOST:{there}")
    use = "worker --broker tcp://MAINHOST:PORT" if pair.role is Role.WORKER else "ggmq run --broker tcp://MAINHOST:PORT"
    print_line(f"there: {use} --keys ~/{there}")


def _list(path: Path) -> None:
    keys = _cluster_key(path)
    print_line(f"{'cluster':8}{keys.public.decode()}  {path}")
    for e in read_list(list_beside(path)):
        print_line(f"{e.role:8}{e.public}  {e.name}")


def _remove(path: Path, name: str | None) -> None:
    if name is None:
        raise ConfigError("NAME: expected the name of a key; `ggmq keys list` has them")
    _cluster_key(path)
    e = remove_key(list_beside(path), name)
    print_line(f"removed the {e.role}'s key {e.name}: brokers that run here end what it has under way within a second")
