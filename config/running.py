"""What runs of a cluster, kept in a file from `up` to `down`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct, ValidationError, convert, to_builtins

from protocol.errors import ConfigError
from protocol.tokens import CLUSTER_ID_BYTES

CLUSTER_ID = "GGMQ_CLUSTER_ID"
"""The variable that tells a process which `up` starts whose it is."""


class Process(Struct):
    """A process that `up` began.

    Attributes:
        began_s: when it was started, as the system tells it: with `pid` it names one process for good. 0: not known.
        tag: what it carries in its arguments.
        host: where it runs; empty: here.
    """

    name: str
    tag: str
    pid: Annotated[int, Meta(ge=1, lt=1 << 31)]
    log: str
    host: str = ""
    ssh_options: list[str] = []
    began_s: float = 0.0


class ClusterState(Struct):
    """Attributes:
    endpoint: of its broker, with the port that it has.
    id: in hex; who knows it belongs to this cluster.
    """

    name: str
    file: str
    endpoint: str
    keys: str
    insecure: bool
    processes: list[Process]
    id: Annotated[str, Meta(pattern=r"^([0-9a-f]{32})?$")] = ""

    def process(self, name: str) -> Process | None:
        return next((p for p in self.processes if p.name == name), None)


def new_cluster_id() -> str:
    return secrets.token_hex(CLUSTER_ID_BYTES)


def own_cluster_id() -> bytes:
    """The id of the cluster that this process was started for; empty: of none. Errors: ConfigError when it is no id."""
    text = os.environ.get(CLUSTER_ID, "")
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b"?"
    if len(found) not in (0, CLUSTER_ID_BYTES):
        raise ConfigError(f"{CLUSTER_ID}: expected {2 * CLUSTER_ID_BYTES} hexadecimal digits, as `ggmq up` sets it, "
                          f"got {text!r}; unset it")  # fmt: skip
    return found


def new_tag(name: str) -> str:
    return f"{name}-{secrets.token_hex(8)}"


def state_folder() -> Path:
    """`$XDG_STATE_HOME/ggmq`, else `~/.local/state/ggmq`."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "ggmq"


def state_path(name: str) -> Path:
    return state_folder() / f"{name}.json"


def read_state(path: Path) -> ClusterState | None:
    """The state in a file; None when there is none. Errors: ConfigError when it cannot be read."""
    try:
        return convert(json.loads(path.read_text()), ClusterState)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ConfigError(f"{path}: the cluster's state cannot be read: {e.strerror or e}; "
                          "XDG_STATE_HOME says where it lies") from None  # fmt: skip
    except (ValueError, ValidationError) as e:
        raise ConfigError(f"{path}: the cluster's state cannot be read: {e}; end its processes by hand, remove it") from None


def write_state(state: ClusterState) -> None:
    """Written beside and renamed, after every process that starts: a crash of `up` loses track of none.

    Errors: ConfigError when it cannot be written.
    """
    path = state_path(state.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        with open(fd, "w") as f:
            json.dump(to_builtins(state), f, indent=1)
        os.replace(name, path)
    except OSError as e:
        raise _not_kept(path, e) from None


def remove_state(state: ClusterState) -> None:
    with contextlib.suppress(FileNotFoundError):
        state_path(state.name).unlink()


def all_states() -> list[ClusterState]:
    found = [read_state(p) for p in sorted(state_folder().glob("*.json"))]
    return [s for s in found if s is not None]


@contextlib.contextmanager
def held(name: str) -> Iterator[None]:
    """Nobody else brings this cluster up or down meanwhile. Errors: ConfigError when somebody does."""
    path = state_folder() / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise _not_kept(path, e) from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"cluster {name}: another `ggmq up` or `ggmq down` of it is under way; wait for it") from None
        yield
    finally:
        os.close(fd)


def _not_kept(path: Path, e: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot keep the cluster's state: {e.strerror or e}; XDG_STATE_HOME says where it lies")
