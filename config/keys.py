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
Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"

HOME_KEY_FILE = ".config/ggmq/cluster.key"
"""Where a host without settings of its own looks for the key, from the user's home folder."""


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
    """Create the file. Errors: ConfigError when it exists (a key is never overwritten) or cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path}: exists; a cluster key is never overwritten. Move it away first") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: cannot write the cluster key: {_reason(e)}; name another file with --keys") from None
    with open(fd, "w", encoding="ascii") as f:
        f.write(f"public {keys.public.decode()}\nsecret {keys.secret.decode()}\n")


def read_keys(path: Path) -> KeyPair:
    """The pair in a file, as text: whether the two belong together `config.auth` can tell.

    Errors: ConfigError names what is wrong with it.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected the text of a cluster key, got bytes that are none; "
                          "copy the file again from the main host") from None  # fmt: skip
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: cannot read the cluster key: {_reason(e)}; make one with `ggmq keys new`") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path}: expected mode 0600, got {stat.S_IMODE(mode):04o}; run `chmod 600 {path}`")
    fields = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    if set(fields) != {"public", "secret"} or any(len(v) != KEY_CHARS for v in fields.values()):
        raise ConfigError(f"{path}: expected the lines `public KEY` and `secret KEY` of {KEY_CHARS} characters each")
    for name, value in fields.items():
        strange = sorted(set(value) - set(Z85))
        if strange:
            raise ConfigError(f"{path}: {name}: expected {KEY_CHARS} characters of Z85, got {', '.join(map(repr, strange))} "
                              "among them; copy the file again from the main host")  # fmt: skip
        if any(_number(value[i : i + 5]) >= 1 << 32 for i in range(0, KEY_CHARS, 5)):
            raise ConfigError(f"{path}: {name}: expected Z85, got five characters that stand for more than 32 bits; "
                              "copy the file again from the main host")  # fmt: skip
    return KeyPair(fields["public"].encode(), fields["secret"].encode(), str(path.absolute()))


def _number(digits: str) -> int:
    """Five digits of Z85. Source: RFC 32 of ZeroMQ."""
    n = 0
    for c in digits:
        n = 85 * n + Z85.index(c)
    return n


def _reason(e: OSError | ValueError) -> str:
    return getattr(e, "strerror", None) or str(e)
