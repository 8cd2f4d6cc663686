"""From options to a model that is loaded and ready, and what is said of it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from config.terminal import print_line
from ggmq.bus import BusConfig
from ggmq.cli.options import keys_of, model_path, require_file
from ggmq.cli.progress import progress_bars
from ggmq.draftmodel import check_same, load_draft
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.model import Model, ModelConfig, load
from ggmq.placement import Assignment
from ggmq.tokenizer import Vocabulary
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.errors import ConfigError, WorkerLost

MIB = 1 << 20


def bus_config(args: argparse.Namespace) -> BusConfig:
    """The devices that the options describe. Errors: ConfigError for keys that are not there."""
    return BusConfig(
        broker=args.broker or "", cluster_id=getattr(args, "cluster_id", b""),
        worker_order=getattr(args, "worker_order", ()), rpc=args.rpc or (), workers=args.workers, device=args.device,
        worker_mem=args.worker_mem or (), threads=args.threads, pin=args.pin, cache=args.cache, keys=keys_of(args),
    )  # fmt: skip


def model_config(args: argparse.Namespace, n_ctx: int = 0, n_seq: int = 1, n_batch: int = 512) -> ModelConfig:
    """The model that the options describe, with room for `n_seq` sequences. n_ctx: of each, in place of the option's."""
    return ModelConfig(
        path=model_path(args), ctx_size=n_ctx or args.ctx_size, n_seq=n_seq, n_batch=n_batch, tensor_split=args.tensor_split,
        ngl=args.ngl, activations=GGMLType[args.activations.upper()], cache_type_k=GGMLType[args.cache_type_k.upper()],
        cache_type_v=GGMLType[args.cache_type_v.upper()], prompt_cache=getattr(args, "prompt_cache", None),
        prompt_cache_bytes=getattr(args, "prompt_cache_mib", 0) * MIB, patience_s=getattr(args, "wait", None),
        bus=bus_config(args),
    )  # fmt: skip


@contextlib.contextmanager
def open_session(config: ModelConfig, file: GGUF | None = None) -> Iterator[Model]:
    """The model, loaded, with bars while it is. Everything ends with the block. file: as `load`'s."""
    with load(config, progress_bars, note, file) as model:
        yield model


def check_speculation(args: argparse.Namespace, vocabulary: Vocabulary) -> None:
    """Before anything is loaded. Errors: as `_draft_path`'s; ConfigError for another vocabulary; FormatError."""
    path = _draft_path(args)
    if path is not None:
        check_same(vocabulary, Vocabulary(GGUF(path)))


def engine_of(args: argparse.Namespace, model: Model, vocabulary: Vocabulary) -> Engine:
    """The engine that the options describe. Errors: as `_draft_path`'s, and what loading a draft model raises."""
    path = _draft_path(args)
    draft = load_draft(path, model, vocabulary) if path is not None else None
    return Engine(model, vocabulary.end_ids, args.batch_size, args.spec, draft, told=_tell)


def _tell(event: str, **figures: Any) -> None:
    """What becomes of workers meanwhile."""
    match event:
        case "worker lost":
            if isinstance(figures["error"], WorkerLost):
                note(f"{figures['error']}; others are to take its place")
        case "recovered":
            note(f"all layers are there again, after {figures['seconds']:.1f} s")
        case "moved":
            note("layers have moved to other workers")


def _draft_path(args: argparse.Namespace) -> Path | None:
    """The file of the model that drafts, if one is to. Errors: ConfigError for one that is not named, or not there."""
    if args.spec == "draft" and args.spec_draft_model is None:
        raise ConfigError("--spec draft: expected a model that guesses; name its file with --spec-draft-model")
    wanted = args.spec_draft_model is not None and args.spec in ("auto", "draft")
    return require_file(args.spec_draft_model) if wanted else None


def note(text: str) -> None:
    """Something that a user should know while it lasts."""
    print_line(f"note    {text}", file=sys.stderr)


def print_summary(model: Model) -> None:
    """One line for the load, one for each stage."""
    r = model.report
    sent, found = f"{r.sent_bytes / MIB:.1f} MiB sent", f"{r.cached_bytes / MIB:.1f} MiB from caches or files"
    if r.fetched_bytes:
        found += f", {r.fetched_bytes / MIB:.1f} MiB from other workers"
    kept = f", {r.kept_bytes / MIB:.1f} MiB there from a run before" if r.kept_bytes else ""
    print(f"load    {model.ready_s:8.2f} s  {sent}, {found}{kept}", file=sys.stderr)
    if len(model.stages) > 1 and not model.direct:
        print("note    activations pass through the broker: not every worker has reached the next one", file=sys.stderr)
    for stage in model.stages:
        print_line("layers  " + stage_line(model.infos, stage.assignment), file=sys.stderr)


def stage_line(infos: Sequence[m.ListedDevice], a: Assignment) -> str:
    """Where some layers are: `0-7 (+ embedding) on host CPU, 1.6 MiB weights, 0.5 MiB KV`."""
    d = infos[a.device]
    ends = [name for name, there in (("embedding", a.first), ("output", a.last)) if there]
    extra = f" + {' + '.join(ends)}" if ends else ""
    return (f"{a.layers.start}-{a.layers.stop - 1}{extra} on {d.worker} {d.name} (device {a.device}), "
            f"{a.weight_bytes / MIB:.1f} MiB weights, {a.kv_bytes / MIB:.1f} MiB KV cache")  # fmt: skip
