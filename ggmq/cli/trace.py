"""`ggmq trace`: some tokens of a model, and a file that shows every hop, queue, step and kernel that they took."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from config.terminal import print_line, safe_line
from ggmq.cli import foreign
from ggmq.cli.clusterfile import apply_cluster
from ggmq.cli.options import add_model, add_security, require_file, whole
from ggmq.cli.run import add_bus
from ggmq.cli.session import model_config, open_session
from ggmq.gguf import GGUF
from ggmq.model import Model
from ggmq.perfetto import StageNames, between_tokens_s, events, kernels_of_a_token, parts_of_a_token
from ggmq.sampling import SamplingParams
from ggmq.tokenizer import Vocabulary
from ggmq.tracing import Trace, Tracing
from protocol import limits

N_KERNELS = 12
"""Rows of the table of kernels."""


def add(commands: Any) -> None:
    about = """Make some tokens as `run` does, and write what took part in them, from the engine to the kernels.
        The tokens are made once before, so that nothing is compiled or warmed up in what is shown."""
    p = commands.add_parser("trace", help="a file that shows where a token's time goes", description=about)
    p.foreign = foreign.RUN
    add_model(p)
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write, as *.json")
    p.add_argument("--cluster", type=Path, metavar="FILE", help="use the cluster that `ggmq up FILE` started")
    p.add_argument("-p", "--prompt", default="Once upon a time", help="the prompt (default %(default)r)")
    p.add_argument("-n", "--predict", "--n-predict", dest="n_predict", type=whole(1, 256), default=16,
                   help="tokens to make, greedily (default 16)")  # fmt: skip
    p.add_argument("--streams", type=whole(1, 64), default=1, help="sequences that make them at once (default 1)")
    p.add_argument("-b", "--batch-size", type=whole(1, 4096), default=512, help="prompt tokens at once (default 512)")
    add_bus(p)
    add_security(p)
    p.set_defaults(run=_trace)


def _trace(args: argparse.Namespace) -> int:
    if args.cluster is not None:
        apply_cluster(args, require_file(args.cluster))
    config = model_config(args, n_seq=args.streams, n_batch=args.batch_size)
    file = GGUF(config.path)
    vocabulary = Vocabulary(file)
    tokens = vocabulary.encode(args.prompt)
    with open_session(config, file) as model:
        trace, graphs = traced(model, vocabulary, tokens, args.n_predict, args.streams, args.batch_size)
        stages = [StageNames(_title(model, i), s.placed, s.memory) for i, s in enumerate(model.stages)]
    found = events(trace, stages, graphs)
    with args.output.open("w", encoding="utf-8") as f:
        json.dump({"traceEvents": found, "displayTimeUnit": "ns"}, f, separators=(",", ":"))
    _print(args.output, trace, [s.title for s in stages], len(found))
    return 0


def traced(
    model: Model, vocabulary: Vocabulary, tokens: list[int], n_predict: int, n_streams: int = 1, n_batch: int = 512
) -> tuple[Trace, list[list[Any]]]:
    """What `n_streams` sequences took to make `n_predict` tokens each, and the graphs of each stage, a batch each.

    Errors: FormatError for a prompt that does not fit; what the workers report.
    """
    tracing = Tracing(model)
    engine = tracing.engine(n_batch)
    params = SamplingParams(temperature=0, banned=vocabulary.suppressed | vocabulary.end_ids)
    n_vocab = len(vocabulary.tokens)
    for shift in (1, 0):  # the first time only to have all shapes compiled; nothing of it is found again the second time
        if not shift:
            tracing.begin(limits.MAX_TRACED_COMPUTES)
        for stream in range(n_streams):
            engine.add([*((t + shift) % n_vocab for t in tokens[:-1]), (tokens[-1] + shift + stream) % n_vocab], params,
                       n_predict)  # fmt: skip
        while engine.busy:
            engine.step()
    trace = tracing.end()
    built = {(sent.under_way.batch, i): None for sent in trace.sent for i in range(len(model.stages))}
    graphs = {key: model.arch.build(s.stage, s.placed, s.memory, key[0])[0]
              for key in built for s in [model.stages[key[1]]]}  # fmt: skip
    return trace, [[graphs[sent.under_way.batch, i] for sent in trace.sent] for i in range(len(model.stages))]


def _title(model: Model, i: int) -> str:
    a = model.stages[i].assignment
    d = model.infos[a.device]
    return safe_line(f"{d.worker} {d.name}, layers {a.layers.start}-{a.layers.stop - 1}")


def _print(output: Path, trace: Trace, stages: list[str], n_events: int) -> None:
    parts = parts_of_a_token(trace, stages)
    total = sum(s for _, s in parts)
    n = sum(s.decodes for s in trace.sent)
    print(f"a token's time, mean of {n} steps, {total * 1e3:.3f} ms (median {between_tokens_s(trace) * 1e3:.3f} ms):")
    for name, seconds in parts:
        print_line(f"  {seconds * 1e3:9.3f} ms {100 * seconds / total:5.1f} %  {name}")
    kernels = kernels_of_a_token(trace)
    if kernels:
        print("of the graphs, by kernel:")
    for title, seconds, count in kernels[:N_KERNELS]:
        print_line(f"  {seconds * 1e3:9.3f} ms {100 * seconds / total:5.1f} %  {title}, {count:.0f} steps")
    if len(kernels) > N_KERNELS:
        rest = sum(s for _, s, _ in kernels[N_KERNELS:])
        print(f"  {rest * 1e3:9.3f} ms {100 * rest / total:5.1f} %  {len(kernels) - N_KERNELS} others")
    if trace.n_dropped:
        print(f"note: {trace.n_dropped} computes came after there was no more room, and are not in it")
    print_line(f"{output}: {n_events} events; open it at https://ui.perfetto.dev")
