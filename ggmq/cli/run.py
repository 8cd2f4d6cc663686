"""`ggmq run`: a prompt answered, or a chat in the terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from config.terminal import for_stream
from ggmq.cli.chatting import chat
from ggmq.cli.clusters import apply_cluster
from ggmq.cli.options import (
    add_model,
    add_security,
    endpoints,
    expanded,
    model_path,
    real,
    require_file,
    shares,
    text_file,
    whole,
)
from ggmq.cli.session import Session, open_session, print_summary
from ggmq.engine import Engine, chosen_seed
from ggmq.gguf import GGUF
from ggmq.sampling import SamplingParams
from ggmq.tokenizer import StreamDecoder, Vocabulary, well_formed
from protocol.errors import FormatError


def add_bus(p: argparse.ArgumentParser) -> None:
    """Options that say which devices take part."""
    p.add_argument("--rpc", type=endpoints, metavar="HOST:PORT,...", help="workers that listen on other hosts")
    p.add_argument("--broker", metavar="ENDPOINT", help="a broker that runs elsewhere (tcp://HOST:PORT)")
    p.add_argument("--workers", type=whole(0, 64),
                   help="local workers (default: 1, as many as --worker-mem names, or none with --rpc)")  # fmt: skip
    p.add_argument("--device", default="CPU", help="device of the local workers (default CPU)")
    p.add_argument("--worker-mem", type=lambda t: [whole(1)(x) for x in t.split(",")], metavar="MIB,...",
                   help="memory that each local worker lends (default: what is free)")  # fmt: skip
    p.add_argument("-t", "--threads", type=whole(1, 1024), default=0,
                   help="threads of the local workers together (default: all cores)")  # fmt: skip
    p.add_argument("--pin", action="store_true", help="keep each thread of the local workers on a CPU of its own")
    p.add_argument("--cache", action="store_true", help="local workers keep weights in a cache instead of reading the file")
    p.add_argument("-ngl", "--n-gpu-layers", "--gpu-layers", dest="ngl", type=whole(0), metavar="N",
                   help="layers on the lent devices; the first others stay on this host (default: all)")  # fmt: skip
    p.add_argument("-ts", "--tensor-split", type=shares, metavar="A,B,...",
                   help="shares of the layers, a device each (default: by free memory)")  # fmt: skip
    p.add_argument("--activations", choices=["f32", "f16"], default="f32",
                   help="what crosses from stage to stage; f16 halves the bytes and changes the text a little, for models "
                   "whose hidden states stay below 65504 (default f32)")  # fmt: skip
    p.add_argument("-c", "--ctx-size", type=whole(0, 1 << 24), default=0,
                   help="context in tokens (default: the model's, at most 4096)")  # fmt: skip


def add(commands: Any) -> None:
    p = commands.add_parser("run", help="answer a prompt, or chat", description="Answer a prompt; without -p, chat.")
    add_model(p)
    p.add_argument("--cluster", type=Path, metavar="FILE", help="use the cluster that `ggmq up FILE` started")
    p.add_argument("-p", "--prompt", help="the prompt; without it a chat begins")
    p.add_argument("-f", "--file", dest="prompt", type=text_file, metavar="FILE",
                   help="take the prompt from a file, without the newline at its end")  # fmt: skip
    p.add_argument("-e", "--escape", action=argparse.BooleanOptionalAction, default=True,
                   help=r"expand \n, \r, \t, \', \", \\ and \xHH in a prompt, -f's too (the default)")  # fmt: skip
    p.add_argument("-sys", "--system-prompt", default="", help="system message of a chat, taken as it is")
    p.add_argument("-sysf", "--system-prompt-file", dest="system_prompt", type=text_file, metavar="FILE",
                   help="take the system message from a file, without the newline at its end")  # fmt: skip
    p.add_argument("-rea", "--reasoning", choices=["on", "off", "auto"], default="auto",
                   help="have the model think first in a chat, if its template can choose (default auto: on)")  # fmt: skip
    p.add_argument("-n", "--predict", "--n-predict", dest="n_predict", type=whole(-1), default=-1,
                   help="tokens to make (default: until the model ends)")  # fmt: skip
    p.add_argument("-b", "--batch-size", type=whole(1, 4096), default=512, help="prompt tokens at once (default 512)")
    p.add_argument("--temp", type=real(0, 100), default=0.8, help="temperature, 0 is greedy (default 0.8)")
    p.add_argument("--top-k", type=whole(0), default=40, help="0 for all (default 40)")
    p.add_argument("--top-p", type=real(0, 1), default=0.95, help="(default 0.95)")
    p.add_argument("--min-p", type=real(0, 1), default=0.05, help="(default 0.05)")
    p.add_argument("--repeat-penalty", type=real(0.01, 100), default=1.0, help="1 for none (default 1)")
    p.add_argument("--repeat-last-n", type=whole(-1), default=64, help="tokens it looks back at, -1 for all (default 64)")
    p.add_argument("-s", "--seed", type=whole(-1, (1 << 63) - 1), default=-1, help="the same seed, the same text")
    p.add_argument("--ignore-eos", action="store_true", help="never let the model end: its end tokens are not taken")
    p.add_argument("--no-display-prompt", action="store_true", help="print only what the model makes")
    add_bus(p)
    add_security(p)
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.cluster is not None:
        apply_cluster(args, require_file(args.cluster))
    prompt = expanded(args.prompt) if args.prompt is not None and args.escape else args.prompt
    g = GGUF(model_path(args))
    vocabulary = Vocabulary(g)
    with open_session(args, g) as s:
        if len(vocabulary.tokens) != s.arch.hp.n_vocab:
            raise FormatError(f"{s.arch.gguf.path.name}: {len(vocabulary.tokens)} tokens in the vocabulary, "
                              f"{s.arch.hp.n_vocab} rows in token_embd.weight")  # fmt: skip
        params = SamplingParams(
            args.temp, args.top_k, args.top_p, args.min_p, args.repeat_penalty, args.repeat_last_n,
            chosen_seed(args.seed), vocabulary.suppressed | (vocabulary.end_ids if args.ignore_eos else frozenset()),
        )  # fmt: skip
        engine = Engine(s.runner, vocabulary.end_ids, args.batch_size)
        try:
            if prompt is not None:
                _answer(args, engine, vocabulary, params, prompt)
            else:
                chat(args, engine, vocabulary, params)
        finally:
            _print_timings(s, engine)
    return 0


def _answer(
    args: argparse.Namespace, engine: Engine, vocabulary: Vocabulary, params: SamplingParams, prompt: str
) -> None:
    prompt = well_formed(prompt)
    engine.start(vocabulary.encode(prompt), params)
    if not args.no_display_prompt:
        print(for_stream(prompt, sys.stdout), end="", flush=True)
    _stream(args, engine, vocabulary)
    print(flush=True)


def _stream(args: argparse.Namespace, engine: Engine, vocabulary: Vocabulary) -> str:
    decoder, text = StreamDecoder(vocabulary), []
    for token in engine.generate(args.n_predict):
        piece = decoder.feed(token)
        text.append(piece)
        print(for_stream(piece, sys.stdout), end="", flush=True)
    rest = decoder.finish()
    print(rest, end="", flush=True)
    return "".join([*text, rest])


def _print_timings(s: Session, engine: Engine) -> None:
    t = engine.timings
    print_summary(s)
    for name, n, seconds in (("prefill", t.prefill_tokens, t.prefill_s), ("decode", t.decode_tokens, t.decode_s)):
        rate = f"{n / seconds:.1f} tokens/s" if seconds else "-"
        print(f"{name:7} {seconds:8.2f} s  {n} tokens, {rate}", file=sys.stderr)
