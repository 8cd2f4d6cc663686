"""`ggmq serve`: models over HTTP, for many at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.terminal import print_line
from ggmq.cli import foreign
from ggmq.cli.clusterfile import apply_cluster
from ggmq.cli.options import add_prompt_cache, add_security, add_speculation, real, require_file, text_of, whole
from ggmq.cli.progress import progress_bars
from ggmq.cli.run import add_bus, add_sampling, sampling_params
from ggmq.cli.session import engine_of, model_config, note
from ggmq.engine import Engine
from ggmq.log import LEVELS, Log
from ggmq.model import Model, ModelConfig
from ggmq.tokenizer import Vocabulary
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from ggmq.server.options import ServerOptions

MIB = 1 << 20


def add(commands: Any) -> None:
    p = commands.add_parser("serve", help="answer many clients over HTTP", description="""Serve models over HTTP: OpenAI's
        and Anthropic's APIs, llama-server's routes, and a page to chat on. Options that are run's mean what they mean there,
        and hold where a request says nothing.""")  # fmt: skip
    p.stray = "give models with -m FILE or -hf USER/REPO"
    p.add_argument("-m", "--model", type=Path, action="append", metavar="FILE",
                   help="GGUF file (default: the bundled story model); several times for several models")  # fmt: skip
    p.add_argument("-hf", "-hfr", "--hf-repo", action="append", metavar="USER/REPO[:QUANT]",
                   help="model of the Hugging Face hub, downloaded once; several times for several")  # fmt: skip
    p.add_argument("-a", "--alias", action="append", metavar="NAME",
                   help="name of a model in the APIs, in the order of the models (default: the file's)")  # fmt: skip
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this host only)")
    p.add_argument("--port", type=whole(0, 65535), default=8080, help="0 for a free one (default 8080)")
    p.add_argument("-np", "--parallel", type=whole(1, 256), default=4, metavar="SLOTS",
                   help="answers that are made at once, each with a context of -c tokens (default 4)")  # fmt: skip
    p.add_argument("--queue", type=whole(1, 1 << 16), default=256, metavar="N",
                   help="requests that may wait for a slot; more are told to come back (default 256)")  # fmt: skip
    p.add_argument("--api-key", action="append", metavar="KEY[,KEY]", help="clients must send one of these")
    p.add_argument("--api-key-file", metavar="FILE", help="a file with such keys, one a line")
    p.add_argument("--cors-origin", action="append", metavar="URL",
                   help="let pages of this origin ask (`*`: of any); several times for several (default: none)")  # fmt: skip
    p.add_argument("--max-body", type=whole(1, 1024), default=16, metavar="MIB", help="size of a request (default 16)")
    p.add_argument("-to", "--timeout", type=real(0.1, 3600), default=30.0, metavar="SECONDS",
                   help="how long a client may take to send a request, or to take what is sent (default 30)")  # fmt: skip
    p.add_argument("--max-connections", type=whole(1, 1 << 16), default=512, metavar="N", help="open at once (default 512)")
    p.add_argument("--log-level", choices=list(LEVELS), default="info", help="events to write from (default info)")
    p.add_argument("--cluster", type=Path, metavar="FILE", help="use the cluster that `ggmq up FILE` started")
    add_sampling(p)
    add_speculation(p)
    add_prompt_cache(p)
    add_bus(p)
    add_security(p)
    p.foreign = {name: f for name, f in foreign.SERVE.items() if name not in p._option_string_actions}
    p.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from ggmq.server.app import make_app
    from ggmq.server.counts import Metrics
    from ggmq.server.listening import bound_socket, serve, url_of
    from ggmq.serving import serving

    options = _options(args)
    configs = _configs(args)
    names = _names(args, configs)
    log, metrics = Log(args.log_level), Metrics()

    def told(event: str, **figures: Any) -> None:
        log.told(event, **figures)
        metrics.told(event, **figures)

    try:
        with (
            bound_socket(args.host, args.port) as listening,
            serving(configs, names, n_queue=args.queue, engine=_engine(args), progress=progress_bars, note=note,
                    told=told) as (services, watch),
        ):  # fmt: skip
            app = make_app(services, options, lambda: watch.picture, log, metrics)
            serve(app, listening, options, lambda: print_line(f"serving {', '.join(services)} at {url_of(listening)}"))
    finally:
        log.close()
    return 0


def _engine(args: argparse.Namespace) -> Callable[[Model, Vocabulary], Engine]:
    return lambda model, vocabulary: engine_of(args, model, vocabulary)


def _configs(args: argparse.Namespace) -> list[ModelConfig]:
    """One for each model. Errors: ConfigError, and what a download raises."""
    if args.cluster is not None:
        cluster = argparse.Namespace(**{**vars(args), "model": (args.model or [None])[0], "hf_repo": args.hf_repo})
        apply_cluster(cluster, require_file(args.cluster))
        vars(args).update({**vars(cluster), "model": args.model or ([cluster.model] if cluster.model else None)})
    each = [(path, None) for path in args.model or ()] + [(None, name) for name in args.hf_repo or ()] or [(None, None)]
    return [model_config(argparse.Namespace(**{**vars(args), "model": path, "hf_repo": repo}), n_seq=args.parallel,
                         n_batch=args.batch_size) for path, repo in each]  # fmt: skip


def _names(args: argparse.Namespace, configs: Sequence[ModelConfig]) -> list[str]:
    """Errors: ConfigError for names that are no names, or more than there are models."""
    names = list(args.alias or ())
    if len(names) > len(configs):
        raise ConfigError(f"--alias {names[len(configs)]}: expected at most one for each of {len(configs)} models")
    if len(set(names)) != len(names):
        raise ConfigError("--alias: expected a name of its own for each model")
    for name in names:
        if not re.fullmatch(r"[!-~]{1,128}", name):
            raise ConfigError(f"--alias {name!r}: expected up to 128 characters of ASCII without blanks")
    return names


def _options(args: argparse.Namespace) -> ServerOptions:
    """Errors: ConfigError for a server that everyone could reach and use, and for keys and origins that are none."""
    from ggmq.server.options import ServerOptions, digest_of, is_loopback

    keys = [k for part in args.api_key or () for k in part.split(",") if k]
    if args.api_key_file is not None:
        lines = text_of("--api-key-file", args.api_key_file).splitlines()
        keys += [k for line in lines if (k := line.strip()) and not k.startswith("#")]
    if (args.api_key or args.api_key_file is not None) and not keys:
        raise ConfigError("--api-key: expected at least one key, and there is none")
    if not keys and not is_loopback(args.host) and not args.insecure:
        raise ConfigError(f"--host {args.host}: whoever reaches this address could use the models; ask for a key with "
                          "--api-key or --api-key-file, or say --insecure")  # fmt: skip
    for origin in args.cors_origin or ():
        if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:_-]+", origin):
            raise ConfigError(f"--cors-origin {origin}: expected an origin such as https://example.com, or *")
    return ServerOptions(
        host=args.host, keys=frozenset(map(digest_of, keys)), cors_origins=frozenset(args.cors_origin or ()),
        max_body_bytes=args.max_body * MIB, timeout_s=args.timeout, max_connections=args.max_connections,
        params=sampling_params(args), n_predict=args.n_predict, enable_thinking=args.reasoning != "off",
        ignore_eos=args.ignore_eos,
    )  # fmt: skip
