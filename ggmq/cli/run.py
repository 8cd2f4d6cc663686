"""`ggmq run`: a prompt answered, or a chat in the terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from config.terminal import for_stream
from ggmq.chat import ChatTemplate, Message
from ggmq.cli import foreign
from ggmq.cli.chatting import chat, note_full
from ggmq.cli.clusterfile import apply_cluster
from ggmq.cli.options import (
    add_model,
    add_prompt_cache,
    add_security,
    add_speculation,
    endpoint,
    endpoints,
    expanded,
    layers,
    real,
    require_file,
    shares,
    text_of,
    whole,
)
from ggmq.cli.session import check_speculation, engine_of, model_config, note, open_session, print_summary
from ggmq.engine import Engine, chosen_seed
from ggmq.gguf import GGUF
from ggmq.keeping import PATIENCE_S
from ggmq.sampling import SamplingParams
from ggmq.service import MEND_S
from ggmq.tokenizer import StreamDecoder, Vocabulary, well_formed
from protocol.errors import ConfigError


def add_bus(p: argparse.ArgumentParser) -> None:
    """Options that say which devices take part."""
    p.add_argument("--rpc", type=endpoints, metavar="HOST:PORT,...", help="workers that listen on other hosts")
    p.add_argument("--broker", type=endpoint, metavar="ENDPOINT", help="a broker that runs elsewhere (tcp://HOST:PORT)")
    p.add_argument("--workers", type=whole(0, 64),
                   help="local workers (default: 1, as many as --worker-mem names, or none with --rpc)")  # fmt: skip
    p.add_argument("-dev", "--device", default="CPU", help="device of the local workers (default CPU)")
    p.add_argument("--worker-mem", type=lambda t: [whole(1)(x) for x in t.split(",")], metavar="MIB,...",
                   help="memory that each local worker lends (default: what is free)")  # fmt: skip
    p.add_argument("-t", "--threads", type=whole(1, 1024), default=0,
                   help="threads of the local workers together (default: all cores)")  # fmt: skip
    p.add_argument("--pin", action="store_true", help="keep each thread of the local workers on a CPU of its own")
    p.add_argument("--cache", action="store_true", help="local workers keep weights in a cache instead of reading the file")
    p.add_argument("--wait", type=real(0.1, 86_400), metavar="SECONDS",
                   help="wait so long for lost workers, or a broker that has gone, where nobody takes their place "
                   f"(default {PATIENCE_S:g}; `ggmq serve`: {MEND_S:g})")  # fmt: skip
    p.add_argument("-ngl", "--n-gpu-layers", "--gpu-layers", dest="ngl", type=layers, metavar="N",
                   help="layers on the lent devices; the first others stay on this host (default: all)")  # fmt: skip
    p.add_argument("-ts", "--tensor-split", type=shares, metavar="A,B,...",
                   help="shares of the layers, a device each (default: by free memory)")  # fmt: skip
    p.add_argument("--activations", choices=["f32", "f16"], default="f32",
                   help="what crosses from stage to stage; f16 halves the bytes and changes the text a little, for models "
                   "whose hidden states stay below 65504 (default f32)")  # fmt: skip
    for which, name in (("k", "keys"), ("v", "values")):
        p.add_argument(f"-ct{which}", f"--cache-type-{which}", choices=["f16", "q8_0"], default="f16",
                       help=f"type of the {name} in the KV cache; q8_0 takes half the memory (default f16)")  # fmt: skip
    p.add_argument("-c", "--ctx-size", type=whole(0, 1 << 24), default=0,
                   help="context in tokens (default: the model's, at most 4096)")  # fmt: skip


def add_sampling(p: argparse.ArgumentParser) -> None:
    """Options that say how tokens are taken, and how many."""
    p.add_argument("-rea", "--reasoning", choices=["on", "off", "auto"], default="auto",
                   help="have the model think first in a chat, if its template can choose (default auto: on)")  # fmt: skip
    p.add_argument("-n", "--predict", "--n-predict", dest="n_predict", type=whole(-1), default=-1,
                   help="tokens to make (default: until the model ends)")  # fmt: skip
    p.add_argument("-b", "--batch-size", type=whole(1, 4096), default=512, help="prompt tokens at once (default 512)")
    p.add_argument("--temp", "--temperature", type=real(0, 100), default=0.8, help="temperature, 0 is greedy (default 0.8)")
    p.add_argument("--top-k", type=whole(0), default=40, help="0 for all (default 40)")
    p.add_argument("--top-p", type=real(0, 1), default=0.95, help="(default 0.95)")
    p.add_argument("--min-p", type=real(0, 1), default=0.05, help="(default 0.05)")
    p.add_argument("--repeat-penalty", type=real(0.01, 100), default=1.0, help="1 for none (default 1)")
    p.add_argument("--repeat-last-n", type=whole(-1), default=64, help="tokens it looks back at, -1 for all (default 64)")
    p.add_argument("-s", "--seed", type=whole(-1, (1 << 63) - 1), default=-1, help="the same seed, the same text")
    p.add_argument("--ignore-eos", action="store_true", help="never let the model end: its end tokens are not taken")


def sampling_params(args: argparse.Namespace, banned: frozenset[int] = frozenset()) -> SamplingParams:
    """What `add_sampling`'s options say."""
    return SamplingParams(args.temp, args.top_k, args.top_p, args.min_p, args.repeat_penalty, args.repeat_last_n,
                          chosen_seed(args.seed), banned)  # fmt: skip


