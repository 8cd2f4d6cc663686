"""Rates of a loaded model: prefill, decode, several sequences at once, and what crossed the wire."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ggmq.engine import Engine
from ggmq.model import Model
from ggmq.sampling import SamplingParams
from ggmq.scheduler import Sequence

GREEDY = SamplingParams(temperature=0)
WARM_TOKENS = 2
"""Tokens of each sequence that are made before the clock runs: their graphs are new."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Units: tokens a second; a decoded token's bytes on all sockets of the workers, those of them that went from worker to
    worker, its round trips at the main host, and its seconds of computing."""

    prefill_tok_s: float
    decode_tok_s: float
    wire_bytes_per_token: float
    handed_bytes_per_token: float
    round_trips_per_token: float
    compute_s_per_token: float


def _wire(model: Model) -> tuple[int, int]:
    """Bytes so far: between the broker and the workers and from worker to worker, and of those the latter."""
    stats = [model.client.stats(s.assignment.device) for s in model.stages]
    handed = sum(s.handed_out_bytes for s in stats)
    return sum(s.wire_in_bytes + s.wire_out_bytes for s in stats) - handed, handed


def _make(engine: Engine, sequences: list[Sequence], n: int) -> None:
    """Run until each of them has made n tokens at least."""
    while any(s.n_made < n for s in sequences):
        engine.step()


def first_token(engine: Engine) -> float:
    """Seconds to the first token after a model was loaded."""
    start = time.perf_counter()
    _make(engine, [engine.add([1], GREEDY, 1)], 1)
    return time.perf_counter() - start


def measure(engine: Engine, n_prompt: int, n_gen: int, n_depth: int = 0, n_streams: int = 1) -> Rates:
    """Read a prompt, then generate greedily. The first pass over each shape compiles its graphs and is not counted.

    n_depth: tokens that are in the cache before the generation, at least n_prompt of them.
    """
    model = engine.model
    client, vocabulary = model.client, model.arch.hp.n_vocab
    prompt = [(7 * i + 100) % vocabulary for i in range(n_prompt)]
    for _ in range(2):
        model.store.drop_kept()
        start = time.perf_counter()
        _make(engine, [engine.add(prompt, GREEDY, 1)], 1)
        prefill_s = time.perf_counter() - start
    past = (prompt * (-(-n_depth // n_prompt) or 1))[: max(n_depth, n_prompt)]
    streams = [engine.add([(t + s) % vocabulary for t in past], GREEDY) for s in range(n_streams)]
    _make(engine, streams, 1 + WARM_TOKENS)
    asked = _wire(model)[0]
    wire, handed = _wire(model)
    asking = wire - asked  # the question itself crosses the wire
    trips, compute_s = client.n_round_trips, model.runner.compute_s
    made = sum(s.n_made for s in streams)
    start = time.perf_counter()
    _make(engine, streams, 1 + WARM_TOKENS + n_gen)
    decode_s = time.perf_counter() - start
    n = sum(s.n_made for s in streams) - made
    trips, compute_s = client.n_round_trips - trips, model.runner.compute_s - compute_s
    wire, handed = (after - before for after, before in zip(_wire(model), (wire, handed), strict=True))
    for s in streams:
        engine.leave(s)
    while engine.busy:
        engine.step()
    return Rates(n_prompt / prefill_s, n / decode_s, (wire - asking) / n, handed / n, trips / n, compute_s / n)
