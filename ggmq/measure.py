"""Rates of a loaded model: prefill, decode, several sequences at once, and what crossed the wire."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ggmq.runner import Entry, Runner, UnderWay


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


class Streams:
    """Sequences that decode side by side, in as many groups as there are stages, so that every stage is busy."""

    def __init__(self, runner: Runner, tokens: list[int], n_past: int) -> None:
        self.runner, self.tokens, self.n_past = runner, tokens, n_past
        n = min(len(tokens), len(runner.stages))
        self.groups = [range(len(tokens) * g // n, len(tokens) * (g + 1) // n) for g in range(n)]

    def _send(self, group: range, step: int) -> UnderWay:
        entries = [Entry(self.tokens[s], self.n_past + step, s) for s in group]
        return self.runner.submit(entries, range(len(entries)), argmax=True)

    def decode(self, n: int) -> None:
        """`n` greedy tokens of every sequence."""
        under_way = [self._send(g, 0) for g in self.groups]
        for step in range(1, n + 1):
            for i, g in enumerate(self.groups):
                self.tokens[g.start : g.stop] = [int(t) for t in self.runner.wait(under_way[i])]
                if step < n:
                    under_way[i] = self._send(g, step)
        self.n_past += n


def _wire(runner: Runner) -> tuple[int, int]:
    """Bytes so far: between the broker and the workers and from worker to worker, and of those the latter."""
    stats = [runner.client.stats(s.assignment.device) for s in runner.stages]
    handed = sum(s.handed_out_bytes for s in stats)
    return sum(s.wire_in_bytes + s.wire_out_bytes for s in stats) - handed, handed


def measure(runner: Runner, n_prompt: int, n_gen: int, n_depth: int = 0, n_streams: int = 1) -> Rates:
    """Read a prompt, then generate greedily. The first pass over each shape compiles its graphs and is not counted.

    n_depth: tokens that are in the cache before the generation, at least n_prompt of them.
    """
    client, vocabulary = runner.client, runner.arch.hp.n_vocab
    prompt = [(7 * i + 100) % vocabulary for i in range(n_prompt)]
    for _ in range(2):
        start = time.perf_counter()
        token = int(runner.forward(prompt, 0, [n_prompt - 1], argmax=True)[0])
        prefill_s = time.perf_counter() - start
    n_past = n_prompt
    while n_past < n_depth:
        more = prompt[: n_depth - n_past][:512]
        token = int(runner.forward(more, n_past, [len(more) - 1], argmax=True)[0])
        n_past += len(more)
    tokens = [token]
    for s in range(1, n_streams):
        tokens.append(int(runner.forward([(t + s) % vocabulary for t in prompt], 0, [n_prompt - 1], argmax=True, slot=s)[0]))
    streams = Streams(runner, tokens, n_past)
    streams.decode(2)
    streams.n_past = n_past
    asked = _wire(runner)[0]
    wire, handed = _wire(runner)
    asking = wire - asked  # the question itself crosses the wire
    trips, compute_s = client.n_round_trips, runner.compute_s
    start = time.perf_counter()
    streams.decode(n_gen)
    decode_s = time.perf_counter() - start
    n = n_gen * n_streams
    trips, compute_s = client.n_round_trips - trips, runner.compute_s - compute_s
    wire, handed = (after - before for after, before in zip(_wire(runner), (wire, handed), strict=True))
    return Rates(n_prompt / prefill_s, n / decode_s, (wire - asking) / n, handed / n, trips / n, compute_s / n)