def add(commands: Any) -> None:
    p = commands.add_parser("run", help="answer a prompt, or chat", description="""Answer a prompt (-p, -f, or what comes
        through a pipe); without one, chat in the terminal. A model with a chat template is asked as its template has it, and
        a chat goes on after -p when this is a terminal; any other model continues the text.""")  # fmt: skip
    p.foreign = foreign.RUN
    p.stray = "give the model with -m FILE or -hf USER/REPO, the prompt with -p TEXT"
    add_model(p)
    p.add_argument("--cluster", type=Path, metavar="FILE", help="use the cluster that `ggmq up FILE` started")
    p.add_argument("-p", "--prompt", help="the prompt; without it a chat begins, or standard input, if that is no terminal, "
                   "is the prompt")  # fmt: skip
    p.add_argument("-f", "--file", metavar="FILE", help="take the prompt from a file, or from standard input (-), without "
                   "the newline at its end")  # fmt: skip
    p.add_argument("-e", "--escape", action=argparse.BooleanOptionalAction, default=True,
                   help=r"expand \n, \r, \t, \', \", \\ and \xHH in a prompt, a file's or pipe's too "
                   "(the default)")  # fmt: skip
    p.add_argument("-cnv", "--conversation", action="store_const", const=True,
                   help="use a chat template (the default for a model that has one; ChatML for one without); what comes "
                   "through a pipe is a chat then, a line each turn")  # fmt: skip
    p.add_argument("-no-cnv", "--no-conversation", "--raw", dest="conversation", action="store_const", const=False,
                   help="use no chat template: the model continues the text")  # fmt: skip
    p.add_argument("-st", "--single-turn", action="store_true", help="end after one answer")
    p.add_argument("-sys", "--system-prompt", default="", help="system message, taken as it is")
    p.add_argument("-sysf", "--system-prompt-file", metavar="FILE",
                   help="take the system message from a file, without the newline at its end")  # fmt: skip
    add_sampling(p)
    p.add_argument("--no-display-prompt", action="store_true",
                   help="print only what the model makes; as it is with a chat template")  # fmt: skip
    add_speculation(p)
    add_prompt_cache(p)
    add_bus(p)
    add_security(p)
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.cluster is not None:
        apply_cluster(args, require_file(args.cluster))
    prompt = _prompt(args)
    if args.system_prompt_file is not None:
        if args.system_prompt:
            raise ConfigError("-sys and -sysf both give the system message; leave one of them out")
        args.system_prompt = text_of("-sysf", args.system_prompt_file)
    config = model_config(args, n_batch=args.batch_size)
    file = GGUF(config.path)
    vocabulary = Vocabulary(file)
    template = _template(args, vocabulary)
    check_speculation(args, vocabulary)
    with open_session(config, file) as model:
        hp = model.arch.hp
        vocabulary.check_rows(hp.n_vocab)
        if args.ctx_size > hp.n_ctx_train:
            note(f"-c {args.ctx_size}: {config.path.name} was trained with a context of {hp.n_ctx_train} tokens; "
                 "beyond that its text may make no sense")  # fmt: skip
        params = sampling_params(args, vocabulary.suppressed | (vocabulary.end_ids if args.ignore_eos else frozenset()))
        engine = engine_of(args, model, vocabulary)
        terminal = sys.stdin.isatty() and sys.stdout.isatty() and args.file != "-"
        goes_on = template is not None and terminal and not args.single_turn
        try:
            if prompt is None or goes_on:
                chat(args, engine, vocabulary, params, template, prompt)
            else:
                _answer(args, engine, vocabulary, params, template, prompt)
        finally:
            if not isinstance(sys.exception(), OSError):  # where text cannot be written, figures are only in the way
                _print_timings(engine)
            engine.close()
    return 0


