"""Logits of random models against libllama's: optional tensors, keys present and absent, files that should be refused."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ggmq.archs import open_arch
from ggmq.cluster import Client, LocalBus
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from protocol.errors import GgmqError
from tests.peer.libllama import Peer, PeerCrashed, PeerRefused
from tests.support.fixtures import nmse
from tests.support.loaded import loaded
from tests.support.random_models import ARCHS, BF16, Model, fingerprint, folded, numbered, write

BOUNDS = {False: (1e-5, 1e-4), True: (3e-4, 3e-3)}
"""Normalised mean squared error of all logits, and of a position's: with weights of F32 and F16, and where some are BF16,
whose products llama.cpp takes with activations rounded to BF16."""
TRIES = 4
EDGE = 1e-3
"""Where experts are chosen, two may be so near that rounding chooses: most tokens are then within this, in one of TRIES."""
CONTEXTS = (256, 512, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="architectures, by commas")
    parser.add_argument("--at", type=int, help="only the model of this number")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the files that differ here")
    parser.add_argument("--refused", action="store_true", help="print what both refuse, too")
    parser.add_argument("--record", type=Path, metavar="FILE.npz", help="write what tests/ggmq/test_archs.py holds against")
    parser.add_argument("--device", default="CPU", help="CPU or reference (default CPU)")


def run(args: argparse.Namespace) -> int:
    """Compare; 0 when nothing differs but by choice."""
    archs = args.only.split(",") if args.only else ARCHS
    counts: Counter[str] = Counter()
    started = LocalBus()
    said = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Peer() as peer:
        try:
            for _ in range(2):
                started.spawn(args.device, 1)
            client = started.start()
            if args.record:
                return _record(args, client, peer, Path(folder))
            for i in range(args.n) if args.at is None else [args.at]:
                m, rng = numbered(args.seed, i, archs)
                verdict, details = compare(client, peer, m, rng, Path(folder))
                counts[verdict] += 1
                if verdict.startswith("DIFFERENT") or (args.refused and verdict.startswith("refused")):
                    print(f"{i}: {verdict}: {m.arch}: {', '.join(m.done) or 'plain'}\n    {details}", flush=True)
                    if args.keep and verdict.startswith("DIFFERENT"):
                        args.keep.mkdir(parents=True, exist_ok=True)
                        write(args.keep / f"{args.seed}-{i}.gguf", m)
                if time.monotonic() - said > 30:
                    said = time.monotonic()
                    print(f"{i + 1} of {args.n}: {_line(counts)}", flush=True)
        finally:
            started.close()
    print(f"seed {args.seed}: {_line(counts)}")
    return int(any(v.startswith("DIFFERENT") for v in counts))


N_RECORDED, N_REFUSED, N_TOKENS = 8, 3, 9
"""Models of each architecture that are recorded, those of them that are refused, and the tokens of each."""


def _record(args: argparse.Namespace, client: Client, peer: Peer, folder: Path) -> int:
    """The logits of the last token of the first models of each architecture that are the same here and there."""
    rows: list[tuple[int, bytes, int, list[int], npt.NDArray[np.float32]]] = []
    left = Counter({(arch, refused): N_REFUSED if refused else N_RECORDED for arch in ARCHS for refused in (False, True)})
    for i in range(args.n):
        m, rng = numbered(args.seed, i)
        n_ctx, tokens = rng.choice(CONTEXTS), [rng.randrange(m.n_vocab) for _ in range(N_TOKENS)]
        path = write(folder / "m.gguf", m)
        (ours, _), (theirs, _) = here(client, path, tokens, n_ctx), there(peer, path, tokens, n_ctx)
        row = np.full(128, np.nan, np.float32)
        if ours is not None and theirs is not None and not _off(ours, theirs, False)[0]:
            row[: m.n_vocab] = theirs[-1]
        elif ours is not None or theirs is not None:
            continue
        if left[m.arch, theirs is None]:
            left[m.arch, theirs is None] -= 1
            rows.append((i, fingerprint(m), n_ctx, tokens, row))
    number, prints, contexts, texts, logits = zip(*rows, strict=True)
    np.savez_compressed(args.record, seed=args.seed, number=number, n_ctx=contexts, tokens=np.array(texts, np.int32),
                        fingerprint=np.array([list(x) for x in prints], np.uint8), logits=np.stack(logits))  # fmt: skip
    print(f"{args.record}: {len(rows)} models, {sum(np.isnan(x[0]) for x in logits)} of them refused")
    return 0


def _line(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))


def compare(client: Client, peer: Peer, m: Model, rng: random.Random, folder: Path) -> tuple[str, str]:
    """A verdict and its details. Both sides get the same tokens and the same context."""
    n_ctx, n = rng.choice(CONTEXTS), rng.choice([1, 9, 24, 70])
    path = write(folder / "m.gguf", m)
    chosen = by_choice(m)
    theirs_of = write(folder / "folded.gguf", folded(m)) if chosen == "folded" else path
    open_choice = chosen not in (None, "folded")
    failed = []
    for _ in range(TRIES):
        tokens = [rng.randrange(m.n_vocab) for _ in range(n)]
        ours, mine = here(client, path, tokens, n_ctx)
        theirs, other = there(peer, theirs_of, tokens, n_ctx)
        if ours is None and theirs is None:
            return "refused by both", f"here: {mine}; there: {other}"
        if ours is None or theirs is None:
            where = "here" if ours is None else "there"
            return f"by choice, {chosen}" if open_choice else f"DIFFERENT: refused {where}", mine or other
        off, most = _off(ours, theirs, BF16 in m.types.values())
        choosing = m.keys.get("expert_used_count", 0) < m.keys.get("expert_count", 0)
        if not off or (choosing and most <= EDGE):
            edge = ", an expert on the edge" if failed or off else ""
            return ("same" if chosen is None else f"same, {chosen}") + edge, ""
        failed.append(off)
        if not choosing:
            break
    return f"by choice, {chosen}" if open_choice else "DIFFERENT logits", "; ".join(failed)


def _off(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32], rough: bool) -> tuple[str, float]:
    """What is beyond the bounds, in words, and what three of four tokens are within."""
    whole, position = BOUNDS[rough]
    if not np.isfinite(theirs).all():
        return ("" if not np.isfinite(ours).all() else "not finite there"), np.inf
    each = [nmse(a, b) for a, b in zip(ours, theirs, strict=True)]
    worst = int(np.argmax(each))
    total = nmse(ours, theirs)
    fine = total <= whole and each[worst] <= position
    return "" if fine else f"nmse {total:.1e}, of token {worst} {each[worst]:.1e}", float(np.quantile(each, 0.75))


def by_choice(m: Model) -> str | None:
    """Which row of docs/differences.md a model falls under; `folded`: llama.cpp is asked with the scales multiplied in."""
    for i in range(m.keys["block_count"]):
        there = [f"blk.{i}.attn_{x}.bias" in m.tensors for x in ("qkv", "q", "k", "v")]
        if f"blk.{i}.attn_qkv.weight" in m.tensors and not there[0] and 0 < sum(there) < 3:
            return "one of three biases"
    pattern = m.keys.get("attention.sliding_window_pattern", 2)
    none_windowed = not any(pattern) if isinstance(pattern, list) else pattern == 1
    windowed = m.arch in ("gemma2", "gpt-oss") or (m.arch in ("gemma3", "olmo2") and "attention.sliding_window" in m.keys)
    if windowed and none_windowed:
        return "no layer with a window"
    kinds = {t.removesuffix(".scale").rsplit(".", 1)[-1] for t in m.tensors if t.endswith(".scale")}
    dropped = set()
    if m.arch not in ("llama", "mistral3", "qwen3"):
        dropped |= {"ffn_gate", "ffn_up", "ffn_down"}
    if m.arch not in ("llama", "mistral3", "qwen3moe"):
        dropped |= {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    if m.arch == "mamba2":
        dropped |= {"ssm_in", "ssm_out"}
    if m.arch == "granite":
        dropped |= {"ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}
    return "folded" if kinds & dropped and kinds <= SCALED else None


SCALED = {"attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "ssm_in", "ssm_out",
          *(f"ffn_{x}{kind}" for x in ("gate", "up", "down") for kind in ("", "_exps", "_shexp"))}  # fmt: skip
"""Weights beside which a scale may stand."""


def here(client: Client, path: Path, tokens: list[int], n_ctx: int) -> tuple[npt.NDArray[np.float32] | None, str]:
    """ggmq's logits over two workers, or why it refuses."""
    try:
        arch = open_arch(GGUF(path))
        split = [1.0, 1.0] if arch.hp.n_layer > 1 else [1.0]
        try:
            return Engine(loaded(client, path, n_ctx, split)).logits(np.array(tokens, np.int32)), ""
        finally:
            client.drain()
    except GgmqError as e:
        return None, str(e)


def there(peer: Peer, path: Path, tokens: list[int], n_ctx: int) -> tuple[npt.NDArray[np.float32] | None, str]:
    """libllama's, or why it refuses; ending its process counts as that."""
    try:
        peer.open(path, vocab_only=False)
        return peer.logits(tokens, n_ctx), ""
    except (PeerRefused, PeerCrashed) as e:
        return None, str(e)[-300:]
