"""`ggmq bench`: how fast a model runs on these devices, in llama-bench's words."""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from config.terminal import safe_line
from ggmq.cli import foreign
from ggmq.cli.options import add_model, add_security, whole
from ggmq.cli.run import add_bus
from ggmq.cli.session import MIB, model_config, open_session, stage_line
from ggmq.engine import Engine
from ggmq.measure import WARM_TOKENS, first_token, measure


def add(commands: Any) -> None:
    about = "Measure prefill and decode of a model, alone or with several sequences."
    p = commands.add_parser("bench", help="rates of a model on these devices", description=about)
    p.foreign = foreign.RUN
    add_model(p)
    p.add_argument("-p", "--n-prompt", type=whole(1), default=512, help="tokens of the prompt (default 512)")
    p.add_argument("-n", "--n-gen", type=whole(1), default=128, help="tokens to generate (default 128)")
    p.add_argument("-d", "--n-depth", type=whole(0), default=0, help="tokens in the cache before generating")
    p.add_argument("--streams", type=whole(1, 256), default=1, help="sequences that generate at once (default 1)")
    p.add_argument("-r", "--repetitions", type=whole(1, 1000), default=3, help="medians of so many runs (default 3)")
    p.add_argument("-o", "--output", choices=["md", "json"], default="md", help="table or JSON (default md)")
    add_bus(p)
    add_security(p)
    p.set_defaults(run=_bench, workers=None)


def _bench(args: argparse.Namespace) -> int:
    n_made = args.n_gen + WARM_TOKENS + 2
    n_ctx = max(args.ctx_size, -(-(max(args.n_prompt, args.n_depth) + n_made) // 32) * 32)
    with open_session(model_config(args, n_ctx, args.streams)) as model:
        engine = Engine(model)
        first_token_s = first_token(engine)
        runs = [measure(engine, args.n_prompt, args.n_gen, args.n_depth, args.streams) for _ in range(args.repetitions)]
        report, stages = model.report, [stage.assignment for stage in model.stages]
        rss = [model.client.stats(a.device).rss_bytes for a in stages]
        result = {
            "model": model.arch.gguf.path.name, "n_prompt": args.n_prompt, "n_gen": args.n_gen, "n_depth": args.n_depth,
            "streams": args.streams, "repetitions": args.repetitions, "workers": len(stages),
            "threads": [model.infos[a.device].n_threads for a in stages],
            **{key: statistics.median(getattr(r, key) for r in runs) for key in runs[0].__slots__},
            "load_s": model.load_s, "load_and_token_s": model.load_s + first_token_s,
            "sent_bytes": report.sent_bytes, "cached_bytes": report.cached_bytes, "kept_bytes": report.kept_bytes,
            "fetched_bytes": report.fetched_bytes,
            "worker_rss_bytes": sum(rss), "weights_and_kv_bytes": sum(a.weight_bytes + a.kv_bytes for a in stages),
        }  # fmt: skip
        lines = [safe_line(stage_line(model.infos, a)) for a in stages]
    print(json.dumps(result) if args.output == "json" else _table(result, lines))
    return 0


def _table(r: dict[str, Any], stages: list[str]) -> str:
    depth = f" @ d{r['n_depth']}" if r["n_depth"] else ""
    streams = f" x {r['streams']}" if r["streams"] > 1 else ""
    counted = ("sent_bytes", "cached_bytes", "worker_rss_bytes", "weights_and_kv_bytes")
    sent, cached, rss, held = (r[key] / MIB for key in counted)
    rows = [
        (f"pp{r['n_prompt']}", f"{r['prefill_tok_s']:.1f} t/s"),
        (f"tg{r['n_gen']}{streams}{depth}", f"{r['decode_tok_s']:.1f} t/s"),
        ("load", f"{r['load_s']:.2f} s, {sent:.1f} MiB sent, {cached:.1f} MiB from caches or files"),
        ("load and one token", f"{r['load_and_token_s']:.2f} s"),
        ("bytes a token on the wire", f"{r['wire_bytes_per_token']:.0f}, of which {r['handed_bytes_per_token']:.0f} "
                                      "from worker to worker"),
        ("round trips a token", f"{r['round_trips_per_token']:.2f}"),
        ("worker memory", f"{rss:.0f} MiB for {held:.0f} MiB of weights and KV"),
    ]  # fmt: skip
    out = [f"| {safe_line(r['model'])} | median of {r['repetitions']} |", "|---|---|"]
    out += [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([*out, *(f"layers {line}" for line in stages)])
