"""CURVE keys: one key pair for a cluster, in a file that is copied to each of its hosts.

Whoever has the file may use and lend devices; without it no peer gets past the handshake. The file has two lines,
`public <z85>` and `secret <z85>`, is created with O_EXCL and mode 0600, and is refused when others can read it.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import ConfigError

KEY_CHARS = 40


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Z85 text, 40 characters each (RFC 32 of ZeroMQ). `path`: the file they were read from, if they were."""

    public: bytes
    secret: bytes
    path: str = field(default="", compare=False)


def default_key_file() -> Path:
    """`$GGMQ_KEYS`, else `~/.config/ggmq/cluster.key`."""
    named = os.environ.get("GGMQ_KEYS")
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(named) if named else base / "ggmq" / "cluster.key"


def write_keys(path: Path, keys: KeyPair) -> None:
    """Create the file. Errors: ConfigError when it exists: a key is never overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path}: exists; a cluster key is never overwritten. Move it away first") from None
    with open(fd, "w", encoding="ascii") as f:
        f.write(f"public {keys.public.decode()}\nsecret {keys.secret.decode()}\n")


def read_keys(path: Path) -> KeyPair:
    """The pair in a file. Errors: ConfigError names what is wrong with it."""
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot read the cluster key: {e}; make one with `ggmq keys new`") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path}: expected mode 0600, got {stat.S_IMODE(mode):04o}; run `chmod 600 {path}`")
    fields = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    if set(fields) != {"public", "secret"} or any(len(v) != KEY_CHARS for v in fields.values()):
        raise ConfigError(f"{path}: expected the lines `public KEY` and `secret KEY` of {KEY_CHARS} characters each")
    return KeyPair(fields["public"].encode(), fields["secret"].encode(), str(path.absolute()))


def find_keys(path: Path | None, insecure: bool) -> KeyPair | None:
    """The keys to use: the file named, else the default file if there is one, else none. None when `insecure`."""
    if insecure:
        return None
    if path is not None:
        return read_keys(path)
    default = default_key_file()
    return read_keys(default) if default.exists() else None
