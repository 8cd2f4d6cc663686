"""Who may speak to a socket that listens: the cluster's key, those of its list, and other workers that a broker names.

The list lies beside the cluster's key, `cluster.allowed` beside `cluster.key`, one key a line: role, name, public key. It is
looked at before each handshake and some times a second, so a change holds at once. A list that cannot be read lets in nobody
but the cluster's key.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from config.keys import KeyPair, why_no_key
from config.roles import Caller, Role
from protocol.errors import ConfigError

MAX_KEYS = 1024
MAX_REFUSED = 64
MAX_BYTES = 1 << 20
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,129}")
HEAD = "# Keys that this cluster lets in besides its own: role, name, public key. `ggmq keys` writes it.\n"


@dataclass(frozen=True, slots=True)
class Entry:
    role: Role
    name: str
    public: str


def list_beside(keys: Path) -> Path:
    """Where the list of a cluster's key file lies."""
    return keys.with_suffix(".allowed")


def read_list(path: Path) -> list[Entry]:
    """The keys of a list; none where there is no file.

    Errors: ConfigError names the line, or why the file is not taken.
    """
    try:
        with open(path, "rb") as f:
            mode = os.fstat(f.fileno()).st_mode
            raw = f.read(MAX_BYTES + 1)
        text = raw.decode("ascii")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected lines `role name key`, got bytes that are no text; remove it, and allow the "
                          "keys again with `ggmq keys new`") from None  # fmt: skip
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: cannot read the list of keys: {getattr(e, 'strerror', None) or e}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path}: expected mode 0600, got {stat.S_IMODE(mode):04o}; run `chmod 600 {path}`")
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: expected at most {MAX_BYTES} bytes")
    out: list[Entry] = []
    for i, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            out.append(_entry(f"{path}:{i}", words))
    for what in ("name", "public"):
        values = [getattr(e, what) for e in out]
        twice = next((v for v in values if values.count(v) > 1), None)
        if twice is not None:
            raise ConfigError(f"{path}: {twice} comes twice; remove one of the lines")
    if len(out) > MAX_KEYS:
        raise ConfigError(f"{path}: expected at most {MAX_KEYS} keys, got {len(out)}; `ggmq keys remove` what is not used")
    return out


def _entry(where: str, words: list[str]) -> Entry:
    if len(words) != 3 or words[0] not in (Role.WORKER, Role.CLIENT) or not NAME.fullmatch(words[1]):
        raise ConfigError(f"{where}: expected `worker NAME KEY` or `client NAME KEY`, got {' '.join(words)[:80]!r}")
    wrong = why_no_key(words[2])
    if wrong:
        raise ConfigError(f"{where}: key: expected {wrong}")
    return Entry(Role(words[0]), words[1], words[2])


def add_key(path: Path, entry: Entry) -> None:
    """Let a key in. Errors: ConfigError when its name is taken, or the list cannot be read or written."""
    with _held(path):
        entries = read_list(path)
        if any(e.name == entry.name for e in entries):
            raise ConfigError(f"{path}: the name {entry.name} is taken; choose another, or `ggmq keys remove {entry.name}`")
        if len(entries) >= MAX_KEYS:
            raise ConfigError(f"{path}: has {MAX_KEYS} keys, which is the most; `ggmq keys remove` what is not used")
        _write(path, [*entries, entry])


def remove_key(path: Path, name: str) -> Entry:
    """Let a key in no longer. Errors: ConfigError when there is none of this name."""
    with _held(path):
        entries = read_list(path)
        found = next((e for e in entries if e.name == name), None)
        if found is None:
            names = ", ".join(e.name for e in entries) or "none"
            raise ConfigError(f"{path}: there is no key {name}; it has {names}")
        _write(path, [e for e in entries if e is not found])
        return found


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Nobody else of this host changes the list meanwhile."""
    try:
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise ConfigError(f"{path.parent}: expected the folder of the cluster key: {e.strerror}; make the key with "
                          "`ggmq keys new`") from None  # fmt: skip
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write(path: Path, entries: list[Entry]) -> None:
    """As a whole or not at all: a broker may read it at any time."""
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(fd, "w", encoding="ascii") as f:
                f.write(HEAD + "".join(f"{e.role} {e.name} {e.public}\n" for e in entries))
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
    except OSError as e:
        raise ConfigError(f"{path}: cannot write the list of keys: {e.strerror}") from None


class Allowed:
    """Attributes:
    keys: the pair of the side that listens.
    trouble: why the list cannot be read, if so: nobody but the cluster's key is let in meanwhile.
    refused: addresses whose handshakes ended badly, the last ones, until somebody names them.
    Threads: `lets_in` may run in one of its own, and `refused` is for two.
    Errors: ConfigError when the list cannot be read at the start.
    """

    def __init__(self, keys: KeyPair, listed: Path | None = None) -> None:
        """listed: the list of keys, where there may be one."""
        self.keys, self.trouble = keys, ""
        self.refused: deque[str] = deque(maxlen=MAX_REFUSED)
        self._cluster = Caller(keys.server.decode(), Role.CLUSTER)
        self._path = listed
        self._stamp: tuple[int, ...] | None = None
        self._listed: dict[str, Caller] = {}  # replaced as a whole, never changed: two threads look at it
        self._named: dict[bytes, dict[str, Caller]] = {}
        self.refresh()
        if self.trouble:
            raise ConfigError(self.trouble)

    def lets_in(self, key: str) -> bool:
        """Whether a handshake may end well."""
        self.refresh()
        return self.caller(key) is not None

    def caller(self, key: str) -> Caller | None:
        """Who has a public key; None: nobody that may speak."""
        if key == self._cluster.key:
            return self._cluster
        named = (callers[key] for callers in self._named.values() if key in callers)
        return self._listed.get(key) or next(named, None)

    def refresh(self) -> None:
        """Look whether the list has changed."""
        if self._path is None:
            return
        stamp = self._look()
        if stamp == self._stamp:
            return
        try:
            listed = {e.public: Caller(e.public, e.role, e.name) for e in read_list(self._path)}
            trouble = ""
        except ConfigError as e:
            listed, trouble = {}, str(e)
        self._listed, self.trouble, self._stamp = listed, trouble, stamp

    def _look(self) -> tuple[int, ...]:
        assert self._path is not None  # whoever calls has looked
        try:
            s = os.stat(self._path)
        except FileNotFoundError:
            return ()
        except OSError as e:
            return (e.errno or -1,)
        return s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_size, s.st_mode

    def name(self, who: bytes, keys: Collection[bytes]) -> None:
        """A broker names the keys of other workers, which may hand activations over; those that it named before are gone."""
        texts = [k.decode("ascii", "replace") for k in keys]
        named = {**self._named, who: {k: Caller(k, Role.WORKER) for k in texts}}
        self._named = {broker: callers for broker, callers in named.items() if callers}

    def forget(self, whose: Collection[bytes]) -> None:
        """Brokers are gone, and with them the keys that they named."""
        self._named = {who: keys for who, keys in self._named.items() if who not in whose}
