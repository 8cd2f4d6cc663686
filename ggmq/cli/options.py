"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path

from config.auth import find_keys
from config.keys import KeyPair, default_key_file
from ggmq.hub import BUNDLED, download
from ggmq.promptcache import DEFAULT_BYTES
from protocol.errors import ConfigError


def whole(low: int, high: int = 1 << 40) -> type:
    """An argparse type: whole numbers of a range."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,15}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number of {low} to {high}, got {text!r}")
        return int(text)

    return parse  # type: ignore[return-value]


def real(low: float, high: float) -> type:
    """An argparse type: numbers of a range; NaN is none."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number of {low:g} to {high:g}, got {text!r}")
        return value

    return parse  # type: ignore[return-value]


def shares(text: str) -> list[float]:
    """An argparse type: `3,1` (or `3/1`, as llama.cpp takes it too)."""
    try:
        values = [float(part) for part in re.split(r"[,/]", text)]
    except ValueError:
        values = []
    if not values or any(not 0 <= v < math.inf for v in values) or sum(values) <= 0:
        raise argparse.ArgumentTypeError(f"expected shares such as 3,1, not all 0, got {text!r}")
    return values


def endpoints(text: str) -> list[str]:
    """An argparse type: `host:port,host:port`."""
    out = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:tcp://)?(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+):(\d{1,5})", part.strip())
        if match is None or not 0 < int(match[2]) < 65536:
            raise argparse.ArgumentTypeError(f"expected HOST:PORT[,HOST:PORT], got {part.strip()!r}")
        out.append(f"{match[1]}:{match[2]}")
    if len(set(out)) != len(out):
        raise argparse.ArgumentTypeError(f"an endpoint comes twice in {text!r}")
    return out


def endpoint(text: str) -> str:
    """An argparse type: where a broker listens."""
    if not re.fullmatch(r"(tcp|ipc)://[!-~]{1,256}", text):
        raise argparse.ArgumentTypeError(f"expected tcp://HOST:PORT, got {text!r}")
    return text


def layers(text: str) -> int | None:
    """An argparse type: how many layers, or None for all."""
    return None if text in ("all", "auto") else whole(0)(text)


def text_of(option: str, name: str) -> str:
    """What a file (or standard input, `-`) holds, as it is but for one newline at its end. Errors: ConfigError."""
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as e:
        why = "no such file" if isinstance(e, FileNotFoundError) else e.strerror
        raise ConfigError(f"{option} {name}: {why}") from None
    return raw.removesuffix(b"\n").decode("utf-8", "surrogateescape")


_ESCAPE = re.compile(rb"\\(?:x([\s0-9A-Fa-f+-][0-9A-Fa-f])|([nrt'\"\\]))")
_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # of characters; those between stand for bytes
_MEANS = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def expanded(text: str) -> str:
    r"""A text in which `\n`, `\r`, `\t`, `\'`, `\"`, `\\` and `\xHH` (a byte) stand for what they mean; others stay."""

    def meaning(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[1], 16) & 0xFF]) if match[1] else _MEANS.get(match[2], match[2])

    raw = _HALVES.sub("\ufffd", text).encode("utf-8", "surrogateescape")
    return _ESCAPE.sub(meaning, raw).decode("utf-8", "surrogateescape")


def add_model(p: argparse.ArgumentParser) -> None:
    g = p.add_mutually_exclusive_group()
    g.add_argument("-m", "--model", type=Path, metavar="FILE", help="GGUF file (default: the bundled story model)")
    g.add_argument("-hf", "-hfr", "--hf-repo", metavar="USER/REPO[:QUANT]",
                   help="model of the Hugging Face hub, downloaded once")  # fmt: skip


def add_speculation(p: argparse.ArgumentParser) -> None:
    p.add_argument("--spec", choices=["auto", "ngram", "draft", "off"], default="auto",
                   help="have tokens guessed, and several checked at once, which changes no text: by what it had before "
                   "(ngram), by --spec-draft-model (draft), or by whatever is measured to win (default auto)")  # fmt: skip
    p.add_argument("-md", "--model-draft", "--spec-draft-model", dest="spec_draft_model", type=Path, metavar="FILE",
                   help="a small model with the same vocabulary that guesses tokens")  # fmt: skip


def add_prompt_cache(p: argparse.ArgumentParser) -> None:
    p.add_argument("--prompt-cache", type=Path, metavar="DIR",
                   help="keep what is read of prompts and answers in this folder, so that a text that begins alike goes on "
                   "from there, after a restart too; who reads it reads the texts (default: in memory)")  # fmt: skip
    p.add_argument("--prompt-cache-mib", type=whole(1, 1 << 30), default=DEFAULT_BYTES >> 20, metavar="MIB",
                   help="what the folder may hold; what was of use the longest ago goes first (default "
                   f"{DEFAULT_BYTES >> 20})")  # fmt: skip


def add_security(p: argparse.ArgumentParser) -> None:
    p.add_argument("--keys", type=Path, help=f"cluster key file (default {default_key_file()}, if it is there)")
    p.add_argument("--insecure", action="store_true", help="no encryption, no authentication")


def model_path(args: argparse.Namespace) -> Path:
    """The file that the options name. Errors: what `download` raises."""
    if args.hf_repo:
        return download(args.hf_repo)
    return args.model or BUNDLED


def keys_of(args: argparse.Namespace) -> KeyPair | None:
    return find_keys(args.keys, args.insecure)




def require_file(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    return path
