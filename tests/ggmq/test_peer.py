"""Against llama.cpp itself (xllamacpp), where it is installed: other sizes, options and seeds than the recorded ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ggmq.cluster import Client
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.sampling import SamplingParams
from ggmq.tokenizer import Vocabulary
from tests.support.architectures import N_VOCAB, VARIANTS, Variant, write
from tests.support.fixtures import BUNDLED, nmse
from tests.support.loaded import cpu_workers, loaded

pytestmark = [pytest.mark.peer, pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")]

PEER = """
import json, os, sys, xllamacpp
out = os.dup(1); os.dup2(2, 1)
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup = sys.argv[1], 512, 1, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 2
if len(sys.argv) > 3:
    p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
s = xllamacpp.Server(p)
r = [s.handle_completions(q) for q in json.loads(sys.argv[2])]
os.write(out, json.dumps(r).encode()); os._exit(0)
"""


def peer(model: Path, requests: list[dict[str, object]], *more: str) -> list[dict[str, object]]:
    done = subprocess.run([sys.executable, "-c", PEER, str(model), json.dumps(requests), *more], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.stdout, done.stderr[-1500:]
    return list(json.loads(done.stdout))


@pytest.fixture(scope="module")
def two() -> Iterator[Client]:
    with cpu_workers(2) as client:
        yield client


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_probabilities_agree(two: Client, tmp_path: Path, variant: Variant, seed: int) -> None:
    model = write(tmp_path / "m.gguf", variant, seed)
    tokens = np.random.default_rng(seed).integers(1, N_VOCAB, 40).astype(np.int32)
    request = {"prompt": tokens.tolist(), "n_predict": 1, "n_probs": N_VOCAB, "logprobs": N_VOCAB, "temperature": 0,
               "cache_prompt": False, "ignore_eos": True}  # fmt: skip
    (reply,) = peer(model, [request], "no-flash")
    found = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]  # type: ignore[index]
    expected = np.full(N_VOCAB, np.nan)
    for entry in found:
        expected[entry["id"]] = entry["logprob"]
    there = loaded(two, model, 512, [1, 1])
    try:
        x = there.forward(tokens, 0, [39])[0].astype(np.float64)
    finally:
        two.drain()
    got = x - x.max() - np.log(np.exp(x - x.max()).sum())
    known = ~np.isnan(expected)
    assert known.sum() > 50
    assert nmse(got[known], expected[known]) < 1e-5


@pytest.mark.parametrize("prompt", ["Once upon a time", "One day", "The dog", "Tom", "Hello", "In a small village"])
def test_the_bundled_model_tells_what_it_tells_there(two: Client, prompt: str) -> None:
    g = GGUF(BUNDLED)
    v = Vocabulary(g)
    ids = v.encode(prompt)
    request = {"prompt": ids, "n_predict": 200, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    (reply,) = peer(BUNDLED, [request])
    engine = Engine(loaded(two, g, 512, [1, 1]), v.end_ids)
    try:
        engine.start(ids, SamplingParams(temperature=0, banned=v.end_ids))
        out = list(engine.generate(200))
    finally:
        two.drain()
    assert len(out) == 200 and v.decode(out) == reply["choices"][0]["text"]  # type: ignore[index]
