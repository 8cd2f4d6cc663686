"""Greedy texts of 500 tokens: the bundled model in several types, and random models of every architecture.

libllama makes a text; ggmq makes one too, and reads libllama's: after each of its tokens the likeliest next one must be the
same, unless the two likeliest are so near that rounding chooses.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from ggmq.archs import open_arch
from ggmq.cluster import Client, LocalBus
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.sampling import SamplingParams
from ggmq.tokenizer import Vocabulary
from tests.peer.libllama import Peer
from tests.support.fixtures import BUNDLED
from tests.support.loaded import loaded
from tests.support.random_models import ARCHS, base, write

N_TOKENS, N_CTX = 500, 1024
TYPES = ("F16", "F32", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")
NEAR, NEAR_ROUGH = 0.01, 0.3
"""Two logits nearer than so many standard deviations of all may change places: products are rounded otherwise there, and
with BF16 and quantised weights activations are rounded to BF16 or quantised too."""
PROMPTS = ("Once upon a time", "One day", "The dog", "Tom", "Lily and Ben", "In a small village", "The sun was", "Mom said")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(n=len(TYPES) * len(PROMPTS) + 3 * len(ARCHS))


def run(args: argparse.Namespace) -> int:
    """Compare; 0 when no token differs but where two are equally likely."""
    counts: Counter[str] = Counter()
    started = LocalBus()
    with tempfile.TemporaryDirectory() as folder, Peer() as peer:
        try:
            for _ in range(2):
                started.spawn("CPU", 1)
            client = started.start()
            for name, path, prompt, near in _texts(args.n, args.seed, Path(folder)):
                verdict, details = _compare(client, peer, path, prompt, near)
                counts[verdict] += 1
                if verdict == "DIFFERENT":
                    print(f"{name}: {details}", flush=True)
        finally:
            started.close()
    print(f"seed {args.seed}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    return int(counts["DIFFERENT"] > 0)


def _texts(n: int, seed: int, folder: Path) -> Iterator[tuple[str, Path, list[int], float]]:
    """Name, file, prompt and how near is near of each text."""
    rng = random.Random(seed)
    vocabulary = Vocabulary(GGUF(BUNDLED))
    for i in range(n):
        if i < len(TYPES) * len(PROMPTS):
            kind, prompt = TYPES[i // len(PROMPTS)], PROMPTS[i % len(PROMPTS)]
            path = folder / f"{kind}.gguf"
            if not path.exists():
                _retyped(path, kind)
            near = NEAR if kind in ("F16", "F32") else NEAR_ROUGH
            yield f"{kind}: {prompt!r}", path, vocabulary.encode(prompt), near
        else:
            arch = ARCHS[i % len(ARCHS)]
            m = base(arch, rng, experts=False).having(context_length=512)
            yield f"{arch} {i}", write(folder / "m.gguf", m), [rng.randrange(m.n_vocab) for _ in range(5)], NEAR


def _retyped(path: Path, kind: str) -> None:
    """The bundled model with its matrices in another type, as far as their rows are whole blocks of it."""
    reader = gguf.GGUFReader(BUNDLED)
    w = gguf.GGUFWriter(path, "llama")
    for name, v in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = v.types[-1] if len(v.types) > 1 else None
            w.add_key_value(name, v.contents(), v.types[0], sub)
    to = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[to][0]
    for t in reader.tensors:
        data = gguf.quants.dequantize(t.data, t.tensor_type)
        fits = len(data.shape) > 1 and data.shape[-1] % block == 0
        own = to if fits else gguf.GGMLQuantizationType.F32
        w.add_tensor(t.name, _packed(data, own), raw_dtype=own)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def _packed(data: npt.NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> npt.NDArray[np.generic]:
    return data if kind == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(data, kind)


def _compare(client: Client, peer: Peer, path: Path, prompt: list[int], near: float) -> tuple[str, str]:
    g = GGUF(path)
    banned = sorted(Vocabulary(g).end_ids)
    peer.open(path, vocab_only=False)
    theirs = peer.greedy(prompt, N_TOKENS, N_CTX, banned=banned)
    n_layer = open_arch(g).hp.n_layer
    engine = Engine(loaded(client, g, N_CTX, [1.0, 1.0] if n_layer > 1 else [1.0]))
    try:
        engine.start(prompt, SamplingParams(temperature=0, banned=frozenset(banned)))
        ours = list(engine.generate(N_TOKENS))
        rows = engine.logits(np.array([*prompt, *theirs[:-1]], np.int32))[len(prompt) - 1 :]
    finally:
        client.drain()
    rows[:, banned] = -np.inf
    edges = []
    for i, (row, token) in enumerate(zip(rows, theirs, strict=True)):
        apart = float(row.max() - row[token]) / float(row[np.isfinite(row)].std())
        if apart > near:
            return "DIFFERENT", f"token {i}: {int(row.argmax())} here, {token} there, {apart:.3f} deviations apart"
        if apart:
            edges.append(i)
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), N_TOKENS)
    if not edges and same < N_TOKENS:
        return "DIFFERENT", f"token {same}: {ours[same]} here, {theirs[same]} there, though reading it agrees"
    return ("same", "") if not edges else ("same but where two tokens are as likely", "")
