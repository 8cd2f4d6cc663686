"""Gives a host that has no key one of its own, over ssh, so that its worker may lend and nothing else."""

from __future__ import annotations

from pathlib import Path

from config.allowed import Entry, add_key, list_beside, read_list, remove_key
from config.auth import new_keys
from config.keys import HOME_KEY_FILE, KeyPair
from config.remote import for_shell, ssh
from config.roles import Role
from config.schema import ClusterFile, WorkerSection
from protocol.errors import GgmqError

_LOOK = """\
f={path}
if [ -e "$f" ] || [ -L "$f" ]; then echo there; fi
"""
_PUT = """\
umask 077
f={path}
mkdir -p "$(dirname "$f")" || exit 1
set -C
cat >"$f" <<'end of key' || exit 1
{text}end of key
"""
"""Read from standard input, so that the key is among nobody's arguments. `set -C`: a file that is there is left alone."""


def new_pair(keys: KeyPair, role: Role, name: str) -> KeyPair:
    """A pair of its own for a role in the cluster whose key is `keys`, let in from now on.

    Errors: ConfigError when the name is taken, or the list of keys cannot be written.
    """
    fresh = new_keys()
    pair = KeyPair(fresh.public, fresh.secret, "", role, name, keys.public)
    add_key(list_beside(Path(keys.path)), Entry(role, name, pair.public.decode()))
    return pair


def place_of_key(cluster: ClusterFile, w: WorkerSection) -> str:
    """Where a worker on another host has its key."""
    return w.keys or cluster.security.keys or f"~/{HOME_KEY_FILE}"


def hand_out(keys: KeyPair, w: WorkerSection, place: str, name: str) -> str:
    """Give a worker's host a key if it has none at that place.

    Returns: what the list calls it, `name` or with a number behind; empty: there is a key already.
    Errors: Unavailable with what ssh or the host said, ConfigError when the list of keys cannot be written.
    """
    path = for_shell([place])
    if ssh(w.host, w.ssh_options, "sh -s", _LOOK.format(path=path)).strip():
        return ""
    listed = list_beside(Path(keys.path))
    taken = {e.name for e in read_list(listed)}
    name = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    pair = new_pair(keys, Role.WORKER, name)
    try:
        ssh(w.host, w.ssh_options, "sh -s", _PUT.format(path=path, text=pair.text()))
    except GgmqError:
        remove_key(listed, name)
        raise
    return name
