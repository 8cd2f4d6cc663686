"""`ggmq info`, `ggmq tokenize`, `ggmq cache`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from blake3 import blake3

from config.installed import module_command, module_environment
from config.terminal import print_line, safe_line, safe_text
from ggmq.archs import open_arch
from ggmq.archs.keys import READ, unread
from ggmq.cli.options import add_model, model_path
from ggmq.gguf import GGUF, SCALARS, STRING
from ggmq.manifest import tensor_hashes
from ggmq.tokenizer import Vocabulary
from protocol.errors import ConfigError, FormatError

MAX_SHOWN = 6
MAX_LINE_CHARS = 120


def add(commands: Any) -> None:
    p = commands.add_parser("info", help="what is in a GGUF file", description="Metadata, tensors, types, sizes, hash.")
    p.add_argument("file", type=Path, metavar="M", nargs="?", help="GGUF file (default: the bundled model)")
    p.set_defaults(run=_info, hf_repo=None)
    t = commands.add_parser("tokenize", help="text to tokens", description="Text from standard input to tokens.")
    add_model(t)
    t.add_argument("--no-special", action="store_true", help="add and recognise no special tokens")
    t.add_argument("--ids", action="store_true", help="ids only, on one line")
    t.set_defaults(run=_tokenize)
    c = commands.add_parser("cache", help="the local weight cache", description="List, verify or clear the cache.")
    c.add_argument("what", choices=["list", "verify", "clear"])
    c.add_argument("--cache-dir", type=Path)
    c.set_defaults(run=_cache)


def _info(args: argparse.Namespace) -> int:
    args.model = args.file
    g = GGUF(model_path(args))
    print_line(f"file     {g.path}" + (f" and {len(g.paths) - 1} more parts" if len(g.paths) > 1 else ""))
    print(f"version  GGUF v{g.version}")
    hashes = tensor_hashes(g)
    whole = blake3(b"".join(hashes[name] for name in sorted(hashes))).hexdigest()
    elements = sum(t.ne[0] * t.ne[1] * t.ne[2] * t.ne[3] for t in g)
    print(f"tensors  {len(g.tensors)}, {elements:,} parameters, {g.n_bytes:,} bytes")
    for kind, n in Counter(t.type.name for t in g).most_common():
        print(f"         {kind}: {n} tensors, {sum(t.n_bytes for t in g if t.type.name == kind):,} bytes")
    print(f"hash     {whole} (BLAKE3 of the tensors' hashes, by name)")
    print("metadata")
    for key, v in g.metadata.items():
        kind = "str" if v.type == STRING else SCALARS[v.type][1]
        if v.is_array:
            shown = ", ".join(repr(x) if v.type == STRING else str(x) for x in list(v.value[:MAX_SHOWN]))
            more = f", ... ({len(v.value)} in all)" if len(v.value) > MAX_SHOWN else ""
            print_line(f"  {key}: [{kind}] = {_line(shown)}{more}")
        else:
            print_line(f"  {key}: {kind} = {_line(str(v.value))}")
    _print_what_is_read(g)
    print("tensors by name")
    for t in g:
        ne = t.ne[: max((i + 1 for i in range(4) if t.ne[i] > 1), default=1)]
        shape = ", ".join(map(str, ne))
        print_line(f"  {t.name}: {t.type.name} [{shape}], {t.n_bytes} bytes, {hashes[t.name].hex()[:16]}")
    return 0


def _print_what_is_read(g: GGUF) -> None:
    """Whether the file can be run, and which keys its architecture does not read."""
    try:
        arch = open_arch(g).hp.arch
        print(f"runs as  {arch}")
    except FormatError as e:
        print_line(f"runs as  nothing: {e}")
        arch = str(getattr(g.metadata.get("general.architecture"), "value", ""))
    if arch in READ and (ignored := list(unread(g, arch))):
        print(f"keys that are not read for architecture {arch}")
        for key in ignored:
            print_line(f"  {key}")


def _line(text: str) -> str:
    one = safe_line(text[: MAX_LINE_CHARS + 1])
    return one if len(one) <= MAX_LINE_CHARS else one[: MAX_LINE_CHARS - 3] + "..."


def _tokenize(args: argparse.Namespace) -> int:
    vocabulary = Vocabulary(GGUF(model_path(args)))
    text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    ids = vocabulary.encode(text, add_special=not args.no_special, parse_special=not args.no_special)
    if args.ids:
        print(" ".join(map(str, ids)))
        return 0
    for i in ids:
        print(f"{i:>8} {vocabulary.piece(i, special=True).decode('utf-8', 'replace')!r}")
    return 0


def _cache(args: argparse.Namespace) -> int:
    # the cache belongs to the worker; its own module does the work, in its own process
    command = [*module_command("workers.cache"), args.what]
    try:
        done = subprocess.run([*command, *(["--cache-dir", str(args.cache_dir)] if args.cache_dir else [])],
                              capture_output=True, text=True, errors="backslashreplace",
                              env=module_environment())  # fmt: skip
    except ValueError as e:  # a NUL byte
        raise ConfigError(f"--cache-dir {args.cache_dir}: {e}; choose another") from None
    print(safe_text(done.stdout), end="", flush=True)
    print(safe_text(done.stderr), end="", file=sys.stderr, flush=True)
    return done.returncode
