"""`ggmq logits` and `ggmq replay`: numbers out of real workers, for checks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from config.terminal import print_line
from ggmq.bus import local_threads
from ggmq.cli.options import add_model, add_security, require_file, whole
from ggmq.cli.run import add_bus
from ggmq.cli.session import model_config, open_session, print_summary
from ggmq.cluster import local_bus
from ggmq.engine import Engine
from ggmq.replay import replay
from protocol.errors import FormatError

MAX_TOKENS = 1 << 24


def add(commands: Any) -> None:
    p = commands.add_parser("logits", help="logits of token ids", description="Logits at every position, from workers.")
    add_model(p)
    p.add_argument("--tokens", type=Path, required=True, metavar="IN.npy", help="int32 [n]")
    p.add_argument("--out", type=Path, required=True, metavar="OUT.npy", help="float32 [n, n_vocab]")
    p.add_argument("--chunk", type=whole(1), default=512, help="tokens at once (default 512)")
    add_bus(p)
    add_security(p)
    p.set_defaults(run=_logits, workers=1)
    r = commands.add_parser("replay", help="recorded graphs through a worker",
                            description="Run recorded graphs through a real worker and compare.")  # fmt: skip
    r.add_argument("cases", type=Path, nargs="+", metavar="CASES.msgpack")
    r.add_argument("--device", default="CPU", help="CPU or reference (default CPU)")
    r.add_argument("-t", "--threads", type=whole(1, 1024), default=0)
    r.set_defaults(run=_replay)


def _logits(args: argparse.Namespace) -> int:
    try:
        tokens = np.load(require_file(args.tokens), allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise FormatError(f"{args.tokens}: expected an int32 array in .npy format: {e}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
        shape = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise FormatError(f"{args.tokens}: expected int32 [n] with n of at least 1, got {shape}")
    if len(tokens) > MAX_TOKENS or tokens.min() < 0 or tokens.max() >= 1 << 31:
        raise FormatError(f"{args.tokens}: expected up to {MAX_TOKENS} token ids that fit int32")
    n_ctx = max(args.ctx_size, -(-len(tokens) // 32) * 32)
    with open_session(model_config(args, n_ctx, n_batch=args.chunk)) as model:
        np.save(args.out, Engine(model, n_batch=args.chunk).logits(tokens.astype(np.int32)))
        print_summary(model)
    return 0


def _replay(args: argparse.Namespace) -> int:
    bad = agree = skipped = 0
    for path in args.cases:
        require_file(path)
    with local_bus() as bus:
        bus.spawn(args.device, local_threads(args.threads, 1)[0])
        client = bus.start()
        for path in args.cases:
            for r in replay(client, path):
                if r.skipped:
                    word, skipped = "skip", skipped + 1
                else:
                    word = "ok" if r.ok else "OFF"
                    agree, bad = agree + r.ok, bad + (not r.ok)
                error = "-" if r.nmse is None else f"{r.nmse:.3e}"
                print_line(f"{word:4} {path.stem} nmse {error} bound {r.bound:.3e} {r.case} {r.note}".rstrip())
    print_line(f"{agree} agree, {bad} off, {skipped} skipped (an op outside the table) on {args.device}")
    if bad:
        print("ggmq: some cases are off; the lines above that begin with OFF name them", file=sys.stderr)
    return 1 if bad else 0