def _prompt(args: argparse.Namespace) -> str | None:
    """The one prompt that the options or a pipe give; None for a chat. Errors: ConfigError when there are two, or none."""
    if args.prompt is not None and args.file is not None:
        raise ConfigError("-p and -f both give the prompt; leave one of them out")
    if args.prompt is not None:
        text = args.prompt
    elif args.file is not None:
        text = text_of("-f", args.file)
    elif sys.stdin.isatty() or args.conversation:
        return None
    else:
        text = text_of("-f", "-")
        if not text:
            raise ConfigError("no prompt: standard input is empty; give one with -p TEXT or -f FILE")
    return well_formed(expanded(text) if args.escape else text)


def _template(args: argparse.Namespace, vocabulary: Vocabulary) -> ChatTemplate | None:
    """The chat template to ask with; None where the model continues a text.

    Errors: ConfigError for a system message without a template, what ChatTemplate raises.
    """
    has_one = bool(vocabulary.chat_template)
    if args.conversation or (args.conversation is None and has_one):
        if not has_one:
            note(f"{vocabulary.name} has no chat template: ChatML is used, which it may not know")
        return ChatTemplate(vocabulary)
    if args.system_prompt:
        what = ("-no-cnv (--raw) uses no chat template; leave one of the two out" if has_one else
                f"{vocabulary.name} has no chat template, so there is no place for it; put it into the prompt, or use "
                "ChatML with -cnv")  # fmt: skip
        raise ConfigError(f"-sys: a system message is part of a chat template: {what}")
    return None


def _answer(
    args: argparse.Namespace,
    engine: Engine,
    vocabulary: Vocabulary,
    params: SamplingParams,
    template: ChatTemplate | None,
    prompt: str,
) -> None:
    """Answer one question, or continue one text, and print it."""
    text = prompt
    if template is not None:
        messages = [*_system(args), {"role": "user", "content": prompt}]
        text = template.render(messages, enable_thinking=args.reasoning != "off")
    engine.start(vocabulary.encode(text), params)
    if template is None and not args.no_display_prompt:
        print(for_stream(prompt, sys.stdout), end="", flush=True)
    _stream(args, engine, vocabulary)
    print(flush=True)
    note_full(engine)


def _system(args: argparse.Namespace) -> list[Message]:
    """What a conversation begins with."""
    return [{"role": "system", "content": well_formed(args.system_prompt)}] if args.system_prompt else []


def _stream(args: argparse.Namespace, engine: Engine, vocabulary: Vocabulary) -> None:
    decoder = StreamDecoder(vocabulary)
    for token in engine.generate(args.n_predict):
        print(for_stream(decoder.feed(token), sys.stdout), end="", flush=True)
    print(decoder.finish(), end="", flush=True)


def _print_timings(engine: Engine) -> None:
    t = engine.timings
    print_summary(engine.model)
    for name, n, seconds in (("prefill", t.prefill_tokens, t.prefill_s), ("decode", t.decode_tokens, t.decode_s)):
        rate = f"{n / seconds:.1f} tokens/s" if seconds else "-"
        print(f"{name:7} {seconds:8.2f} s  {n} tokens, {rate}", file=sys.stderr)
    if t.n_drafted:
        print(f"drafts  {t.n_accepted} of {t.n_drafted} guessed tokens were right", file=sys.stderr)
