"""CURVE keys: one key pair for a cluster, and pairs of their own for who shall do less.

Whoever has the cluster's file may use and lend devices, and command them. It has two lines, `public <z85>` and
`secret <z85>`. A key of its own has three more: its `role`, its `name`, and as `cluster` the cluster's public key, by which
its holder knows whom it talks to; that is of no use to pose as the cluster. Files are created with O_EXCL and mode 0600, and
are refused when others can read them.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from config.roles import DOES, Role
from protocol.errors import ConfigError

KEY_CHARS = 40
Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"

HOME_KEY_FILE = ".config/ggmq/cluster.key"
"""Where a host without settings of its own looks for the key, from the user's home folder."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Z85 text, 40 characters each (RFC 32 of ZeroMQ).

    Attributes:
        path: the file they were read from, if they were.
        role, name: what the pair is for, and what the cluster calls it if it is not the cluster's own.
        cluster: the cluster's public key; empty: it is this pair's.
    """

    public: bytes
    secret: bytes
    path: str = field(default="", compare=False)
    role: Role = Role.CLUSTER
    name: str = ""
    cluster: bytes = b""

    @property
    def server(self) -> bytes:
        """The public key that a broker, or a worker that listens, proves to have."""
        return self.cluster or self.public

    @property
    def called(self) -> str:
        return f"{self.role} key {self.name}" if self.cluster else "cluster key"

    def text(self) -> str:
        """As a file has it."""
        own = f"role {self.role}\nname {self.name}\ncluster {self.cluster.decode()}\n" if self.cluster else ""
        return f"{own}public {self.public.decode()}\nsecret {self.secret.decode()}\n"


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
        raise ConfigError(f"{path}: exists; a key is never overwritten. Move it away first") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: cannot write the cluster key: {_reason(e)}; name another file with --keys") from None
    with open(fd, "w", encoding="ascii") as f:
        f.write(keys.text())


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
    own = {name: fields.pop(name) for name in ("role", "name") if name in fields}
    pair = {"public", "secret", "cluster"} if own else {"public", "secret"}
    if set(fields) != pair or len(own) == 1 or any(len(v) != KEY_CHARS for v in fields.values()):
        raise ConfigError(f"{path}: expected the lines `public KEY` and `secret KEY` of {KEY_CHARS} characters each, and in "
                          "that of a key of its own `role`, `name` and `cluster KEY` too")  # fmt: skip
    if own and own["role"] not in (Role.WORKER, Role.CLIENT):
        raise ConfigError(f"{path}: role: expected worker or client, got {own['role']!r}")
    for name, value in fields.items():
        wrong = why_no_key(value)
        if wrong:
            raise ConfigError(f"{path}: {name}: expected {wrong}; copy the file again from the main host")
    return KeyPair(fields["public"].encode(), fields["secret"].encode(), str(path.absolute()),
                   Role(own.get("role", Role.CLUSTER)), own.get("name", ""), fields.get("cluster", "").encode())  # fmt: skip


def why_no_key(text: str) -> str:
    """What was expected of a key and what came; empty when it is one."""
    if len(text) != KEY_CHARS:
        return f"{KEY_CHARS} characters of Z85, got {len(text)}"
    strange = sorted(set(text) - set(Z85))
    if strange:
        return f"{KEY_CHARS} characters of Z85, got {', '.join(map(repr, strange))} among them"
    if any(_number(text[i : i + 5]) >= 1 << 32 for i in range(0, KEY_CHARS, 5)):
        return "Z85, got five characters that stand for more than 32 bits"
    return ""


def require(keys: KeyPair | None, role: Role, what: str, instead: str) -> None:
    """Errors: ConfigError where `what` takes another key than this one; `instead` says what to do."""
    if keys is None or keys.role in (Role.CLUSTER, role):
        return
    wanted = "the cluster's own key" if role is Role.CLUSTER else f"the cluster's key or a {role}'s"
    raise ConfigError(f"{keys.path or 'the key'}: {what} takes {wanted}, got {keys.name}, a {keys.role}'s key, which "
                      f"{DOES[keys.role]} and no more; {instead}")  # fmt: skip


def _number(digits: str) -> int:
    """Five digits of Z85. Source: RFC 32 of ZeroMQ."""
    n = 0
    for c in digits:
        n = 85 * n + Z85.index(c)
    return n


def _reason(e: OSError | ValueError) -> str:
    return getattr(e, "strerror", None) or str(e)
